"""The split into training and validation rows, and stratified samples."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from softprompt.data.rows import Row, Rows
from softprompt.errors import DataError

_MAX_SHARE = 0.2  # of the rows, for validation
_MIN_ROWS = 5
_CURE = "give --eval-data, or --set eval_rows=0 to keep the last prompt"


def split_rows(data: Rows, eval_data: Rows | None, eval_rows: int, seed: int) -> tuple[Rows, Rows | None]:
    """Return training and validation rows.

    Args:
        eval_data: validation rows; None to split some off `data`, a fifth at most. Rows with the same input stay
            on one side.
        eval_rows: the most validation rows, stratified by label; 0 for none.

    Raises:
        DataError: the two are for different tasks, or there are too few rows to hold any out.
    """
    if eval_data is not None and eval_data.task != data.task:
        raise DataError(f"{eval_data.name} is for {eval_data.task}, {data.name} for {data.task}; use the same columns")
    if eval_rows == 0:
        return data, None
    if eval_data is not None:
        return data, sample(eval_data, eval_rows, seed)
    size = min(eval_rows, int(len(data) * _MAX_SHARE))
    if size < min(eval_rows, _MIN_ROWS):
        raise DataError(f"{data.name} has {len(data)} rows, too few to hold any out for validation; {_CURE}")
    generator = np.random.default_rng(seed)
    keys = _row_keys(data)
    groups = _number_groups(keys["input"])
    chosen = _sample_stratified(keys["label"], groups, size, generator)
    if not chosen.any():
        raise DataError(
            f"{data.name} has {groups.max() + 1} different inputs, each in too many rows to hold any out for "
            f"validation; {_CURE}"
        )
    return _subset(data, ~chosen), _subset(data, chosen)


def sample(data: Rows, rows: int | None, seed: int) -> Rows:
    """Return at most so many rows, stratified by label, in their original order; None for all."""
    if rows is None or rows >= len(data):
        return data
    labels = _row_keys(data)["label"]
    return _subset(data, _sample_stratified(labels, np.arange(len(data)), rows, np.random.default_rng(seed)))


def interleave_labels(rows: Sequence[Row], order: Sequence[int]) -> list[int]:
    """Reorder the row indices in `order`: first one row of each label, then a second one of each, and so on."""
    seen: Counter[str] = Counter()
    rank = {}
    for i in order:
        rank[i] = seen[rows[i]["label"]]
        seen[rows[i]["label"]] += 1
    return sorted(order, key=rank.__getitem__)


def count_duplicates(train: Rows, validation: Rows) -> int:
    """Count the validation rows whose input occurs in a training row too: on those a prompt looks too good."""
    inputs = {validation.normalized_input(row) for row in validation}
    in_both = {text for row in train if (text := train.normalized_input(row)) in inputs}
    return sum(validation.normalized_input(row) in in_both for row in validation)


def _row_keys(data: Rows) -> NDArray[np.void]:
    """Return, for each row, a hash of its input and a number for its label."""
    numbers: dict[str, int] = {}

    def keys() -> Iterator[tuple[int, int]]:
        for row in data:
            text = data.normalized_input(row).encode()
            label = row["label"] if data.task == "classification" else ""
            # 64 bits: among a million inputs, two have the same hash with a probability of 3e-8.
            digest = hashlib.blake2b(text, digest_size=8).digest()
            yield int.from_bytes(digest, "little"), numbers.setdefault(label, len(numbers))

    return np.fromiter(keys(), [("input", np.uint64), ("label", np.int64)], len(data))


def _subset(data: Rows, chosen: NDArray[np.bool_]) -> Rows:
    """Return some of the rows; labels that only the other rows have stay known."""
    return replace(data.pick(np.flatnonzero(chosen)), known_labels=tuple(data.labels))


def _number_groups(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Number the distinct keys from 0, in the order in which they first occur."""
    _, first, number = np.unique(keys, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number]


def _sample_stratified(
    labels: NDArray[np.int64], groups: NDArray[np.int64], size: int, generator: np.random.Generator
) -> NDArray[np.bool_]:
    """Tell which rows to choose: whole groups, so that every label that is not rare keeps its share.

    Args:
        labels: of the rows; a group counts for the label of its first row.
        groups: of the rows, numbered in the order of their first rows.
    """
    _, first, sizes = np.unique(groups, return_index=True, return_counts=True)
    order = generator.permutation(len(first))
    label = labels[first[order]]
    # The position of each group within its label, as a share: the smallest shares are spread evenly over all labels.
    counts = np.bincount(label)
    together = np.argsort(label, kind="stable")
    place = np.empty(len(order))
    place[together] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    shares = (place + 0.5) / counts[label]
    chosen = np.zeros(len(first), np.bool_)
    for group in order[np.lexsort((order, shares))]:
        if sizes[group] <= size:
            chosen[group] = True
            size -= sizes[group]
        if not size:
            break
    return chosen[groups]
