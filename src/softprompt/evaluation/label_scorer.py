"""The log-likelihood of every label: how rows of a classification task are scored, and how a label is chosen.

The log-likelihoods come from `Backend.score` (model/backends/base.py), the prefixes from `FrozenModel.shared_prefixes`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from softprompt.data.encoder import Encoder
from softprompt.data.example import Example
from softprompt.data.rows import Row, Rows
from softprompt.evaluation.scorer import MICRO_BATCH_TOKENS, Scorer
from softprompt.evaluation.scores import LabelScores
from softprompt.model.frozen import FrozenModel
from softprompt.model.memory import MemoryEstimate, measure, micro_batch_tokens
from softprompt.prompt.ensemble import Prompt
from softprompt.prompt.loading import require_fit
from softprompt.prompt.soft_prompt import BasePrompt


class LabelScorer(Scorer):
    """Sums the log-probabilities of every label's tokens after each row's input."""

    def __init__(self, encoder: Encoder, rows: Rows, micro_batch_tokens: int = MICRO_BATCH_TOKENS) -> None:
        self.rows, self.micro_batch_tokens = rows, micro_batch_tokens
        self.choices = encoder.choices(rows)
        self.labels = list(encoder.format.verbalizers)
        self.gold = np.array([self.labels.index(row["label"]) for row in rows])
        self.shape = (len(self.choices), len(self.labels))

    def _run(self, model: FrozenModel, weights: Sequence[Tensor | None]) -> NDArray[np.float64]:
        prefixes = model.shared_prefixes(weights, [choice.input_ids for choice in self.choices])
        shared_text_len = len(prefixes[0].shared_text_ids)
        log_likelihoods = np.zeros((len(weights), *self.shape))
        examples = [Example(choice.ids, 0) for choice in self.choices]
        for prompts, rows in self._micro_batches(examples, len(weights), shared_text_len, model.backend.pads):
            scores = model.backend.score([prefixes[k] for k in prompts], [self.choices[i] for i in rows])
            log_likelihoods[prompts, rows] = scores.numpy()
        return log_likelihoods

    def _is_valid(self, values: NDArray[np.float64]) -> bool:
        some_label = (values > -np.inf).any(axis=-1)  # some models rule tokens out, but never all labels of a row
        return super()._is_valid(values) and bool(some_label.all())

    def _to_scores(self, values: NDArray[np.float64]) -> LabelScores:
        tokens = np.array([len(c.tails[g]) for c, g in zip(self.choices, self.gold, strict=True)])
        losses = -values[np.arange(len(values)), self.gold]
        return LabelScores(self.rows, losses, tokens, values, self.labels, self.gold)


_PREPARED: WeakKeyDictionary[FrozenModel, WeakKeyDictionary[Prompt, tuple[Encoder, MemoryEstimate]]]
_PREPARED = WeakKeyDictionary()


def choose(model: FrozenModel, prompt: Prompt, rows: Sequence[Row], *, virtual_tokens: bool = True) -> LabelScores:
    """Score the labels of a prompt for rows without labels.

    Args:
        prompt: of a classification task.
        rows: with the columns that its template names; labels are not read.
        virtual_tokens: False to choose as the base model does with the same template.

    Raises:
        PromptError: the prompt was trained on another model.
        DataError, SettingsError: a row does not fit the template.
    """
    encoder, memory_estimate = _prepare(model, prompt)
    encoder = copy(encoder)  # each request counts the texts that it cuts
    any_label = next(iter(encoder.format.verbalizers))  # every row has one; it is not read
    labelled = Rows([{**row, "label": any_label} for row in rows], "classification", "texts")
    tokens = micro_batch_tokens(model, memory_estimate, 1, encoder.max_length, 0.0, scoring=True)
    scorer = LabelScorer(encoder, labelled, tokens)
    if encoder.truncated:
        warnings.warn(f"{encoder.truncated} of {len(rows)} texts were cut to {encoder.max_length} tokens", stacklevel=3)
    scores = scorer.score(model, prompt if virtual_tokens else BasePrompt())
    assert isinstance(scores, LabelScores)
    return scores


def _prepare(model: FrozenModel, prompt: Prompt) -> tuple[Encoder, MemoryEstimate]:
    """Return what all requests of a prompt share; the first request alone computes it."""
    with model.backend.lock:
        by_prompt = _PREPARED.setdefault(model, WeakKeyDictionary())
        if prompt not in by_prompt:
            require_fit(prompt, model)
            virtual, longest = prompt.num_virtual_tokens, prompt.record.max_length
            # As in `evaluate`: a row and its label fit after the virtual tokens.
            longest = min(longest, (model.context_length or longest + virtual) - virtual)
            memory_estimate = replace(measure(model, virtual), prefixes=len(prompt.members))
            encoder = Encoder(model.tokenizer, prompt.format, longest, model.vocabulary_size)
            by_prompt[prompt] = encoder, memory_estimate
        return by_prompt[prompt]
