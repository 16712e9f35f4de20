"""The quality of every method on seven tasks, in the same time."""

from __future__ import annotations

from pathlib import Path

import softprompt as sp

SETS = ("sst2", "rte", "cb", "boolq", "banking77", "germeval18", "e2e")
_TRAIN, _VALIDATION, _TEST = 1000, 500, {"e2e": 300}


def rows_of(name: str, data: Path) -> tuple[sp.Rows, sp.Rows, sp.Rows]:
    """Return the rows of a set to learn from, to choose on, and to score."""

    def read(part: str, most: int | None) -> sp.Rows:
        file = data / name / f"{part}.jsonl"
        return sp.load_data(file if most is None else f"{file}[:{most}]")

    return read("train", _TRAIN), read("validation", _VALIDATION), read("test", _TEST.get(name))
