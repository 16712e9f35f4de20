"""Holding rows back: which are learned from, and which the best prompt is chosen on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from softprompt.data.rows import Row, Rows
from softprompt.errors import DataError

_SHARE = 0.2  # of the rows, at most, where no validation rows are given
_FEWEST = 5


def split_rows(data: Rows, eval_data: Rows | None, eval_rows: int, seed: int) -> tuple[Rows, Rows | None]:
    """Return training and validation rows.

    Args:
        data: rows to learn from.
        eval_data: validation rows; None to hold some of `data` back, a fifth at most. Rows with the same input stay
            on one side.
        eval_rows: the most validation rows, drawn so that every label keeps its share; 0 for none.
        seed: of the draw.

    Raises:
        DataError: the two are for different tasks, or there are too few rows to hold any back.
    """
    if eval_data is not None and eval_data.task != data.task:
        raise DataError(f"{eval_data.name} is for {eval_data.task}, {data.name} for {data.task}; use the same columns")
    if eval_rows == 0:
        return data, None
    if eval_data is not None:
        return data, sample(eval_data, eval_rows, seed)
    held = min(eval_rows, int(len(data) * _SHARE))
    if held < min(eval_rows, _FEWEST):
        raise DataError(
            f"{data.name} has {len(data)} rows, too few to hold any back for validation; give --eval-data, or "
            "--set eval_rows=0 to keep the last prompt"
        )
    generator = np.random.default_rng(seed)
    keys = _keys(data)
    units = _numbered(keys["question"])
    chosen = _stratified(keys["label"], units, held, generator)
    if not chosen.any():
        raise DataError(
            f"{data.name} has {units.max() + 1} different inputs, each in too many rows to hold any back for "
            "validation; give --eval-data, or --set eval_rows=0 to keep the last prompt"
        )
    known = tuple(data.labels)
    return _part(data, ~chosen, known), _part(data, chosen, known)


def sample(data: Rows, rows: int | None, seed: int) -> Rows:
    """Return at most so many rows, drawn so that every label keeps its share, in their old order; None for all."""
    if rows is None or rows >= len(data):
        return data
    drawn = _stratified(_keys(data)["label"], np.arange(len(data)), rows, np.random.default_rng(seed))
    return _part(data, drawn, tuple(data.labels))


def labels_in_turn(rows: Sequence[Row], order: Sequence[int]) -> list[int]:
    """Return indices of labelled rows so that a row of each label comes first, then another of each, in `order`."""
    seen: Counter[str] = Counter()
    turn = {}
    for i in order:
        turn[i] = seen[rows[i]["label"]]
        seen[rows[i]["label"]] += 1
    return sorted(order, key=turn.__getitem__)


def count_duplicates(train: Rows, validation: Rows) -> int:
    """Return how many validation rows ask what a training row asks too: on those a prompt looks better than it is."""
    asked = {validation.normalized_input(row) for row in validation}
    known = {normalized_input for row in train if (normalized_input := train.normalized_input(row)) in asked}
    return sum(validation.normalized_input(row) in known for row in validation)


def _keys(data: Rows) -> NDArray[np.void]:
    """Return, for each row, a hash of its question and a number for its label."""
    numbers: dict[str, int] = {}

    def each() -> Iterator[tuple[int, int]]:
        for row in data:
            normalized_input = data.normalized_input(row).encode()
            label = row["label"] if data.task == "classification" else ""
            # 64 bits: among a million questions, two are taken for one with a probability of 3e-8.
            digest = hashlib.blake2b(normalized_input, digest_size=8).digest()
            yield int.from_bytes(digest, "little"), numbers.setdefault(label, len(numbers))

    return np.fromiter(each(), [("question", np.uint64), ("label", np.int64)], len(data))


def _part(data: Rows, chosen: NDArray[np.bool_], known: tuple[str, ...]) -> Rows:
    """Return some of the rows; a label that none of them has is still known, for others have it."""
    return replace(data.pick(np.flatnonzero(chosen)), known=known)


def _numbered(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Replace every key by a number, counted from 0 in the order in which they first occur."""
    _, first, number = np.unique(keys, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number]


def _stratified(
    labels: NDArray[np.int64], units: NDArray[np.int64], wanted: int, generator: np.random.Generator
) -> NDArray[np.bool_]:
    """Draw units of rows, `wanted` rows at most, so that every label that is not rare keeps its share.

    Args:
        labels: each row's; a unit counts for the label of its first row.
        units: each row's, numbered in the order of their first rows.
        wanted: the most rows.
        generator: what is drawn with.

    Returns:
        For each row whether it was drawn.
    """
    _, first, sizes = np.unique(units, return_index=True, return_counts=True)
    order = generator.permutation(len(first))
    label = labels[first[order]]
    # Every unit's place within its label, as a share: those with the smallest are drawn evenly from all labels.
    counts = np.bincount(label)
    together = np.argsort(label, kind="stable")
    place = np.empty(len(order))
    place[together] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    shares = (place + 0.5) / counts[label]
    drawn = np.zeros(len(first), np.bool_)
    for unit in order[np.lexsort((order, shares))]:
        if sizes[unit] <= wanted:
            drawn[unit] = True
            wanted -= sizes[unit]
        if not wanted:
            break
    return drawn[units]
