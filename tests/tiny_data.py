"""Texts, rows and examples of several kinds, and real data sets where they are on this machine."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from softprompt.data.example import Example
from softprompt.data.rows import Rows, load_data

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
TEXTS = ["a fine film", "what a waste of time and money", "the parcel never came", "hello", "good? bad!", "naïve ☕"]
ONE_TOKEN = ["good", "bad", "dull"]
SEVERAL_TOKENS = ["good", "very bad indeed", "I want my money back", "12"]
ODD_WORDS = ["the", "parcel", "never", "film", "naïve", "日本語", "😀", "1234", "a,b", "x\ny", "  ", "(?)", "fine"]


def shared_data(name: str) -> Path:
    """A real data set, where the folder that holds them is there."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"real data set {name} is not here: {path}")
    return path


def labelled(labels: list[str], texts: list[str] = TEXTS) -> Rows:
    return load_data([{"text": text, "label": labels[i % len(labels)]} for i, text in enumerate(texts)])


def random_text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(ODD_WORDS, k=words)) + draw.choice(["", "", "\n", "!"])


def examples_of(kind: str) -> list[Example]:
    draw = random.Random(7)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 400) for _ in range(length))

    if kind == "first token is a target":
        return [Example(ids(length), 0) for length in (5, 1, 9, 3)]
    if kind == "common beginning":
        lead = ids(6)
        return [Example(lead + ids(length), 6 + first) for length, first in ((4, 0), (7, 3), (1, 0), (4, 2))]
    if kind == "one example":
        return [Example(ids(8), 4)]
    return [Example(ids(length), length - targets) for length, targets in ((12, 1), (3, 2), (25, 4), (12, 3), (7, 1))]
