"""Training cases: a step of every side in turn, and the memory of each."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import softprompt as sp
from arithmetic import bound, needed_seconds
from sides import Peft, Rounds, Softprompt, load, ratio, trainer
from softprompt.data.batching import batch_indices
from softprompt.data.example import Example
from softprompt.training.prepare import PreparedRun, prepare_data, prepare_run

LOSSES_AGREE, GRADIENTS_AGREE = 1e-3, 1e-4


@dataclass(frozen=True)
class Case:
    """A training case.

    Attributes:
        model: `smollm2` or `bloom`, the latter with bloomz-560m's shape, random weights and SmolLM2's tokenizer.
        rows: reads the training rows from the folder of data sets.
        faster: by at least this factor than PEFT in a plain loop.
        memory: at most this share of PEFT's peak above the loaded model; None where it is only reported.
    """

    model: str
    rows: Callable[[Path], sp.Rows]
    batch_size: int
    num_virtual_tokens: int
    faster: float
    memory: float | None = None


def sst2(data: Path) -> sp.Rows:
    """Film reviews; the loss is over the label."""
    return sp.load_data(data / "sst2/train.jsonl")


def prompts(data: Path) -> sp.Rows:
    """The tutorial's rows; the loss is over all tokens."""
    return sp.load_data(f"{data}/awesome-chatgpt-prompts/prompts.csv[:50]", {"text": "prompt"})


def e2e(data: Path) -> sp.Rows:
    """Restaurants; the loss is over the sentence to write."""
    return sp.load_data(data / "e2e/train.jsonl")


CASES = {
    "A1": Case("smollm2", sst2, 32, 20, 2.5),
    "A2": Case("smollm2", sst2, 32, 100, 6, 0.25),
    "B1": Case("bloom", sst2, 16, 20, 3),
    "B2": Case("bloom", sst2, 16, 100, 6.5, 0.25),
    "C": Case("bloom", prompts, 8, 4, 1.15, 0.5),
    "D": Case("smollm2", e2e, 32, 20, 1.7),
}


def plan_of(case: Case, model: sp.FrozenModel, data: Path, steps: int) -> PreparedRun:
    """Return the prepared run; all sides take rows, ids and the initial prompt from it."""
    settings = sp.TuneConfig(
        num_virtual_tokens=case.num_virtual_tokens,
        batch_size=case.batch_size,
        max_steps=steps,
        eval_rows=0,
        warmup_ratio=0,
        schedule="constant",
    )
    return prepare_run(prepare_data(model, case.rows(data), settings), settings)


def measure(name: str, data: Path, repeats: int) -> dict[str, Any]:
    """Run a case and return its figures; the first step warms up and is not counted."""
    case = CASES[name]
    # First, while this process is small: PEFT's side of B2 takes most of 24 GB.
    memory = {side: round(peak(name, side, data), 2) for side in ("softprompt", "peft")}
    model = load(case.model)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        prepared = plan_of(case, model, data, 1 + repeats)
        batches = [batch_of(prepared, step) for step in range(1 + repeats)]
        ours, theirs = Softprompt(model, prepared, scratch), Peft(model.hf_model, prepared)
        seconds: dict[str, list[float]] = {"softprompt": [], "peft": [], "needed": []}
        losses: dict[str, list[float]] = {"softprompt": [], "peft": []}
        gradients: list[float] = []

        def one_round(step: int) -> None:
            model.hf_model.eval()  # the Trainer puts it in training mode
            for label, side in (("softprompt", ours), ("peft", theirs)):
                began = time.perf_counter()
                losses[label].append(side.step(batches[step]))
                seconds[label].append(time.perf_counter() - began)
            seconds["needed"].append(needed_seconds(model, prepared, batches[step]))
            gradients.append(float((ours.gradient() - theirs.gradient()).norm() / theirs.gradient().norm()))

        rounds = Rounds(one_round)
        tutorial = trainer(model.hf_model, prepared, batches, scratch / "trainer")
        tutorial.add_callback(rounds)
        tutorial.train()
    # The Trainer divides by the labels behind the first column, though PEFT learns the first too.
    counted = [sum(min(e.targets, len(e.ids) - 1) for e in b) / sum(e.targets for e in b) for b in batches]
    losses["trainer"] = [loss * share for loss, share in zip(rounds.losses, counted, strict=False)]
    seconds["trainer"] = rounds.seconds
    apart = max(
        abs(a - b) / abs(b)
        for side in ("peft", "trainer")
        for a, b in zip(losses["softprompt"], losses[side], strict=True)
    )
    if apart > LOSSES_AGREE or gradients[0] > GRADIENTS_AGREE:
        raise SystemExit(f"{name}: losses differ by {apart:.1e}, gradients by {gradients[0]:.1e}: {losses}")
    times = {side: each[1:] for side, each in seconds.items()}
    return {
        "settings": {"batch_size": case.batch_size, "num_virtual_tokens": case.num_virtual_tokens},
        "micro_batch_tokens": ours.loop.state.micro_batch_tokens,
        "seconds": {side: [round(s, 3) for s in each] for side, each in times.items()},
        "faster": ratio(times["peft"], times["softprompt"]),
        "faster_than_trainer": ratio(times["trainer"], times["softprompt"]),
        "bound": statistics.mean(bound(model, prepared, batch) for batch in batches[1:]),
        "over_needed": ratio(times["softprompt"], times["needed"]),
        "losses_differ": apart,
        "gradients_differ": gradients[0],
        "memory_gigabytes": memory,
    }


def batch_of(prepared: PreparedRun, step: int) -> list[Example]:
    """Return a step's examples, as the loop draws them."""
    assert prepared.config.batch_size
    return [
        prepared.examples[i]
        for i in batch_indices(len(prepared.examples), prepared.config.batch_size, step, prepared.config.seed)
    ]


def peak(name: str, side: str, data: Path) -> float:
    """Return the gigabytes that two steps of one side take above the loaded model, at most."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("speed.py")),
        "--data",
        str(data),
        "--memory-of",
        side,
        name,
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def memory_of(name: str, side: str, data: Path) -> float:
    """Take two steps in this process, and return the peak of its memory above the loaded model, in gigabytes."""
    case = CASES[name]
    model = load(case.model)
    prepared = plan_of(case, model, data, 2)
    with tempfile.TemporaryDirectory() as folder:
        loaded = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        chosen = Softprompt(model, prepared, Path(folder)) if side == "softprompt" else Peft(model.hf_model, prepared)
        for step in range(2):
            chosen.step(batch_of(prepared, step))
    return (resident("VmHWM") - loaded) / 1e9


def resident(which: str) -> int:
    """Return the bytes of this process that lie in memory, now (VmRSS) or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))
