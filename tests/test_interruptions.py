"""What stops or squeezes a run: Ctrl-C, memory that runs out, patience. Going on gives what an easy run gives."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from softprompt import Rows, TuneConfig, Watcher, evaluate, load_data, tune
from softprompt.errors import RunError
from softprompt.evaluation.scoring import LabelScorer, Scores
from softprompt.model.frozen import FrozenModel
from softprompt.training import prompt_loop
from softprompt.signals import interrupts_deferred
from softprompt.training.plan import Plan
from softprompt.training.run_folder import RunFolder, State

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


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def once(right: Callable[..., Any], at: int, before: bool = True) -> Callable[..., Any]:
    """A function that presses Ctrl-C in its call number `at`."""
    calls = iter(range(10_000))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        now = next(calls) == at
        if now and before:
            interrupt()
        result = right(*args, **kwargs)
        if now and not before:
            interrupt()
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
def test_a_run_that_was_interrupted_anywhere_ends_as_one_that_was_not(
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
        "gradient": (prompt_loop, "prompt_gradient"),
        "optimizer": (torch.optim.AdamW, "step"),
        "log": (RunFolder, "log"),
        "evaluation": (LabelScorer, "_score"),
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


def test_an_interrupted_save_leaves_the_state_before(
    llama: FrozenModel, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = load_data(reviews)
    tune(llama, rows, short(save_every=2), out=tmp_path / "whole")
    saved = RunFolder.save_state

    def pulled(self: RunFolder, state: State) -> None:
        if state.progress.step >= 4:  # the second save, and the one that Ctrl-C asks for
            raise KeyboardInterrupt
        saved(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_state", pulled)
        with pytest.raises(KeyboardInterrupt):
            tune(llama, rows, short(save_every=2), out=tmp_path / "cut")
    assert [folder.name for folder in (tmp_path / "cut" / "state").iterdir()] == ["step-2"]
    tune(llama, rows, None, out=tmp_path / "cut", resume=True)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_the_command_says_how_to_go_on(llama_folder: Path, reviews: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from softprompt.cli.main import main; main()"]
    command += ["tune", str(reviews), "--model", str(llama_folder), "--out", str(tmp_path / "run")]
    command += ["--set", "max_steps=5000", "--set", "eval_rows=0", "--set", "save_every=5000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:  # the log says how far it is: no clock
            said.append(line)
            if line.startswith("step 500/5000"):
                process.send_signal(signal.SIGINT)
    text = "".join(said)
    assert process.returncode == 130
    assert "stopped; the same command with --resume goes on from here" in text
    assert "Traceback" not in text
    assert len(list((tmp_path / "run" / "state").glob("step-*"))) == 1


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_deferred():
        interrupt()
        done.append("the rest")
    assert done == ["the rest"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Sizes(Watcher):
    """Notes what was run at once."""

    def __init__(self) -> None:
        self.planned = 0
        self.seen: list[tuple[int, int]] = []

    def begin(self, plan: Plan, step: int) -> None:
        assert plan.config.micro_batch_tokens
        self.planned = plan.config.micro_batch_tokens

    def smaller(self, step: int, micro_batch_tokens: int) -> None:
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
    watcher = Sizes()
    with monkeypatch.context() as patch:
        patch.setattr(prompt_loop, "prompt_gradient", little_memory(prompt_loop.prompt_gradient, 25))
        squeezed = tune(llama, rows, short(), out=tmp_path / "squeezed", watcher=watcher).prompt.weights
    assert watcher.seen
    assert all(step == 1 for step, _ in watcher.seen)  # found once, kept afterwards
    assert [tokens for _, tokens in watcher.seen] == [watcher.planned >> n for n in range(1, len(watcher.seen) + 1)]
    torch.testing.assert_close(squeezed, whole, atol=1e-4, rtol=1e-4)
    state = json.loads((tmp_path / "squeezed" / "state" / "step-6" / "state.json").read_text())
    assert state["micro_batch_tokens"] == watcher.seen[-1][1]


def test_a_run_that_went_on_with_less_memory_is_resumed_with_less(
    llama: FrozenModel, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, config = load_data(reviews), short(save_every=3, eval_rows=0)
    monkeypatch.setattr(prompt_loop, "prompt_gradient", little_memory(prompt_loop.prompt_gradient, 25))
    tune(llama, rows, config, out=tmp_path / "run")
    newest = tmp_path / "run" / "state" / "step-6"
    for file in newest.iterdir():
        file.unlink()
    watcher = Sizes()
    tune(llama, rows, None, out=tmp_path / "run", resume=True, watcher=watcher)
    assert watcher.seen == []


def test_where_one_row_does_not_fit_the_run_says_what_to_try(
    llama: FrozenModel, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_loop, "prompt_gradient", little_memory(prompt_loop.prompt_gradient, 3))
    with pytest.raises(RunError, match=r"out of memory at one row of \d+ tokens .*--set max_length"):
        tune(llama, load_data(reviews), short(), out=tmp_path / "run")


def test_any_other_error_is_not_taken_for_a_lack_of_memory(
    llama: FrozenModel, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(prompt_loop, "prompt_gradient", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        tune(llama, load_data(reviews), short())


def fits_in_scoring(right: Callable[..., Scores], fits: int) -> Callable[..., Scores]:
    def wrapped(self: LabelScorer, *args: Any) -> Scores:
        if self.at_once > fits:
            raise RuntimeError(OUT_OF_MEMORY)
        return right(self, *args)

    return wrapped


def test_rows_are_scored_with_less_at_once_where_memory_runs_out(
    llama: FrozenModel, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = load_data(reviews)
    whole = evaluate(llama, rows).metrics
    with monkeypatch.context() as patch:
        patch.setattr(LabelScorer, "_score", fits_in_scoring(LabelScorer._score, 40))
        squeezed = evaluate(llama, rows).metrics
    assert squeezed["accuracy"] == whole["accuracy"]
    assert squeezed["loss"].value == pytest.approx(whole["loss"].value)
    monkeypatch.setattr(LabelScorer, "_score", fits_in_scoring(LabelScorer._score, 0))
    with pytest.raises(RunError, match="out of memory at scoring one row"):
        evaluate(llama, rows)


def falling_until(step: int, rows: Rows) -> Callable[..., Any]:
    """Scores whose loss falls until a step and rises afterwards; one call an evaluation."""
    calls = iter(range(1000))

    def score(self: LabelScorer, model: FrozenModel, prompt: object) -> Any:
        number = next(calls)
        (made,) = LabelScorer._score(self, model, [prompt])  # type: ignore[list-item]
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
        patch.setattr(LabelScorer, "score", falling_until(4, rows))
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
    begun = Mock(spec=Watcher)
    tune(llama, rows, None, out=tmp_path / "run", resume=True, watcher=begun)
    assert begun.begin.call_args.args[1] == 4
    for file in (tmp_path / "run" / "state").glob("step-*/state.json"):
        file.write_text("{")
    with pytest.warns(UserWarning, match="no state in .* can be read; the run begins at its first step"):
        tune(llama, rows, None, out=tmp_path / "run", resume=True, watcher=begun)
    assert begun.begin.call_args.args[1] == 0
