"""The progress of a comparison on stderr, and its table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from softprompt.cli.progress import TerminalCallback, validation_text
from softprompt.cli.tables import err, plain_table
from softprompt.comparison.methods.base import MethodCallback
from softprompt.comparison.run import ComparisonCallback
from softprompt.formatting import short_interval, short_metric, size

if TYPE_CHECKING:
    from softprompt.comparison.protocol import Protocol
    from softprompt.comparison.results import Result

_NO_TRAINING_SECONDS = 30.0  # about what a method without training takes


class TerminalMethod(TerminalCallback, MethodCallback):
    """Shows a method's progress, and each few-shot prompt that scores best so far."""

    def demonstrations(self, number: int, values: dict[str, float], spent: float) -> None:
        shown = "1 example" if number == 1 else f"{number} examples"
        err.print(f"best: {shown}, {validation_text(values)}; {min(spent, 1):.0%} of budget used")


class TerminalComparison(ComparisonCallback):
    """Shows which method runs and how much time is left."""

    def begin(self, protocol: Protocol, done: Sequence[Result], todo: Sequence[tuple[str, int]]) -> None:
        self.todo, self.protocol = list(todo), protocol
        err.print(
            f"{len(protocol.train)} training rows, {len(protocol.validation)} validation rows, "
            f"{len(protocol.test)} test rows"
        )
        if done:
            err.print(f"{len(done)} results are there already: {', '.join(f'{r.method} {r.seed}' for r in done)}")
        self.count = len(todo)

    def method(self, name: str, seed: int) -> MethodCallback:
        self.began = time.monotonic()
        left = sum(
            _NO_TRAINING_SECONDS if n == "zero-shot" else self.protocol.seconds + _NO_TRAINING_SECONDS
            for n, _ in self.todo
        )
        # With the same number of examples for all methods, the time is not known.
        about = f", about {max(1, round(left / 60))} min left" if self.protocol.equal == "time" else ""
        number = self.count - len(self.todo) + 1
        err.print(f"{name}, seed {seed}: running, {number} of {self.count}{about}")
        return TerminalMethod(None, transient=True)

    def failed(self, name: str, seed: int, reason: str) -> None:
        self.todo.remove((name, seed))
        err.print(f"{name}, seed {seed}: {reason}", markup=False)

    def result(self, result: Result) -> None:
        self.todo.remove((result.method, result.seed))
        metric = result.primary
        name = result.ranking
        err.print(
            f"{result.method}, seed {result.seed}: {name} {short_metric(name, metric.value)} "
            f"{short_interval(name, metric.low, metric.high)} "
            f"after {time.monotonic() - self.began:.0f} s"
        )


def comparison_table(results: Sequence[Result]) -> Table:
    """Return a table of methods: the mean over the seeds of each."""
    name = results[0].ranking
    rows = []
    for method in dict.fromkeys(r.method for r in results):
        mine = [r for r in results if r.method == method]
        first, costs = mine[0].primary, [r.costs for r in mine]
        values = [r.primary.value for r in mine]
        spread = (
            short_interval(name, first.low, first.high)
            if len(mine) == 1
            else f"{short_interval(name, min(values), max(values))[:-1]}, {len(mine)} seeds)"
        )
        rows.append(
            (
                method,
                f"{short_metric(name, float(np.mean(values)))} {spread}",
                f"{costs[0].trainable_parameters:,}",
                size(costs[0].stored_bytes),
                f"{np.mean([c.train_seconds for c in costs]):.0f} s",
                size(int(np.mean([c.peak_bytes for c in costs]))),
                f"{1000 * np.mean([c.prediction_seconds for c in costs]):.0f} ms",
            )
        )
    headers = ("method", name.replace("_", " "), "trainable params", "stored", "learning", "memory", "a row")
    return plain_table(headers, rows, whole=1)
