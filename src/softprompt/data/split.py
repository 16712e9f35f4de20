"""Holding rows back: which are learned from, and which the best prompt is chosen on."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from softprompt.data.rows import Rows
from softprompt.errors import DataError

_SHARE = 0.2  # of the rows, at most, where no validation rows are given
_FEWEST = 5


def split_rows(data: Rows, eval_data: Rows | None, eval_rows: int, seed: int) -> tuple[Rows, Rows | None]:
    """Return training and validation rows.

    Args:
        data: rows to learn from.
        eval_data: validation rows; None to hold some of `data` back, a fifth at most. Rows with the same input stay
            on one side.
        eval_rows: the most validation rows; 0 for none.
        seed: of the draw.

    Raises:
        DataError: the two are for different tasks, or there are too few rows to hold any back.
    """
    if eval_data is not None and eval_data.task != data.task:
        raise DataError(f"{eval_data.name} is for {eval_data.task}, {data.name} for {data.task}; use the same columns")
    if eval_rows == 0:
        return data, None
    generator = np.random.default_rng(seed)
    if eval_data is not None:
        if len(eval_data) <= eval_rows:
            return data, eval_data
        return data, eval_data.pick(sorted(generator.permutation(len(eval_data))[:eval_rows].tolist()))
    held = min(eval_rows, int(len(data) * _SHARE))
    if held < min(eval_rows, _FEWEST):
        raise DataError(
            f"{data.name} has {len(data)} rows, too few to hold any back for validation; give --eval-data, or "
            "--set eval_rows=0 to keep the last prompt"
        )
    same: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(data.inputs):
        same[text].append(i)
    chosen = set(_stratified(data, list(same.values()), held, generator))
    if not chosen:
        raise DataError(
            f"{data.name} has {len(same)} different inputs, each in too many rows to hold any back for validation; "
            "give --eval-data, or --set eval_rows=0 to keep the last prompt"
        )
    train = [i for i in range(len(data)) if i not in chosen]
    return data.pick(train), data.pick(sorted(chosen))


def sample(data: Rows, rows: int, seed: int) -> Rows:
    """Return at most so many rows, drawn so that every label keeps its share, in their old order."""
    if rows >= len(data):
        return data
    alone = [[i] for i in range(len(data))]
    return data.pick(sorted(_stratified(data, alone, rows, np.random.default_rng(seed))))


def seen_before(train: Rows, validation: Rows) -> int:
    """Return how many validation rows ask what a training row asks too: on those a prompt looks better than it is."""
    known = set(train.inputs)
    return sum(text in known for text in validation.inputs)


def _stratified(data: Rows, units: list[list[int]], wanted: int, generator: np.random.Generator) -> list[int]:
    """Draw units of rows, `wanted` rows at most, so that every label that is not rare keeps its share."""
    by_label: dict[str, list[list[int]]] = defaultdict(list)
    for n in generator.permutation(len(units)).tolist():
        by_label[data[units[n][0]].get("label", "") if data.task == "classification" else ""].append(units[n])
    # Every unit's place within its label, as a share: those with the smallest are drawn evenly from all labels.
    places = [((n + 0.5) / len(group), unit) for group in by_label.values() for n, unit in enumerate(group)]
    drawn: list[int] = []
    for _, unit in sorted(places):
        if len(drawn) + len(unit) <= wanted:
            drawn += unit
    return drawn
