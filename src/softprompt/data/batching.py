"""Batches: which examples a step takes, and how they are dealt to processes and cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from softprompt.data.example import Example


def batch_indices(rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Return the rows of a step (counted from 0): every row once before any row again, in a new order each time.

    It depends on nothing but its arguments, so that a resumed run needs no saved random state.
    """
    first, last = step * batch_size, (step + 1) * batch_size
    return [int(_order(rows, seed, place // rows)[place % rows]) for place in range(first, last)]


def indices_seen(rows: int, batch_size: int, steps: int, seed: int) -> NDArray[np.int64]:
    """Return the rows that so many steps take, in ascending order."""
    total = batch_size * steps
    return np.arange(rows) if total >= rows else np.sort(_order(rows, seed, 0)[:total])


@lru_cache(maxsize=2)  # a step's rows are of one pass, or of two that follow each other
def _order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def shard_by_length(examples: Sequence[Example], ranks: int) -> list[list[int]]:
    """Deal a batch, the longest first and to and fro, so that all hands get about as many tokens.

    Returns:
        For each hand, rising indices into `examples`.
    """
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].ids), i))
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for place, index in enumerate(order):
        turn, seat = divmod(place, ranks)
        dealt[seat if turn % 2 == 0 else ranks - 1 - seat].append(index)
    return [sorted(rank) for rank in dealt]


def micro_batches(
    examples: Sequence[Example], budget: int, shared_text_len: int = 0, padded: bool = False
) -> list[list[int]]:
    """Cut a batch, ordered by length, into runs of at most `budget` tokens each.

    Args:
        examples: the batch.
        budget: text tokens that are run at once; a single longer example is run alone.
        shared_text_len: tokens of each example that the prefix already holds.
        padded: every text counts as long as the run's longest.

    Returns:
        Indices into `examples`.
    """
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].ids), i))
    cut: list[list[int]] = []
    total = 0
    for index in order:
        length = len(examples[index].ids) - shared_text_len  # lengths only rise
        total = (len(cut[-1]) + 1) * length if cut and padded else total + length
        if not cut or total > budget:
            cut.append([])
            total = length
        cut[-1].append(index)
    return cut
