"""Registered prompts: versions, names that are refused, and the commands around them."""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from threading import Thread

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model

from softprompt import load_prompt
from softprompt.cli.doctor import machine_problems
from softprompt.errors import PromptError
from softprompt.model.frozen import FrozenModel
from softprompt.prompt import registry
from softprompt.prompt.base_model import base_model_record
from softprompt.prompt.ensemble import make_ensemble
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import SoftPrompt
from tiny_models import tiny_model
from tiny_runs import SHORT, Command


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def prompt_of(model: FrozenModel, number: int) -> SoftPrompt:
    return SoftPrompt(model.embed([number, number + 1]).float(), Record(base_model=base_model_record(model)))


def test_versions_count_up_and_the_name_alone_is_the_newest(llama: FrozenModel, home: Path) -> None:
    registered = [registry.register(prompt_of(llama, n), "film") for n in (5, 6, 7)]
    assert registered == ["film@1", "film@2", "film@3"]
    assert registry.names() == ["film"]
    assert torch.equal(load_prompt("film").weights, prompt_of(llama, 7).weights)
    assert torch.equal(load_prompt("film@2").weights, prompt_of(llama, 6).weights)
    assert registry.find("film@1") == home / "prompts" / "film" / "1"


def test_removed_version_is_gone_and_its_number_is_not_used_again(llama: FrozenModel) -> None:
    for n in (5, 6, 7):
        registry.register(prompt_of(llama, n), "film")
    registry.remove(["film@2"])
    assert registry.versions("film") == [1, 3]
    assert registry.register(prompt_of(llama, 8), "film") == "film@4"
    registry.remove(registry.matching("film"))
    assert registry.names() == []


def test_removing_a_registered_prompt_leaves_a_folder_of_its_name(
    llama: FrozenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    registry.register(prompt_of(llama, 5), "film")
    mine = prompt_of(llama, 6).save("film@1")
    registry.remove(registry.matching("film"))
    assert mine.is_dir()
    assert registry.names() == []


def test_the_tenth_version_comes_after_the_ninth(llama: FrozenModel) -> None:
    for n in range(10):
        registry.register(prompt_of(llama, 5 + n), "film")
    assert registry.versions("film")[-2:] == [9, 10]
    assert registry.find("film").name == "10"


@pytest.mark.parametrize("name", ["", ".", "..", "../film", "a/b", "/film", "film@2", "-film", "fi lm", "a" * 101, "é"])
def test_a_name_that_could_leave_the_store_is_refused(name: str, llama: FrozenModel, home: Path) -> None:
    with pytest.raises(PromptError, match="is no name for a prompt"):
        registry.register(prompt_of(llama, 5), name)
    assert registry.versions(name) == []
    assert not home.exists()


@pytest.mark.parametrize("name", ["../outside", "film/../../outside", "/etc"])
def test_path_is_not_taken_for_a_registered_name(name: str, llama: FrozenModel, home: Path) -> None:
    registry.register(prompt_of(llama, 5), "film")
    shutil.copytree(home / "prompts" / "film" / "1", home / "outside" / "1")
    with pytest.raises(PromptError, match="no such registered prompt"):
        registry.matching(name)


def test_a_folder_wins_over_a_name_unless_it_holds_no_prompt(
    llama: FrozenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    registry.register(prompt_of(llama, 5), "film")
    Path("film").mkdir()  # the run's folder, say
    assert torch.equal(load_prompt("film").weights, prompt_of(llama, 5).weights)
    Path("film").rmdir()
    prompt_of(llama, 9).save("film")
    assert torch.equal(load_prompt("film").weights, prompt_of(llama, 9).weights)


def test_unknown_name_is_refused_with_the_nearest_registered_one(llama: FrozenModel) -> None:
    registry.register(prompt_of(llama, 5), "sentiment")
    with pytest.raises(PromptError, match=r"no such prompt: sentimet \(did you mean 'sentiment'"):
        load_prompt("sentimet")
    with pytest.raises(PromptError, match="sentiment has no version '7'; there is 1"):
        load_prompt("sentiment@7")


def test_commands_take_a_registered_prompt(
    command: Command,
    reviews: Path,
    llama_folder: Path,
    tmp_path: Path,
) -> None:
    tuned = command("tune", reviews, "--model", llama_folder, "--out", "run", "--name", "film", *SHORT)
    assert tuned.code == 0
    assert "registered as film@1" in tuned.out
    record = command(
        "tune", reviews, "--model", llama_folder, "--out", "again", "--name", "film", *SHORT, "--json"
    ).record
    assert record["registered"] == "film@2"

    listed = command("prompts", "list", "--json").record["prompts"]
    assert [p["name"] for p in listed] == ["film@1", "film@2"]
    assert "film@2" in command("prompts", "list").out

    shown = command("prompts", "show", "film", "--json").record
    assert shown["virtual_tokens"] == 5
    assert len(shown["nearest_tokens"]) == 5
    assert "nearest in the vocabulary" in command("prompts", "show", "film@1").out

    assert command("evaluate", "film@1", reviews, "--json").record["rows"] == 40
    assert (tmp_path / "test-predictions.jsonl").exists()
    (tmp_path / "film").mkdir()  # a folder that happens to bear the name
    assert command("evaluate", "film", reviews, "--json").record["predictions"] == "test-predictions.jsonl"
    refused = command("tune", reviews, "--init", "prompt:film@1", "--trust-remote-code", "--out", "never")
    assert refused.code == 2
    assert "a prompt must not decide which code is run" in refused.err
    assert command("generate", "film", "a fine film", "--json").record["outputs"]

    assert command("prompts", "export", "film", "exported").code == 0
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "exported")
    torch.testing.assert_close(again.prompt_encoder["default"].embedding.weight.detach(), load_prompt("film").weights)
    assert command("prompts", "add", "copy", "exported").out == "copy@1\n"
    assert command("prompts", "remove", "film", "--yes").out == "removed film@1, film@2\n"
    assert registry.names() == ["copy"]


def test_name_that_cannot_be_registered_is_refused_before_the_run(
    fails: Command,
    reviews: Path,
    tmp_path: Path,
) -> None:
    done = fails("tune", reviews, "--model", "nowhere/at-all", "--out", "run", "--name", "../x", *SHORT)
    assert "'../x' is no name for a prompt" in done.err
    assert not (tmp_path / "run").exists()


def test_removing_asks_first(command: Command, llama: FrozenModel) -> None:
    registry.register(prompt_of(llama, 5), "film")
    assert command("prompts", "remove", "film", stdin="n\n").code == 130
    assert registry.names() == ["film"]
    assert command("prompts", "remove", "film", stdin="y\n").code == 0
    assert registry.names() == []


def test_an_empty_store_says_how_to_fill_it(command: Command) -> None:
    done = command("prompts", "list")
    assert (done.code, done.out) == (0, "")
    assert "tune --name N and prompts add register one" in done.err
    assert command("prompts", "list", "--json").record == {"prompts": []}


def test_a_damaged_prompt_hides_no_other(command: Command, llama: FrozenModel, home: Path) -> None:
    for name in ("one", "two"):
        registry.register(prompt_of(llama, 5), name)
    (home / "prompts" / "one" / "1" / "adapter_model.safetensors").write_bytes(b"")
    done = command("prompts", "list", "--json")
    assert [p["name"] for p in done.record["prompts"]] == ["two@1"]
    assert "one@1: cannot read" in done.err
    assert command("prompts", "remove", "one", "--yes").code == 0


def test_a_prompt_that_peft_trained_is_imported_with_what_its_folder_does_not_say(
    command: Command,
    fails: Command,
    reviews: Path,
    llama_folder: Path,
    tmp_path: Path,
) -> None:
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    peft_model = get_peft_model(tiny_model("llama"), config)
    peft_model.save_pretrained(tmp_path / "peft")
    given = ("--set", 'verbalizers={"positive": "positive", "negative": "negative"}')
    done = command("prompts", "import", "film", "peft", "--model", llama_folder, "--task", "classification", *given)
    assert (done.code, done.out, done.err) == (0, "film@1\n", f"loading {llama_folder}\n")
    registered = load_prompt("film")
    assert registered.record.base_model.fingerprint is not None
    torch.testing.assert_close(registered.weights, peft_model.prompt_encoder["default"].embedding.weight.detach())
    assert command("evaluate", "film", reviews, "--json").record["rows"] == 40
    wrong = fails("prompts", "import", "film", "peft", "--model", llama_folder, "--task", "classification")
    assert "classification needs the labels" in wrong.err


@pytest.mark.parametrize("as_json", [False, True])
def test_doctor_says_what_is_here_and_what_is_missing(
    command: Command,
    as_json: bool,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = command("doctor", *(["--json"] if as_json else []))
    assert done.code == 0
    optional = "Parquet files need pyarrow: pip install 'softprompt[parquet]'"
    problem = "the bundled model smollm2-135m is not here yet: softprompt models fetch smollm2-135m"
    if as_json:
        assert done.record["optional"] == [optional]
        assert problem in done.record["problems"]
        assert done.record["versions"]["torch"] == version("torch")
        assert done.record["machine"]["threads"] == torch.get_num_threads()
        assert done.record["kept"]["softprompt_home"] == str(home)
    else:
        assert f"optional: {optional}" in done.out
        assert f"problem: {problem}" in done.out
    assert not home.exists()


def test_doctor_sees_little_memory_and_disk_and_a_folder_that_cannot_be_written() -> None:
    memory, disk, folder = machine_problems("cpu", 1.5e9, Path("/home/me"), 0.5e9, writable=False)
    assert memory.startswith("1.5 GB of memory are free on cpu;")
    assert disk.startswith("0.5 GB of disk are free in /home/me;")
    assert folder.startswith("/home/me cannot be written; set SOFTPROMPT_HOME")
    assert machine_problems("cpu", 1e10, Path("/home/me"), 1e10, writable=True) == []


def test_numbers_are_given_once(llama: FrozenModel) -> None:
    for n in (5, 6):
        registry.register(prompt_of(llama, n), "film")
    registry.remove(["film@2"])
    registry.remove(["film@1"])
    assert (registry.names(), registry.versions("film")) == ([], [])
    assert registry.register(prompt_of(llama, 7), "film") == "film@3"


def test_names_of_the_base_model_are_refused_for_prompts(llama: FrozenModel) -> None:
    with pytest.raises(PromptError, match="'none' stands for the base model"):
        registry.register(prompt_of(llama, 5), "none")


def test_add_registers_the_folder_that_is_given(
    command: Command, fails: Command, llama: FrozenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    registry.register(prompt_of(llama, 5), "film")
    make_ensemble([prompt_of(llama, 6), prompt_of(llama, 7)], {}).save("film")
    assert registry.find("film") == Path("film")
    assert command("prompts", "add", "film", "film").out == "film@2\n"
    assert [len(load_prompt(f"film@{version}").members) for version in (1, 2)] == [1, 2]
    shutil.rmtree("film")
    Path("film").mkdir()
    assert "is not a prompt" in fails("prompts", "add", "film", "film").err


@pytest.mark.parametrize("kind", ["lora", "notes"])
def test_saving_replaces_a_prompt_and_nothing_else(llama: FrozenModel, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "mine"
    if kind == "lora":
        get_peft_model(tiny_model("llama"), LoraConfig(task_type=TaskType.CAUSAL_LM)).save_pretrained(str(folder))
    else:
        folder.mkdir()
        (folder / "README.md").write_text("my notes")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(PromptError, match="is not a prompt; give a new folder"):
        prompt_of(llama, 5).save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    get_peft_model(
        tiny_model("llama"), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    ).save_pretrained(str(tmp_path / "theirs"))
    for place in (tmp_path / "theirs", tmp_path / "theirs", tmp_path / "empty"):
        assert prompt_of(llama, 5).save(place) == place


def test_two_that_keep_at_a_time_get_two_versions(llama: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    save, registered = SoftPrompt.save, []
    other = Thread(target=lambda: registered.append(registry.register(prompt_of(llama, 6), "film")))

    def meanwhile(prompt: SoftPrompt, folder: Path) -> Path:
        """While the first one is written, the other begins; it would be done soon if it did not wait."""
        if not other.ident:
            other.start()
            other.join(1)
        return save(prompt, folder)

    monkeypatch.setattr(SoftPrompt, "save", meanwhile)
    registered.append(registry.register(prompt_of(llama, 5), "film"))
    other.join()
    assert sorted(registered) == ["film@1", "film@2"]
    assert torch.equal(load_prompt("film@1").weights, prompt_of(llama, 5).weights)
