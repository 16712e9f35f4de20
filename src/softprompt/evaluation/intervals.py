"""Metrics with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

_RESAMPLES = 1000
_Z = NormalDist().inv_cdf(0.975)


class Metric(BaseModel):
    """A figure and its 95 % interval over the rows."""

    model_config = ConfigDict(ser_json_inf_nan="strings")  # infinite losses of a run that diverged

    value: float
    low: float
    high: float


def proportion(right: NDArray[np.bool_] | NDArray[np.float64]) -> Metric:
    """Return a share of rows with Wilson's interval (Wilson 1927).

    `scipy.stats.binomtest` gives the same interval, but takes whole counts only.

    Args:
        right: `[N]`, whether each row is right, or in which share of several runs it is. The interval is then that of a
            single run, which is wider.
    """
    share, rows = float(right.mean()), len(right)
    middle, spread = share + _Z**2 / (2 * rows), _Z * math.sqrt(share * (1 - share) / rows + (_Z / (2 * rows)) ** 2)
    low, high = ((middle + side * spread) / (1 + _Z**2 / rows) for side in (-1, 1))
    return Metric(value=share, low=min(max(low, 0.0), share), high=max(min(high, 1.0), share))


def bootstrap(statistic: Callable[[NDArray[np.int64]], float], rows: int, resamples: int = _RESAMPLES) -> Metric:
    """Return a statistic with the percentile interval of a bootstrap over rows (Efron 1979).

    `scipy.stats.bootstrap` would refuse a single row, and give published intervals other last digits.

    Args:
        statistic: computes the figure from row indices, some of which occur repeatedly.
    """
    generator = np.random.default_rng(0)
    resampled = [statistic(generator.integers(rows, size=rows)) for _ in range(resamples)]
    with np.errstate(invalid="ignore"):  # interpolation between infinite values gives NaN
        low, high = np.percentile(resampled, [2.5, 97.5])
    return Metric(value=statistic(np.arange(rows)), low=float(low), high=float(high))
