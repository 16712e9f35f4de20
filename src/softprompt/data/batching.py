"""The rows of each step, their distribution over processes, and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from softprompt.data.example import Example


def batch_indices(rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Return the rows of a step (counted from 0): every row once per epoch, in a new random order in each.

    The result depends only on the arguments, so that a resumed run needs no random state.
    """
    first, last = step * batch_size, (step + 1) * batch_size
    return [int(_order(rows, seed, position // rows)[position % rows]) for position in range(first, last)]


def indices_seen(rows: int, batch_size: int, steps: int, seed: int) -> NDArray[np.int64]:
    """Return the rows of the first `steps` steps, in ascending order."""
    total = batch_size * steps
    return np.arange(rows) if total >= rows else np.sort(_order(rows, seed, 0)[:total])


@lru_cache(maxsize=2)  # a step's rows come from one epoch, or from two consecutive ones
def _order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def shard_by_length(examples: Sequence[Example], ranks: int) -> list[list[int]]:
    """Return ascending indices for each process, in snake order by length: each gets about as many tokens."""
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].ids), i))
    shards: list[list[int]] = [[] for _ in range(ranks)]
    for position, index in enumerate(order):
        turn, rank = divmod(position, ranks)
        shards[rank if turn % 2 == 0 else ranks - 1 - rank].append(index)
    return [sorted(shard) for shard in shards]


def micro_batches(
    examples: Sequence[Example], budget: int, shared_text_len: int = 0, padded: bool = False
) -> list[list[int]]:
    """Sort a batch by length and cut it into micro-batches of at most `budget` tokens.

    Args:
        budget: text tokens of a micro-batch; a longer example is a micro-batch of its own.
        shared_text_len: tokens of each example that are in the prefix already.
        padded: whether every text counts as long as the longest of its micro-batch.

    Returns:
        Indices into `examples`.
    """
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].ids), i))
    cut: list[list[int]] = []
    total = 0
    for index in order:
        length = len(examples[index].ids) - shared_text_len  # lengths ascend
        total = (len(cut[-1]) + 1) * length if cut and padded else total + length
        if not cut or total > budget:
            cut.append([])
            total = length
        cut[-1].append(index)
    return cut
