"""Examples: token ids of an input and of the target to predict after it; and of all labels after one input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from softprompt.data.label_tree import LabelTree, label_tree


class Example(NamedTuple):
    """Token ids, of which those from `start` on are the target.

    `candidate_ids` holds, for each target token, the candidate tokens: those that can continue some label there, the
    target among them; empty where the loss is over the whole vocabulary alone.
    """

    ids: tuple[int, ...]
    start: int
    candidate_ids: tuple[tuple[int, ...], ...] = ()

    @property
    def targets(self) -> int:
        """How many tokens are predicted."""
        return len(self.ids) - self.start

    @property
    def predicted(self) -> Example:
        """The example without a target that nothing predicts: a text's very first token, without a prompt."""
        return self if self.start else self._replace(start=1, candidate_ids=self.candidate_ids[1:])


@dataclass(frozen=True)
class Choices:
    """The labels of a classification task after a row's input.

    Attributes:
        input_ids: ids that all labels share, the input among them.
        tails: per label (in the order of the verbalizers), the ids that follow the input.
    """

    input_ids: tuple[int, ...]
    tails: tuple[tuple[int, ...], ...]

    @property
    def tree(self) -> LabelTree:
        """The labels' tokens, what several labels begin with only once."""
        return label_tree(self.tails)

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens that are run to score all labels: the input's, then those of the tree."""
        return (*self.input_ids, *self.tree.ids)


def common_start(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the longest run of ids that all sequences begin with."""
    if not sequences:
        return ()
    # In dictionary order, the first and the last differ soonest.
    low, high = min(map(tuple, sequences)), max(map(tuple, sequences))
    length = 0
    while length < min(len(low), len(high)) and low[length] == high[length]:
        length += 1
    return low[:length]


def shared_text(examples: Sequence[Example]) -> tuple[int, ...]:
    """Return the ids that all examples begin with, up to their first targets: they can belong to the prefix."""
    return common_start([example.ids[: example.start] for example in examples])
