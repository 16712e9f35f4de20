"""Examples that are encoded when they are used, and statistics of their lengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

from softprompt.data.encoder import Encoder
from softprompt.data.example import Example, common_start
from softprompt.data.rows import Rows
from softprompt.errors import DataError


@dataclass(frozen=True)
class LazyExamples(Sequence[Example]):
    """An example for each row, encoded when it is used: of a million rows, a short run uses a few thousand.

    Attributes:
        encoder: from rows to token ids; it counts an example that it cuts each time.
        learn_all: whether all tokens are targets, except BOS.
        first: the first token that can be a target: 1 if nothing predicts the first token of a text.
    """

    encoder: Encoder
    rows: Rows
    learn_all: bool
    first: int = 0
    candidate_ids: bool = False

    def __post_init__(self) -> None:
        self.rows.require_inputs(self.encoder.format.columns)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.rows[index]
        example = self.encoder.example(row, self.rows.where(index))
        start = len(self.encoder.bos_ids) if self.learn_all else example.start
        start = max(start, self.first)
        if start == len(example.ids):
            raise DataError(f"{self.rows.where(index)}: one token alone, and nothing before it to learn it from")
        example = example._replace(start=start)
        return self.encoder.with_candidates(row, example) if self.candidate_ids else example

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class LengthStats:
    """Lengths of examples.

    Attributes:
        rows, tokens, targets: their numbers.
        shortest, longest: tokens of the shortest and of the longest example.
        shared_text_ids: the ids that all examples begin with, before their first targets; they can be in the prefix.
    """

    rows: int
    tokens: int
    targets: int
    shortest: int
    longest: int
    shared_text_ids: tuple[int, ...]

    @classmethod
    def of(cls, examples: Iterable[Example]) -> LengthStats:
        """Compute them in one pass, without storing the examples."""
        rows = tokens = targets = shortest = longest = 0
        shared: tuple[int, ...] | None = None
        for example in examples:
            before = example.ids[: example.start]
            shared = before if shared is None else common_start((shared, before))
            rows, tokens, targets = rows + 1, tokens + len(example.ids), targets + example.targets
            shortest = min(shortest or len(example.ids), len(example.ids))
            longest = max(longest, len(example.ids))
        return cls(rows, tokens, targets, shortest, longest, shared or ())
