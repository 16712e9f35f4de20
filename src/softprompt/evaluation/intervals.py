"""Metrics with 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

_RESAMPLES = 1000


class Metric(BaseModel):
    """A figure and its 95 % interval over the rows."""

    value: float
    low: float
    high: float


def proportion(right: NDArray[np.bool_]) -> Metric:
    """Return a share of rows with Wilson's interval (Wilson 1927)."""
    from scipy.stats import binomtest  # here, because it takes a quarter of a second

    interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return Metric(value=float(right.mean()), low=float(interval.low), high=float(interval.high))


def bootstrap(statistic: Callable[[NDArray[np.int64]], float], rows: int, resamples: int = _RESAMPLES) -> Metric:
    """Return a statistic with the percentile interval of a bootstrap over rows (Efron 1979).

    Args:
        statistic: computes the figure from row indices, some of which occur repeatedly.
        rows: how many rows there are.
        resamples: how often they are drawn.
    """
    generator = np.random.default_rng(0)
    drawn = [statistic(generator.integers(rows, size=rows)) for _ in range(resamples)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Metric(value=statistic(np.arange(rows)), low=float(low), high=float(high))
