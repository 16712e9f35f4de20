"""Two commands in one folder: the second is refused; and what damaged files of a folder lead to."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import filelock
import pytest
from safetensors.torch import load_file, save_file

from softprompt import Callback, TuneConfig, compare, load_data, tune
from softprompt.errors import InputError, StorageError
from softprompt.evaluation.scores import perplexity
from softprompt.model.frozen import FrozenModel
from softprompt.storage import LOCK_FILE, lock_folder, require_unlocked
from softprompt.training.checkpoint import load_checkpoint
from softprompt.training.ensemble import tune_ensemble
from tiny_runs import SHORT, Command

BUSY = "another command is at work in run; wait until it has ended, or give another folder"
_HOLDER = """
import sys, time
from pathlib import Path
from softprompt.storage import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Start a process that holds a folder."""
    process = subprocess.Popen([sys.executable, "-c", _HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("verb", ["tune", "tune --resume", "tune --ensemble 2", "compare"])
@pytest.mark.parametrize("there", [False, True])
def test_the_second_command_in_a_folder_is_told(
    verb: str, there: bool, command: Command, fails: Command, llama_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    words = [*verb.split(), reviews, "--model", llama_folder, "--out", "run"]
    if there:
        short = [*SHORT, "--set", "max_minutes=1"] if verb == "compare" else SHORT
        first = [word for word in words if word != "--resume"]
        methods = ["--methods", "zero-shot"] if verb == "compare" else []
        assert command(*first, *methods, *short).code == 0
    process = holder(tmp_path / "run")
    assert process.stdout is not None
    before = sorted((tmp_path / "run").rglob("*"))
    try:
        assert BUSY in fails(*words).err
        assert sorted((tmp_path / "run").rglob("*")) == before
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    require_unlocked(tmp_path / "run")  # its lock ended with it
    if verb == "tune" and not there:
        assert command(*words, *SHORT).code == 0
        assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_while_python_tunes_in_a_folder_no_other_call_does(llama: FrozenModel, reviews: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    out, rows, config = tmp_path / "run", load_data(reviews), TuneConfig(max_steps=2, batch_size=4, eval_rows=0)

    class Second(Callback):
        def step(self, step: int, loss: float) -> None:
            calls: list[Callable[[], Any]] = [
                lambda: tune(llama, rows, config, out=out),
                lambda: tune(llama, rows, None, out=out, resume=True),
                lambda: tune_ensemble(llama, rows, config, members=2, out=out),
                lambda: compare(llama, rows, methods=["zero-shot"], out=out),
            ]
            for call in calls:
                with pytest.raises(InputError, match="another command is at work in"):
                    call()
                seen.append("told")

    assert tune(llama, rows, config, out=out, callback=Second()).steps == 2
    assert len(seen) == 8
    assert not (out / LOCK_FILE).exists()


def test_a_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError), lock_folder(tmp_path / "a" / "b"):
        raise InputError("nothing was written")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with lock_folder(tmp_path / "mine"), pytest.raises(InputError), lock_folder(tmp_path / "mine"):
        pass
    assert list((tmp_path / "mine").iterdir()) == []


def test_of_many_that_want_a_folder_one_at_a_time_has_it(tmp_path: Path) -> None:
    inside, most, refused = [0], [0], [0]

    def work() -> None:
        for _ in range(30):
            try:
                with lock_folder(tmp_path / "run"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    time.sleep(0.001)
                    inside[0] -= 1
            except (InputError, StorageError):
                refused[0] += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert refused[0] < 120


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), NotImplementedError()])
def test_a_file_system_without_locks_is_used_with_a_warning(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filelock.FileLock, "acquire", Mock(side_effect=error))
    with pytest.warns(UserWarning, match="file system without locks"), lock_folder(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filelock.FileLock, "acquire", Mock(side_effect=OSError(30, "Read-only file system")))
    with pytest.raises(StorageError, match=r"cannot write .*run: Read-only file system"), lock_folder(tmp_path / "run"):
        pass


def test_a_run_that_was_killed_before_it_began_can_begin(llama: FrozenModel, reviews: Path, tmp_path: Path) -> None:
    """What its first moments leave is no reason to ask for another folder; what somebody else put there is."""
    out, config = tmp_path / "run", TuneConfig(max_steps=1, batch_size=4, eval_rows=0)
    out.mkdir()
    for name in (LOCK_FILE, "environment.json", "metrics.jsonl", ".config.yaml.softprompt-0123456789abcdef"):
        (out / name).touch()
    assert tune(llama, load_data(reviews), config, out=out).steps == 1
    assert {path.name for path in out.iterdir()} == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "prompt",
        "state",
    }
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(InputError, match="exists and is not empty"):
        tune(llama, load_data(reviews), config, out=tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


@pytest.fixture(scope="module")
def whole(llama: FrozenModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a state after each, and a comparison."""
    folder = tmp_path_factory.mktemp("whole")
    config = TuneConfig(max_steps=2, batch_size=4, eval_rows=0, save_every=1, num_virtual_tokens=5)
    tune(llama, rows(), config, out=folder / "run")
    compare(llama, rows(), methods=["zero-shot"], out=folder / "out", config=TuneConfig(max_minutes=0.1))
    return folder


def rows() -> Any:
    return load_data([{"text": f"a {word} film {i}", "label": word} for i in range(20) for word in ("fine", "dull")])


DAMAGES = ["{", "[]", "5", "", "\x00\xff", "[" * 100_000, "null"]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: repr(damage[:8]))
@pytest.mark.parametrize(
    "file", ["run/config.yaml", "run/environment.json", "out/protocol.json", "out/results/zero-shot-0.json"]
)
def test_a_damaged_file_is_named_with_the_cure(
    file: str, damage: str, llama: FrozenModel, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_bytes(damage.encode("latin-1"))
    with pytest.raises(InputError) as error:
        if file.startswith("run"):
            tune(llama, rows(), None, out=tmp_path / "run", resume=True)
        else:
            compare(llama, rows(), methods=["zero-shot"], out=tmp_path / "out", config=TuneConfig(max_minutes=0.1))
    assert file in str(error.value)
    assert any(cure in str(error.value) for cure in ("another folder", "remove it"))


def test_a_state_that_lacks_something_is_named(llama: FrozenModel, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "run" / "state" / "step-2" / "state.safetensors"
    save_file({name: t for name, t in load_file(file).items() if not name.startswith("exp_avg.")}, file)
    with pytest.raises(InputError, match=r"the state of step 2 is damaged: .*remove the folder state/step-2"):
        tune(llama, rows(), None, out=tmp_path / "run", resume=True)
    shutil.rmtree(file.parent)
    assert tune(llama, rows(), None, out=tmp_path / "run", resume=True).steps == 2


@pytest.mark.parametrize("name", ["step-²", "step-١", "step-x", "step-"])
def test_a_folder_that_is_no_state_is_passed_over(name: str, llama: FrozenModel, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run" / "state" / name).mkdir()
    assert tune(llama, rows(), None, out=tmp_path / "run", resume=True).steps == 2


def test_a_log_with_lines_of_anything_is_read(llama: FrozenModel, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    log = tmp_path / "run" / "metrics.jsonl"
    before = log.read_text()
    log.write_bytes(before.encode() + b'5\n[]\n{"step": "x"}\n{"loss": 1}\n\xff\n{"step": 2, "lo')
    tune(llama, rows(), None, out=tmp_path / "run", resume=True)
    assert log.read_text() == before


def test_a_figure_beyond_numbers_is_valid_json_everywhere(
    command: Command, llama_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In files and on stdout; the run goes on with it, and the prompt can be used."""
    monkeypatch.setattr("softprompt.evaluation.scores.perplexity", lambda loss: perplexity(1000 * loss))
    (tmp_path / "t.csv").write_text("text\n" + "\n".join(f"a fine film {i}" for i in range(40)))
    words = ["tune", "t.csv", "--model", llama_folder, "--out", "run"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = command(*words, *SHORT, "--json")
    assert done.record["metrics"]["perplexity"] is None
    files = [file for file in Path("run").rglob("*") if file.suffix in (".json", ".jsonl")]
    assert {file.name for file in files} >= {"metrics.jsonl", "state.json", "softprompt.json", "predictions.jsonl"}
    for file in files:
        for text in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(text, parse_constant=pytest.fail)
    assert command(*words, "--resume", "--json").record["metrics"]["perplexity"] is None
    evaluated = command("evaluate", "run/prompt", "t.csv", "--json").record
    assert evaluated["metrics"]["perplexity"] == {"value": None, "low": None, "high": None}
    state = load_checkpoint(Path("run/state/step-3"))
    assert state is not None
    assert state.state.best["perplexity"] == math.inf
    compared = ["compare", "t.csv", "--model", llama_folder, "--out", "out", "--methods", "zero-shot", "--json"]
    for _ in range(2):  # and read again
        result = command(*compared, "--set", "max_minutes=0.1").record["results"][0]
        assert result["metrics"]["perplexity"]["value"] is None
    json.loads(Path("out/results/zero-shot-0.json").read_text(), parse_constant=pytest.fail)
