"""What format version 1 left behind loads, is used, and goes on: its fingerprint knew less, and that is said."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from softprompt.errors import PromptError
from softprompt.prompt.ensemble import Ensemble
from softprompt.prompt.loading import load_prompt
from tiny_runs import Command

KEPT = Path(__file__).parent / "fixtures" / "version-1"
PROMPTS = ("prompt", "deep-prefix", "ensemble")
UNCHECKED = re.compile(r"warning: .* of format version 1: whether .* same model in its layers, .* could not be checked")


@pytest.fixture(autouse=True)
def _warnings_are_shown() -> Iterator[None]:
    """As they are outside of tests, on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


@pytest.fixture
def saved_files(tmp_path: Path) -> Path:
    """A copy, in the folder that commands run in: the model was called `tiny`."""
    shutil.copytree(KEPT, tmp_path, dirs_exist_ok=True)
    return tmp_path


def changed(saved_files: Path, name: str, factor: float) -> None:
    file = saved_files / "tiny" / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name] * factor
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_load_evaluate_and_generate(name: str, saved_files: Path, command: Command) -> None:
    prompt = load_prompt(saved_files / name)
    assert prompt.record.format_version == 1
    assert isinstance(prompt, Ensemble) == (name == "ensemble")
    done = command("evaluate", name, "rows.csv", "--json")
    assert done.code == 0, done.err
    assert UNCHECKED.search(done.err)
    assert done.record["metrics"]["accuracy"]["value"] > 0
    done = command("generate", name, "a fine film", "--json")
    assert done.code == 0, done.err
    assert UNCHECKED.search(done.err)
    assert len(done.record["outputs"]) == 1


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_of_version_1_are_refused_where_their_own_fields_differ(
    name: str, saved_files: Path, fails: Command
) -> None:
    changed(saved_files, "model.embed_tokens.weight", 1.1)
    done = fails("evaluate", name, "rows.csv")
    assert "is another model: its weights differs" in done.err


def test_what_version_1_did_not_know_is_not_compared(saved_files: Path, command: Command) -> None:
    changed(saved_files, "model.layers.0.mlp.down_proj.weight", 1.1)
    done = command("evaluate", "prompt", "rows.csv")
    assert done.code == 0, done.err
    assert UNCHECKED.search(done.err)


def test_the_run_resumes_and_ends_with_the_same_prompt(saved_files: Path, command: Command) -> None:
    done = command("tune", "rows.csv", "--model", "tiny", "--out", "run", "--resume", "--json")
    assert done.code == 0, done.err
    assert UNCHECKED.search(done.err)
    assert done.record["steps"] == 20
    ended, undisturbed = (load_file(saved_files / at / "adapter_model.safetensors") for at in ("run/prompt", "prompt"))
    torch.testing.assert_close(ended["prompt_embeddings"], undisturbed["prompt_embeddings"], rtol=1e-4, atol=1e-4)
    record = json.loads((saved_files / "run/prompt/softprompt.json").read_text())
    assert record["format_version"] == 2
    assert record["base_model"]["fingerprint"]["version"] == 2
    done = command("evaluate", "run/prompt", "rows.csv")
    assert (done.code, "could not be checked" in done.err) == (0, False)


def test_the_run_does_not_go_on_with_another_model(saved_files: Path, fails: Command) -> None:
    changed(saved_files, "model.embed_tokens.weight", 1.1)
    done = fails("tune", "rows.csv", "--model", "tiny", "--out", "run", "--resume")
    assert "the base model of run is another: its weights differs" in done.err


def comparison(*methods: str) -> list[str]:
    settings = ["max_steps=4", "batch_size=4", "num_virtual_tokens=4", "threads=1", "eval_rows=8"]
    given = [word for setting in settings for word in ("--set", setting)]
    named = ["--methods", ",".join(methods), "--out", "comparison", "--equal", "examples", "--no-search"]
    return ["compare", "rows.csv", "--model", "tiny", *named, *given]


def test_the_comparison_goes_on_with_a_third_method(saved_files: Path, command: Command) -> None:
    results = saved_files / "comparison" / "results"
    before = {file.name: file.read_bytes() for file in results.iterdir()}
    done = command(*comparison("zero-shot", "prompt-tuning", "few-shot"))
    assert done.code == 0, done.err
    assert UNCHECKED.search(done.err)
    assert {name: (results / name).read_bytes() for name in before} == before
    assert sorted(file.name for file in results.iterdir()) == sorted([*before, "few-shot-0.json"])
    assert (saved_files / "comparison" / "report.html").is_file()


def test_the_comparison_does_not_go_on_with_another_model(saved_files: Path, fails: Command) -> None:
    changed(saved_files, "model.embed_tokens.weight", 1.1)
    assert "another base model: its weights differs" in fails(*comparison("zero-shot", "few-shot")).err


def test_saved_again_a_prompt_keeps_what_is_known_of_its_model(saved_files: Path, tmp_path: Path) -> None:
    """Saving is not checking: the fingerprint stays that of version 1."""
    saved = load_prompt(load_prompt(saved_files / "prompt").save(tmp_path / "again"))
    assert saved.record.base_model == load_prompt(saved_files / "prompt").record.base_model


@pytest.mark.parametrize("version", [0, 3, "1", None, True])
def test_formats_of_other_versions_are_refused(version: object, saved_files: Path) -> None:
    file = saved_files / "prompt" / "softprompt.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "format_version": version}))
    with pytest.raises(PromptError, match=r"format version .*; this softprompt reads 1 and 2"):
        load_prompt(saved_files / "prompt")
