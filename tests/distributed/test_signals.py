"""What stops or squeezes a run: Ctrl-C, memory that runs out, patience. Going on gives what an easy run gives."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch

from softprompt import Callback, TuneConfig, evaluate, load_data, tune
from softprompt.distributed.signals import defer_signals, raise_on_termination
from softprompt.errors import RunError
from softprompt.evaluation.label_scorer import LabelScorer
from softprompt.evaluation.scores import Scores
from softprompt.model.backends.base import Backend
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.training import prompt_trainer
from softprompt.training.checkpoint import Checkpoint
from softprompt.training.prepare import PreparedRun
from softprompt.training.run_log import RunLog
from tiny_runs import Command, Done

SHORT = {"max_steps": 6, "batch_size": 4, "eval_every": 2, "save_every": 100, "num_virtual_tokens": 5}
OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C is ignored in what a shell runs in the background, and by its children: here it is not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def short(**settings: object) -> TuneConfig:
    return TuneConfig(**{**SHORT, **settings})  # type: ignore[arg-type]


def contents(run: Path) -> dict[str, Any]:
    """What a run left, without the times that steps took."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    log = [{name: value for name, value in record.items() if name != "step_seconds"} for record in records]
    files = {path.name: path.read_bytes() for path in (run / "prompt").iterdir()}
    return {"log": log, "predictions": (run / "predictions.jsonl").read_bytes(), **files}


def interrupt(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def once(right: Callable[..., Any], at: int, before: bool = True, number: int = signal.SIGINT) -> Callable[..., Any]:
    """A function that sends this process a signal, Ctrl-C's for one, in its call number `at`."""
    calls = iter(range(10_000))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        now = next(calls) == at
        if now and before:
            interrupt(number)
        result = right(*args, **kwargs)
        if now and not before:
            interrupt(number)
        return result

    return wrapped


# Each: what is interrupted, in which call, and whether before or after its work.
MOMENTS = [
    ("gradient", 0, True),
    ("gradient", 3, True),
    ("gradient", 3, False),
    ("optimizer", 0, False),
    ("optimizer", 2, False),
    ("log", 2, True),
    ("evaluation", 0, True),
    ("evaluation", 2, True),
    ("evaluation", 2, False),
]


@pytest.mark.parametrize(("what", "call", "before"), MOMENTS)
def test_tune_that_was_interrupted_anywhere_and_resumed_ends_as_a_run_that_was_not(
    what: str,
    call: int,
    before: bool,
    llama: FrozenModel,
    reviews: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = load_data(reviews)
    tune(llama, rows, short(), out=tmp_path / "whole")
    place, name = {
        "gradient": (prompt_trainer, "prompt_gradient"),
        "optimizer": (torch.optim.AdamW, "step"),
        "log": (RunLog, "write"),
        "evaluation": (Backend, "score"),
    }[what]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, once(getattr(place, name), call, before))
        with pytest.raises(KeyboardInterrupt):
            tune(llama, rows, short(), out=tmp_path / "cut")
    assert not (tmp_path / "cut" / "prompt").exists()
    steps = [int(folder.name.removeprefix("step-")) for folder in (tmp_path / "cut" / "state").glob("step-*")]
    logged = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    done = max((record["step"] for record in logged if "loss" in record), default=0)
    assert steps == ([done] if done else [])  # every step that was done is saved, though the next save was far off
    assert tune(llama, rows, None, out=tmp_path / "cut", resume=True).steps == 6
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_interrupted_save_leaves_the_checkpoint_before(
    llama: FrozenModel, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = load_data(reviews)
    tune(llama, rows, short(save_every=2), out=tmp_path / "whole")
    saved = RunLog.save

    def pulled(self: RunLog, state: Checkpoint) -> None:
        if state.state.step >= 4:  # the second save, and the one that Ctrl-C asks for
            raise KeyboardInterrupt
        saved(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "save", pulled)
        with pytest.raises(KeyboardInterrupt):
            tune(llama, rows, short(save_every=2), out=tmp_path / "cut")
    assert [folder.name for folder in (tmp_path / "cut" / "state").iterdir()] == ["step-2"]
    tune(llama, rows, None, out=tmp_path / "cut", resume=True)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


# What is sent, what the command exits with, and the words it says.
STOPS = [
    (signal.SIGINT, 130, "stopped; the same command with --resume goes on from here"),
    (signal.SIGHUP, 129, "stopped; the same command with --resume goes on from here"),
]


def interrupted_command(command: Command, at: int, number: int, *arguments: object) -> Done:
    """Run a command in this process, and send it a signal after its optimizer step number `at`."""
    with patch.object(torch.optim.AdamW, "step", once(torch.optim.AdamW.step, at, before=False, number=number)):
        return command(*arguments)


@pytest.mark.parametrize(("number", "code", "message"), STOPS, ids=["INT", "HUP"])
def test_tune_command_that_gets_a_signal_saves_and_says_how_to_go_on(
    number: int, code: int, message: str, command: Command, llama_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    settings = ["--set", "max_steps=20", "--set", "eval_rows=0", "--set", "save_every=5000"]
    arguments = ["tune", reviews, "--model", llama_folder, "--out", tmp_path / "run", *settings]
    done = interrupted_command(command, 4, number, *arguments)
    assert (done.code, done.out) == (code, "")
    assert done.err.splitlines()[-1] == message
    assert [path.name for path in (tmp_path / "run" / "state").iterdir()] == ["step-5"]


def test_tune_command_that_gets_two_signals_from_outside_saves_once(
    llama_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "softprompt", "tune", reviews, "--model", llama_folder, "--out", tmp_path / "run"]
    command += ["--set", "max_steps=2000", "--set", "eval_rows=0", "--set", "save_every=5000"]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said = []
        for line in process.stderr:  # the log says how far it is: no clock
            said.append(line)
            if line.startswith("step 200/2000"):
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGTERM)
        out = process.stdout.read()
    assert (process.returncode, out) == (143, "")
    assert said[-1].startswith("stopped; the same command with --resume goes on from here")
    assert "".join(said).count("stopped") == 1
    assert "Traceback" not in "".join(said)
    (state,) = (tmp_path / "run" / "state").iterdir()
    assert int(state.name.removeprefix("step-")) >= 200
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "state",
    }


def test_tune_command_of_an_ensemble_that_is_terminated_goes_on(
    command: Command, llama_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    settings = ["--set", "max_steps=6", "--set", "eval_rows=0", "--set", "save_every=5000"]
    arguments = ["tune", reviews, "--model", llama_folder, "--out", tmp_path / "run", "--ensemble", 2, *settings]
    done = interrupted_command(command, 2, signal.SIGTERM, *arguments)
    assert done.code == 143
    assert done.err.count("stopped; the same command with --resume goes on from here") == 1
    assert [path.parent.parent.name for path in tmp_path.rglob("step-*")] == ["member-1"]
    done = command(*arguments, "--resume", "--json")
    assert done.code == 0
    assert "resuming after step 3" in done.err
    assert done.record["steps"] == 12


def test_compare_command_that_is_terminated_has_a_report_and_goes_on(
    command: Command, llama_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    settings = ["--set", "max_steps=20", "--equal", "examples", "--no-search"]
    arguments = ["compare", reviews, "--model", llama_folder, "--out", tmp_path / "out", *settings]
    methods = ["--methods", "zero-shot,prompt-tuning"]
    done = interrupted_command(command, 4, signal.SIGTERM, *arguments, *methods)
    assert (done.code, done.out) == (143, "")
    assert done.err.count("stopped; the same command goes on with the method that was interrupted") == 1
    assert [path.name for path in (tmp_path / "out" / "results").iterdir()] == ["zero-shot-0.json"]
    assert (tmp_path / "out" / "report.html").exists()
    done = command(*arguments, "--methods", "zero-shot", "--json")
    assert (done.code, len(done.record["results"])) == (0, 1)


@pytest.mark.parametrize("verb", ["check", "evaluate"])
def test_a_verb_that_saves_nothing_ends_at_once(
    verb: str, command: Command, llama_folder: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "softprompt.training.prepare.prepare_run" if verb == "check" else "softprompt.evaluation.evaluate.evaluate"
    monkeypatch.setattr(place, Mock(side_effect=lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)))
    before = sorted(tmp_path.rglob("*"))
    done = command(*(["evaluate", "none"] if verb == "evaluate" else ["check"]), reviews, "--model", llama_folder)
    assert (done.code, done.out) == (143, "")
    assert done.err.strip().splitlines()[-1] == "terminated"
    assert sorted(tmp_path.rglob("*")) == before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# Imports once, and forks for every case: the child is the script, in a folder of its own.
_SCRIPT = """
import os, signal, sys
import transformers.models.llama.modeling_llama
import softprompt as sp
from softprompt.model import load
from softprompt.training import tune

class Ended(sp.Callback):
    def step(self, step, loss):
        if step == 3:
            signal.raise_signal(number)

model_folder, data, *folders = sys.argv[1:]
for folder in folders:
    if os.fork() == 0:
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()

os.chdir(folder)
sys.stdout = open("stdout", "w", buffering=1)
name, _, ending = folder.partition("-")
number = getattr(signal, f"SIG{name}")
handlers = {
    "": signal.SIG_DFL, "ignored": signal.SIG_IGN, "exits": lambda *_: sys.exit(7), "handled": lambda *_: print("noted")
}
signal.signal(number, handlers[ending])
config = sp.TuneConfig(max_steps=6, batch_size=4, eval_rows=0, save_every=100)
try:
    sp.tune(sp.load_model(model_folder), sp.load_data(data), config, out="run", callback=Ended())
    print("went on")
finally:
    print("unwound")
"""
# Each case with its exit code, what it prints, and the step that is saved.
ENDINGS = {
    "TERM": (-signal.SIGTERM, "", 3),  # ended by it, as without us
    "HUP": (-signal.SIGHUP, "", 3),
    "TERM-exits": (7, "unwound\n", 3),
    "TERM-handled": (0, "noted\nwent on\nunwound\n", 6),
    "HUP-ignored": (0, "went on\nunwound\n", 6),  # nohup
}


def test_script_that_gets_a_signal_in_tune_saves_and_ends_as_it_would_without_tune(
    llama_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    for name in ENDINGS:
        (tmp_path / name).mkdir()
    script = [sys.executable, "-c", _SCRIPT, str(llama_folder), str(reviews), *ENDINGS]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for (name, (code, out, step)), returned in zip(ENDINGS.items(), done.stdout.split(), strict=True):
        found = int(returned), (tmp_path / name / "stdout").read_text()
        assert found == (code, out), (name, done.stderr)
        assert [path.name for path in (tmp_path / name / "run" / "state").iterdir()] == [f"step-{step}"], name
        assert not (tmp_path / name / "run" / ".lock").exists(), name


def test_in_another_thread_signals_are_left_as_they_are(llama: FrozenModel, reviews: Path) -> None:
    seen = []

    class Looking(Callback):
        def step(self, step: int, loss: float) -> None:
            seen.append((signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)))

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=tune, args=(llama, load_data(reviews), short()), kwargs={"callback": Looking()})
    thread.start()
    thread.join()
    assert set(seen) == {before}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_waits_for_the_end_of_the_block(number: int) -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), raise_on_termination(), defer_signals():
        os.kill(os.getpid(), number)
        done.append("the rest")
    assert done == ["the rest"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_stop_is_not_lost_where_the_block_fails() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, defer_signals():
        interrupt()
        raise RunError("the disk is full")
    assert isinstance(caught.value.__context__, RunError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_every_stop_that_waited_is_told() -> None:
    told = []
    with ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGHUP):
            before = signal.signal(number, lambda caught, _: told.append(caught))
            stack.callback(signal.signal, number, before)
        with pytest.raises(KeyboardInterrupt), defer_signals():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(os.getpid(), number)
    assert sorted(told) == sorted((signal.SIGTERM, signal.SIGHUP))


def test_a_step_that_fails_while_a_stop_waits_is_not_saved_by_half(
    llama: FrozenModel, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = load_data(reviews)
    tune(llama, rows, short(save_every=2), out=tmp_path / "whole")
    step, calls = torch.optim.AdamW.step, iter(range(100))

    def failing(self: torch.optim.AdamW) -> None:
        step(self)
        if next(calls) == 3:
            interrupt()
            raise RunError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", failing)
        with pytest.raises(KeyboardInterrupt):
            tune(llama, rows, short(save_every=2), out=tmp_path / "cut")
    assert [path.name for path in (tmp_path / "cut" / "state").iterdir()] == ["step-2"]
    tune(llama, rows, None, out=tmp_path / "cut", resume=True)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_second_stop_while_the_state_is_written_waits_for_it(
    llama: FrozenModel, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = RunLog.save

    def again(self: RunLog, state: Checkpoint) -> None:
        interrupt()
        saved(self, state)
        interrupt()

    monkeypatch.setattr(RunLog, "save", again)
    monkeypatch.setattr(prompt_trainer, "prompt_gradient", once(prompt_trainer.prompt_gradient, 3))
    with pytest.raises(KeyboardInterrupt):
        tune(llama, load_data(reviews), short(), out=tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "state").iterdir()] == ["step-3"]


class Sizes(Callback):
    """Notes what was run at once."""

    def __init__(self) -> None:
        self.at_first = 0
        self.seen: list[tuple[int, int]] = []

    def begin(self, prepared: PreparedRun, step: int) -> None:
        assert prepared.config.micro_batch_tokens
        self.at_first = prepared.config.micro_batch_tokens

    def micro_batch_reduced(self, step: int, micro_batch_tokens: int) -> None:
        self.seen.append((step, micro_batch_tokens))


def little_memory(right: Callable[..., Any], fits: int) -> Callable[..., Any]:
    """A gradient that fails where more than so many tokens are run at once."""

    def wrapped(model: FrozenModel, prompt: torch.Tensor, text: object, parts: list[list[Any]], *rest: Any) -> Any:
        if any(sum(len(example.ids) for example in part) > fits for part in parts):
            raise RuntimeError(OUT_OF_MEMORY)
        return right(model, prompt, text, parts, *rest)

    return wrapped


def test_where_memory_runs_out_less_is_run_at_once_and_the_result_is_the_same(
    llama: FrozenModel, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = load_data(reviews)
    whole = tune(llama, rows, short(), out=tmp_path / "whole").prompt.weights
    callback = Sizes()
    with monkeypatch.context() as patch:
        patch.setattr(prompt_trainer, "prompt_gradient", little_memory(prompt_trainer.prompt_gradient, 25))
        squeezed = tune(llama, rows, short(), out=tmp_path / "squeezed", callback=callback).prompt.weights
    assert callback.seen
    assert all(step == 1 for step, _ in callback.seen)  # found once, and used from then on
    assert [tokens for _, tokens in callback.seen] == [callback.at_first >> n for n in range(1, len(callback.seen) + 1)]
    torch.testing.assert_close(squeezed, whole, atol=1e-4, rtol=1e-4)
    state = json.loads((tmp_path / "squeezed" / "state" / "step-6" / "state.json").read_text())
    assert state["micro_batch_tokens"] == callback.seen[-1][1]


def test_a_run_that_went_on_with_less_memory_is_resumed_with_less(
    llama: FrozenModel, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, config = load_data(reviews), short(save_every=3, eval_rows=0)
    monkeypatch.setattr(prompt_trainer, "prompt_gradient", little_memory(prompt_trainer.prompt_gradient, 25))
    tune(llama, rows, config, out=tmp_path / "run")
    newest = tmp_path / "run" / "state" / "step-6"
    for file in newest.iterdir():
        file.unlink()
    callback = Sizes()
    tune(llama, rows, None, out=tmp_path / "run", resume=True, callback=callback)
    assert callback.seen == []


def test_where_one_row_does_not_fit_the_run_says_what_to_try(
    llama: FrozenModel, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_trainer, "prompt_gradient", little_memory(prompt_trainer.prompt_gradient, 3))
    with pytest.raises(RunError, match=r"out of memory at one row of \d+ tokens .*--set max_length"):
        tune(llama, load_data(reviews), short(), out=tmp_path / "run")


def test_tune_does_not_take_another_error_for_a_lack_of_memory(
    llama: FrozenModel, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(prompt_trainer, "prompt_gradient", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        tune(llama, load_data(reviews), short())


def fits_in_scoring(right: Callable[..., Any], fits: int) -> Callable[..., Any]:
    """Scoring that fails where more than so many rows are run at once."""

    def wrapped(backend: Backend, prefixes: list[Any], choices: list[Any]) -> Any:
        if len(choices) > fits:
            raise RuntimeError(OUT_OF_MEMORY)
        return right(backend, prefixes, choices)

    return wrapped


def test_rows_are_scored_with_less_at_once_where_memory_runs_out(
    llama: FrozenModel, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = load_data(reviews)
    whole = evaluate(llama, rows).metrics
    with monkeypatch.context() as patch:
        patch.setattr(Backend, "score", fits_in_scoring(Backend.score, 2))
        squeezed = evaluate(llama, rows).metrics
    assert squeezed["accuracy"] == whole["accuracy"]
    assert squeezed["loss"].value == pytest.approx(whole["loss"].value)
    monkeypatch.setattr(Backend, "score", fits_in_scoring(Backend.score, 0))
    with pytest.raises(RunError, match="out of memory at scoring one row"):
        evaluate(llama, rows)


def falling_until(step: int) -> Callable[..., Any]:
    """Scores whose loss falls until a step and rises afterwards; one call an evaluation."""
    calls = iter(range(1000))

    def score(self: LabelScorer, model: FrozenModel, prompt: SoftPrompt) -> Any:
        number = next(calls)
        (made,) = self.score_members(model, prompt)
        made.losses[:] = abs(step - number) + 1.0
        return made

    return score


@pytest.mark.parametrize("patience", [1, 3])
def test_a_run_ends_when_the_loss_has_not_fallen_for_so_many_evaluations(
    patience: int, llama: FrozenModel, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = load_data(reviews)
    config = short(max_steps=100, eval_every=1, patience=patience)
    with monkeypatch.context() as patch:
        patch.setattr(LabelScorer, "score", falling_until(4))
        result = tune(llama, rows, config, out=tmp_path / "run")
    assert (result.steps, result.best_step) == (4 + patience, 4)
    # A run that has ended so stays ended.
    assert tune(llama, rows, None, out=tmp_path / "run", resume=True).steps == 4 + patience


def test_without_validation_rows_patience_ends_nothing(llama: FrozenModel, reviews: Path) -> None:
    assert tune(llama, load_data(reviews), short(patience=1, eval_every=1, eval_rows=0)).steps == 6


def test_a_state_with_metrics_that_are_not_finite_is_read_again(
    llama: FrozenModel, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss beyond all numbers, of half precision say, is no reason to begin anew."""

    def beyond(scores: Scores, _rows: object = None) -> float:
        return math.inf

    monkeypatch.setattr(Scores, "loss", beyond)
    rows = load_data(reviews)
    tune(llama, rows, short(save_every=2), out=tmp_path / "run")
    for file in (tmp_path / "run" / "state" / "step-6").iterdir():
        file.unlink()
    begun = Mock(spec=Callback)
    tune(llama, rows, None, out=tmp_path / "run", resume=True, callback=begun)
    assert begun.begin.call_args.args[1] == 4
    for file in (tmp_path / "run" / "state").glob("step-*/state.json"):
        file.write_text("{")
    with pytest.warns(UserWarning, match="no state in .* can be read; the run begins at its first step"):
        tune(llama, rows, None, out=tmp_path / "run", resume=True, callback=begun)
    assert begun.begin.call_args.args[1] == 0
