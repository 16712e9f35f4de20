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
        eval_data: validation rows; None to hold some of `data` back, a fifth at most.
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
    chosen = set(_stratified(data, held, generator))
    train = [i for i in range(len(data)) if i not in chosen]
    return data.pick(train), data.pick(sorted(chosen))


def sample(data: Rows, rows: int, seed: int) -> Rows:
    """Return at most so many rows, drawn so that every label keeps its share, in their old order."""
    if rows >= len(data):
        return data
    return data.pick(sorted(_stratified(data, rows, np.random.default_rng(seed))))


def _stratified(data: Rows, held: int, generator: np.random.Generator) -> list[int]:
    """Draw rows so that every label that is not rare keeps its share, to within a row."""
    order = generator.permutation(len(data)).tolist()
    by_label: dict[str, list[int]] = defaultdict(list)
    for i in order:
        by_label[data[i].get("label", "") if data.task == "classification" else ""].append(i)
    # Every row's place within its label, as a share: the rows with the smallest are drawn evenly from all labels.
    places = [((n + 0.5) / len(group), i) for group in by_label.values() for n, i in enumerate(group)]
    return [i for _, i in sorted(places)[:held]]
