"""Choosing: the most probable label of each row, by a prompt that was made ready once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from softprompt.data.encoder import Encoder
from softprompt.data.rows import Row, Rows
from softprompt.evaluation.scores import LabelScorer, LabelScores
from softprompt.model.frozen import FrozenModel
from softprompt.model.memory import MemoryEstimate, measure, micro_batch_tokens
from softprompt.prompt.ensemble import Prompt
from softprompt.prompt.loading import require_fit
from softprompt.prompt.soft_prompt import BasePrompt


@dataclass(frozen=True)
class ReadyPrompt:
    """What the requests of a label prompt have in common; the model keeps the prompt's prefix.

    Attributes:
        encoder: rows to token ids.
        memory_estimate: what scoring takes in memory.
    """

    encoder: Encoder
    memory_estimate: MemoryEstimate


_READY: WeakKeyDictionary[FrozenModel, WeakKeyDictionary[Prompt, ReadyPrompt]] = WeakKeyDictionary()


def ready(model: FrozenModel, prompt: Prompt) -> ReadyPrompt:
    """Return a label prompt made ready for a model: only its first request pays for that.

    Raises:
        PromptError: the prompt was trained on another model.
    """
    with model.backend.lock:
        of_model = _READY.setdefault(model, WeakKeyDictionary())
        if prompt not in of_model:
            require_fit(prompt, model)
            virtual, longest = prompt.num_virtual_tokens, prompt.record.max_length
            # As `evaluate` has it: a row and its label fit behind the virtual tokens.
            most = min(longest, (model.context_length or longest + virtual) - virtual)
            memory_estimate = replace(measure(model, virtual), prefixes=len(prompt.members))
            of_model[prompt] = ReadyPrompt(
                Encoder(model.tokenizer, prompt.format, most, model.vocabulary_size), memory_estimate
            )
        return of_model[prompt]


def choose(model: FrozenModel, prompt: Prompt, rows: Sequence[Row], *, virtual_tokens: bool = True) -> LabelScores:
    """Score the labels of a prompt behind each row.

    Args:
        model: the frozen model.
        prompt: of a classification task.
        rows: with the columns that its template names; labels are not read.
        virtual_tokens: False to choose as the base model does, with the same template: the base to compare with.

    Raises:
        PromptError: the prompt was trained on another model.
        DataError, SettingsError: a row does not fit the template.
    """
    made = ready(model, prompt)
    encoder = copy(made.encoder)  # each request counts for itself what it cuts
    some = next(iter(encoder.format.verbalizers))  # every row has one; it is not read
    asked = Rows([{**row, "label": some} for row in rows], "classification", "texts")
    at_once = micro_batch_tokens(model.device, made.memory_estimate, 1, encoder.max_length, 0.0, scoring=True)
    scorer = LabelScorer(encoder, asked, at_once)
    if encoder.truncated:
        warnings.warn(f"{encoder.truncated} of {len(rows)} texts were cut to {encoder.max_length} tokens", stacklevel=3)
    scores = scorer.score(model, prompt if virtual_tokens else BasePrompt())
    assert isinstance(scores, LabelScores)
    return scores
