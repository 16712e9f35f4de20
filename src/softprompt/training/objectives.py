"""Objectives: how rows become examples to learn from, and what their loss is."""

from __future__ import annotations

from dataclasses import dataclass

from softprompt.data.encoder import Encoder
from softprompt.data.lazy_examples import LazyExamples
from softprompt.data.rows import Rows
from softprompt.model.gradient import TokenLoss


@dataclass(frozen=True)
class Objective(TokenLoss):
    """Predict the targets: the negative log-likelihood of their tokens (`TokenLoss`).

    Attributes:
        all_tokens: whether all tokens of an example are targets, not those of the target text alone.
        candidates: whether half of the loss is restricted to tokens that can continue some label.
    """

    all_tokens: bool = False
    candidates: bool = False

    def examples(self, encoder: Encoder, rows: Rows, first: int) -> LazyExamples:
        """Return an example for each row; the token at `first` is the first that can be a target."""
        return LazyExamples(encoder, rows, self.all_tokens, first, self.candidates)


# By the setting `loss`.
OBJECTIVES = {
    "target": Objective(),
    "labels": Objective(candidates=True),
    "all": Objective(all_tokens=True),
}
