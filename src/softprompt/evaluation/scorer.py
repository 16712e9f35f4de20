"""What the two scorers share: processes, members of an ensemble, micro-batches, and memory that runs out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softprompt.data.batching import micro_batches, shard_by_length
from softprompt.data.example import Example
from softprompt.data.rows import Rows
from softprompt.distributed.collective import ALONE, Processes
from softprompt.errors import RunError, is_out_of_memory
from softprompt.evaluation.scores import Scores, add_label_bias, average_scores
from softprompt.model.finite import describe_non_finite
from softprompt.model.frozen import FrozenModel
from softprompt.model.memory import measure, micro_batch_tokens
from softprompt.prompt.ensemble import AnyPrompt

MICRO_BATCH_TOKENS = 1024


class Scorer(ABC):
    """Rows that are tokenized once, and scored with one prompt after the other.

    Attributes:
        micro_batch_tokens: how many text tokens are run at once.
        shape: of what is computed for the rows with one prompt.
        processes: those that share the rows.
    """

    rows: Rows
    micro_batch_tokens: int
    shape: tuple[int, ...]
    processes: Processes = ALONE

    def score(self, model: FrozenModel, prompt: AnyPrompt) -> Scores:
        """Score the rows with a prompt: with its label bias, and averaged over the members of an ensemble.

        Raises:
            RunError: not even one row fits in memory, or the model's output is not finite.
        """
        return self.combine(self.score_members(model, prompt), prompt)

    def combine(self, scores: Sequence[Scores], prompt: AnyPrompt) -> Scores:
        """Return a prompt's scores from those of its members: add each one's label bias, then average."""
        biases = [member.label_bias for member in prompt.members]
        return average_scores([add_label_bias(each, bias) for each, bias in zip(scores, biases, strict=True)])

    def score_members(self, model: FrozenModel, prompt: AnyPrompt) -> list[Scores]:
        """Score the rows with every member of a prompt, without label biases; texts of all members are run together.

        Where memory runs out, fewer tokens are run at once.
        """
        weights = [member.weights for member in prompt.members]
        while True:
            try:
                return self._score(model, weights)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self.micro_batch_tokens == 1:
                    raise RunError("out of memory at scoring one row; try a smaller max_length or model") from error
            self.micro_batch_tokens //= 2

    @torch.no_grad()
    def _score(self, model: FrozenModel, weights: Sequence[Tensor | None]) -> list[Scores]:
        shape = (len(weights), *self.shape)
        values = self.processes.all_reduce(lambda: torch.from_numpy(self._run(model, weights)), shape).numpy()
        if not self._is_valid(values):
            raise RunError(f"the model's scores of a row are not finite: {describe_non_finite(model.hf_model)}")
        return [self._to_scores(each) for each in values]

    def _is_valid(self, values: NDArray[np.float64]) -> bool:
        return not bool(np.isnan(values).any())

    @abstractmethod
    def _run(self, model: FrozenModel, weights: Sequence[Tensor | None]) -> NDArray[np.float64]:
        """Compute `[prompts, *shape]` for this process's share of the rows; the values of other rows stay 0."""

    @abstractmethod
    def _to_scores(self, values: NDArray[np.float64]) -> Scores:
        """Return the scores of all rows with one prompt, from values of `shape`."""

    def _micro_batches(
        self, examples: Sequence[Example], prompts: int, shared_text_len: int, pads: bool
    ) -> list[tuple[list[int], list[int]]]:
        """Cut this process's share of the rows, each after every prompt: indices of prompts and of examples."""
        share = shard_by_length(examples, self.processes.count)[self.processes.rank]
        pairs = [(k, i) for i in share for k in range(prompts)]
        cut = micro_batches([examples[i] for _, i in pairs], self.micro_batch_tokens, shared_text_len, pads)
        return [([pairs[place][0] for place in part], [pairs[place][1] for place in part]) for part in cut]


def scoring_micro_batch_tokens(model: FrozenModel, rows: Rows, prompt: AnyPrompt, longest: int) -> int:
    """Predict how many text tokens can be scored at once."""
    target_share = 0.0 if rows.task == "classification" else 1.0
    memory_estimate = replace(measure(model, prompt.num_virtual_tokens), prefixes=len(prompt.members))
    return micro_batch_tokens(model, memory_estimate, 1, longest, target_share, scoring=True)
