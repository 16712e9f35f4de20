"""Time the steps of every method that learns, so that `quality.py` knows how many fit into its minutes.

A few steps and an evaluation of some validation rows are timed in one thread. Before and after each of them a fixed
amount of training is timed too, and the times are divided by how much longer that takes than on the reference machine,
one core of a Zen 5. `results/quality/steps.json` has the times. With fixed numbers of steps the runs can be made on any
machine, and with more seeds; the costs in `docs/results.md` come from here.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/quality_steps.py --data FOLDER [sets] [--methods …]

Existing times are not measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean

import softprompt as sp
from quality import LEARNING, REFERENCE, SETS, STEPS, VALIDATION, Timed, rows_of, timed, work
from softprompt.comparison.costs import measure as measure_costs
from softprompt.comparison.methods.base import MethodCallback
from softprompt.comparison.protocol import Protocol
from softprompt.data.batching import batch_indices
from softprompt.data.split import sample

_STEPS = 3
_EVALUATED = 50  # validation rows; the time of more is in proportion


class Clock:
    """Measures how long something would take on the reference machine."""

    def __init__(self) -> None:
        self.model = sp.load_model(dtype="float32", device="cpu")  # its own: LoRA changes the other one
        self.before = work(self.model)
        self.paces: list[float] = []

    def __call__(self, run: Callable[[], object]) -> float:
        began = time.monotonic()
        run()
        seconds, after = time.monotonic() - began, work(self.model)
        self.paces.append((self.before + after) / 2 / REFERENCE)
        self.before = after
        return seconds / self.paces[-1]


def measure(clock: Clock, model: sp.FrozenModel, name: str, method_name: str, data: Path) -> Timed:
    """Time a method on a set."""
    gc.collect()  # the previous method's copy of the model
    train, validation, test = rows_of(name, data)
    some = sample(validation, _EVALUATED, 0)
    protocol = Protocol(model, train, some, test, sp.TuneConfig(eval_rows=len(some)), "examples", search=False)
    method = LEARNING[method_name](protocol, 0, MethodCallback())
    try:
        with measure_costs(model.device) as effort:
            began = time.monotonic()
            prepared = protocol.prepare(seed=0, learning_rate=method.default_learning_rate, **method.settings)
            preparation = time.monotonic() - began
            loop = method.trainer(prepared)
            loop.optimizer.param_groups[0]["lr"] = 0.0
            assert prepared.config.batch_size
            batches = [
                batch_indices(len(prepared.examples), prepared.config.batch_size, step, 0) for step in range(1 + _STEPS)
            ]

            def step(rows: Sequence[int]) -> None:
                loop.gradient([prepared.examples[i] for i in rows])
                loop.optimizer.step()

            clock.paces.clear()
            _, *steps = [clock(partial(step, rows)) for rows in batches]  # the first one is slower
            evaluation = clock(loop.evaluate) if prepared.scorer else 0.0
            labels = prepared.label_scorer()
            last = clock(partial(loop.evaluate, scorer=labels)) if labels else 0.0
    finally:
        method.close()
    pace = mean(clock.paces)
    return Timed(
        step=mean(steps),
        evaluation=evaluation * min(VALIDATION, len(validation)) / len(some),
        preparation=preparation / pace,
        row=evaluation / len(some),
        peak_bytes=effort.peak_bytes,
        pace=pace,
        last=last * min(VALIDATION, len(validation)) / len(some),
    )


def main() -> None:
    """Time what is requested and missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", choices=[*SETS, []], help="default: all")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the data sets")
    parser.add_argument("--methods", nargs="*", choices=list(LEARNING), default=list(LEARNING))
    options = parser.parse_args()
    model, clock = sp.load_model(dtype="float32", device="cpu"), Clock()
    for name in options.sets or SETS:
        for method in options.methods:
            if method in timed().get(name, {}):
                continue
            found = measure(clock, model, name, method, options.data)
            record = {other: {m: asdict(t) for m, t in by_method.items()} for other, by_method in timed().items()}
            record.setdefault(name, {})[method] = asdict(found)
            STEPS.parent.mkdir(parents=True, exist_ok=True)
            STEPS.write_text(json.dumps(record, indent=1) + "\n")
            print(name, method, found, found.length(method), flush=True)


if __name__ == "__main__":
    main()
