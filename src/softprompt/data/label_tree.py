"""The tokens of a classification task's labels, laid out as a tree: what several labels begin with is run once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class LabelTree:
    """The tokens of all labels after one input.

    Attributes:
        ids: every token of a label that another token of a label follows; a label's last token is predicted, not run.
        parents: for each of `ids`, the index of the token before it; -1 for the input's last token.
        positions: for each prediction, the index of the token that it is made at: 0 is the input's last token, 1 the
            first of `ids`.
        tokens: for each prediction, the predicted token.
        paths: per label, the predictions whose log-probabilities it sums.
    """

    ids: tuple[int, ...]
    parents: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]

    def parents_after(self, length: int) -> list[int]:
        """Return, for each token of an input of this length and of `ids` after it, the index of the one before it."""
        return [*range(-1, length - 1), *(length + parent for parent in self.parents)]

    def candidate_ids(self) -> list[tuple[tuple[int, ...], ...]]:
        """Return, per label and for each of its tokens, the tokens that can continue some label there."""
        candidates = defaultdict[int, set[int]](set)
        for position, token in zip(self.positions, self.tokens, strict=True):
            candidates[position].add(token)
        return [tuple(tuple(sorted(candidates[self.positions[i]])) for i in path) for path in self.paths]


@lru_cache(maxsize=32)  # nearly all rows have the same tree
def label_tree(tails: tuple[tuple[int, ...], ...]) -> LabelTree:
    """Lay labels out as a tree."""
    index: dict[tuple[int, ...], int] = {(): -1}
    predictions: dict[tuple[int, ...], int] = {}
    for tail in tails:
        for end in range(1, len(tail) + 1):
            beginning = tail[:end]
            predictions.setdefault(beginning, len(predictions))
            if end < len(tail):
                index.setdefault(beginning, len(index) - 1)
    inner = list(index)[1:]
    return LabelTree(
        ids=tuple(beginning[-1] for beginning in inner),
        parents=tuple(index[beginning[:-1]] for beginning in inner),
        positions=tuple(index[beginning[:-1]] + 1 for beginning in predictions),
        tokens=tuple(beginning[-1] for beginning in predictions),
        paths=tuple(tuple(predictions[tail[:end]] for end in range(1, len(tail) + 1)) for tail in tails),
    )
