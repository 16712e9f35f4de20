"""Figures of the quality benchmark's runs, and paired differences between two methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from origins import Runs
from softprompt.comparison.results import Result
from softprompt.evaluation.primary_metric import compute_metric

_RESAMPLES = 2000


def points(results: Sequence[Result]) -> float:
    """Return a method's figure on a set, 0 to 100, the mean over its seeds."""
    return _points(results)(slice(None))


def _points(results: Sequence[Result]) -> Callable[[np.ndarray | slice], float]:
    """Return a function that computes the figure from row indices."""
    metric, statistics = results[0].ranking, [np.array(r.statistics) for r in results]
    scale = 100.0 if metric == "accuracy" else 1.0
    return lambda drawn: (
        scale * float(np.mean([compute_metric(metric, rows[drawn].sum(axis=0)) for rows in statistics]))
    )


def differences(runs: Runs, first: str, second: str, sets: Sequence[str]) -> tuple[float, float, float, list[str]]:
    """Compare two methods by a paired bootstrap over each set's test rows (Koehn 2004), and in the mean over the sets.

    Returns:
        The mean difference in points with its 95 % interval, and the sets that both were run on.
    """
    there = [name for name in sets if first in runs[name] and second in runs[name]]
    pairs = [(_points(runs[name][first]), _points(runs[name][second])) for name in there]
    counts = [len(runs[name][first][0].statistics) for name in there]
    generator = np.random.default_rng(0)
    found = []
    for draw in range(_RESAMPLES + 1):
        each = []
        for (one, two), rows in zip(pairs, counts, strict=True):
            drawn = generator.integers(rows, size=rows) if draw else np.arange(rows)
            each.append(one(drawn) - two(drawn))
        found.append(float(np.mean(each)) if each else float("nan"))
    low, high = np.percentile(found[1:], [2.5, 97.5]) if there else (float("nan"), float("nan"))
    return found[0], float(low), float(high), there
