"""The loss of target tokens: how plain text and completions are scored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from softprompt.data.encoder import Encoder
from softprompt.data.example import shared_text
from softprompt.data.rows import Rows
from softprompt.errors import DataError
from softprompt.evaluation.scorer import MICRO_BATCH_TOKENS, Scorer
from softprompt.evaluation.scores import TextScores
from softprompt.model.frozen import FrozenModel


class TokenScorer(Scorer):
    """Sums the loss over each row's target tokens.

    A text's first token is left out: the base model cannot predict it, and the same tokens have to count with a prompt
    and without.
    """

    def __init__(self, encoder: Encoder, rows: Rows, micro_batch_tokens: int = MICRO_BATCH_TOKENS) -> None:
        self.rows, self.micro_batch_tokens = rows, micro_batch_tokens
        self.examples = [example.predicted for example in encoder.examples(rows)]
        self.shape = (len(self.examples),)
        self.scored = [i for i, example in enumerate(self.examples) if example.targets]
        if not self.scored:
            raise DataError(f"{rows.name}: no text has a second token, so there is nothing to predict")

    def _run(self, model: FrozenModel, weights: Sequence[Tensor | None]) -> NDArray[np.float64]:
        scored = [self.examples[i] for i in self.scored]
        text = shared_text(scored)
        prefixes = [model.prefix(each, text) for each in weights]
        losses = np.zeros((len(weights), *self.shape))
        for prompts, rows in self._micro_batches(scored, len(weights), len(text), model.backend.pads):
            examples = [scored[i] for i in rows]
            by_token = model.backend.loss([prefixes[k] for k in prompts], examples).cpu().double()
            for k, i, values in zip(prompts, rows, by_token.split([e.targets for e in examples]), strict=True):
                losses[k, self.scored[i]] = float(values.sum())
        return losses

    def _to_scores(self, values: NDArray[np.float64]) -> TextScores:
        return TextScores(self.rows, values, np.array([example.targets for example in self.examples]))
