"""Evaluating a prompt on rows, always next to the same figures without it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softprompt.data.examples import Encoder
from softprompt.data.rows import Rows
from softprompt.data.templates import make_format
from softprompt.errors import DataError
from softprompt.evaluation.intervals import Metric
from softprompt.evaluation.scoring import make_scorer
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.soft_prompt import SoftPrompt, require_fit


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation gave.

    Attributes:
        task: the task's kind.
        rows: how many rows were scored.
        metrics: with the prompt; without any where none was given.
        without_prompt: with the same template and no virtual tokens; None where no prompt was given.
        seconds: time it took.
        predictions: a record a row.
        truncated: rows whose input was cut to fit.
    """

    task: str
    rows: int
    metrics: dict[str, Metric]
    without_prompt: dict[str, Metric] | None
    seconds: float
    predictions: list[dict[str, Any]]
    truncated: int


def evaluate(
    model: FrozenModel,
    data: Rows,
    prompt: SoftPrompt | None = None,
    *,
    template: str | None = None,
    verbalizers: Mapping[str, str] | None = None,
    max_length: int = 512,
) -> Evaluation:
    """Score rows with a prompt and without.

    Args:
        model: the frozen model.
        data: rows with their labels or targets.
        prompt: None for the untouched model.
        template, verbalizers, max_length: for the untouched model; a prompt brings its own.

    Raises:
        PromptError: the prompt was trained on another model.
        DataError: the rows are for another task, or have a label that was not learned.
    """
    began = time.monotonic()
    if prompt is None:
        if data.task == "classification" and len(data.labels) < 2:
            raise DataError(f"{data.name}: all rows have the label {data.labels[0]}; there is nothing to choose from")
        most = _fitting(max_length, model, 0)
        encoder = Encoder(model.tokenizer, make_format(data.task, data.labels, template, verbalizers), most)
    else:
        require_fit(prompt, model)
        if prompt.record.task != data.task:
            raise DataError(f"{data.name} is for {data.task}, the prompt was trained for {prompt.record.task}")
        encoder = Encoder(
            model.tokenizer, prompt.format, _fitting(prompt.record.max_length, model, prompt.num_virtual_tokens)
        )
    scorer = make_scorer(encoder, data)
    untouched = scorer.score(model, None)
    scores = untouched if prompt is None else scorer.score(model, prompt.embeddings)
    return Evaluation(
        task=data.task,
        rows=len(data),
        metrics=scores.metrics(),
        without_prompt=None if prompt is None else untouched.metrics(),
        seconds=time.monotonic() - began,
        predictions=scores.predictions(),
        truncated=encoder.truncated,
    )


def _fitting(max_length: int, model: FrozenModel, virtual_tokens: int) -> int:
    """Return how long an example may be, so that the model has positions for it."""
    return min(max_length, (model.context_length or max_length + virtual_tokens) - virtual_tokens)
