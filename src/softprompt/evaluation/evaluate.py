"""Evaluating a prompt on rows, with the base model's figures beside it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

from softprompt.config import Calibration
from softprompt.data.added_columns import add_columns
from softprompt.data.chat import dated
from softprompt.data.encoder import Encoder
from softprompt.data.labels import clean_label
from softprompt.data.rows import Rows, Source, as_rows
from softprompt.data.templates import Format, default_template, make_format, require_unseen_answer
from softprompt.errors import DataError, nearest, warn
from softprompt.evaluation.calibration import fit_label_bias, make_scorer
from softprompt.evaluation.completions import complete
from softprompt.evaluation.intervals import Metric
from softprompt.evaluation.label_scorer import LabelScorer
from softprompt.evaluation.scorer import Scorer, scoring_micro_batch_tokens
from softprompt.evaluation.scores import Confusion, LabelScores, average_scores
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.ensemble import AnyPrompt, Prompt
from softprompt.prompt.loading import require_fit
from softprompt.prompt.soft_prompt import BasePrompt


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        task: the task's kind.
        rows: how many rows were scored.
        metrics: the prompt's, with its label bias; the base model's where no prompt was given.
        without_prompt: the base model's, with the same template; None where no prompt was given.
        without_bias: the prompt's without its label bias, to compare with a base model that has none; None where the
            prompt has none, or the base model has one too.
        base_bias: the base model's label bias; empty if none.
        confusion: the confusion matrix of classification; None for other tasks.
        seconds: the time it took.
        predictions: each row with its prediction.
        truncated: how many rows' inputs were cut to fit.
    """

    task: str
    rows: int
    metrics: dict[str, Metric]
    without_prompt: dict[str, Metric] | None
    without_bias: dict[str, Metric] | None
    base_bias: dict[str, float]
    confusion: Confusion | None
    seconds: float
    predictions: list[dict[str, Any]]
    truncated: int


def evaluate(
    model: FrozenModel,
    data: Source,
    prompt: Prompt | None = None,
    *,
    template: str | None = None,
    verbalizers: Mapping[str, str] | None = None,
    chat_template: bool = False,
    chat_date: str | None = None,
    max_length: int = 512,
    calibration: Calibration = "none",
    bias_rows: tuple[Rows, Rows] | None = None,
) -> Evaluation:
    """Score rows with a prompt, and with the base model.

    Args:
        data: rows with their labels or targets, or what `load_data` reads. Rows of a completion task that share an
            input are several right answers to it.
        prompt: None for the base model alone.
        template, verbalizers, chat_template, chat_date, max_length: for the base model alone; a prompt has its own.
            Verbalizers may name labels that no row has: these can be chosen too.
        calibration: `contextual` for contextual calibration of the prompt and the base model; it replaces a prompt's
            label bias.
        bias_rows: training and validation rows, to fit a label bias of the base model as `tune` fits a prompt's; None
            for no bias.

    Raises:
        PromptError: the prompt was trained on another model.
        SettingsError: the template or the verbalizers do not fit the rows, or there is no label to calibrate.
        DataError: the rows are for another task, or have a label that the prompt does not know.
    """
    began = time.monotonic()
    data = as_rows(data, prompt.record.task if prompt is not None else None)
    if prompt is None:
        form = _base_format(model, data, template, verbalizers, chat_template, chat_date)
    else:
        require_fit(prompt, model)
        if prompt.record.task != data.task:
            raise DataError(f"{data.name} is for {data.task}, the prompt was trained for {prompt.record.task}")
        _warn_of_known_rows(prompt, data)
        form, max_length = prompt.format, prompt.record.max_length
    require_unseen_answer(form, data)
    used = prompt or BasePrompt()
    if model.context_length is not None:  # the base model reads the same text, though it has more positions for it
        max_length = min(max_length, model.context_length - used.num_virtual_tokens)
    encoder = Encoder(model.tokenizer, form, max_length, model.vocabulary_size)
    tokens = scoring_micro_batch_tokens(model, data, used, max_length)
    scorer = make_scorer(encoder, data, tokens, calibration)
    uses_bias = calibration == "none" and data.task == "classification"
    base_bias: dict[str, float] = {}
    if prompt is not None and bias_rows is not None and uses_bias:
        train, validation = bias_rows
        plain = LabelScorer(copy(encoder), validation, tokens).score(model, BasePrompt())
        assert isinstance(plain, LabelScores)
        _, base_bias = fit_label_bias(plain, train)
    base = ScoredRows(model, encoder, scorer, BasePrompt(base_bias))
    scored = base if prompt is None else ScoredRows(model, encoder, scorer, prompt)
    has_bias = uses_bias and any(member.label_bias for member in used.members)
    return Evaluation(
        task=data.task,
        rows=len(data),
        metrics=scored.metrics(),
        without_prompt=None if prompt is None else base.metrics(),
        without_bias=scored.plain.metrics() if has_bias and bias_rows is None else None,
        base_bias=base_bias,
        confusion=scored.scores.confusion(),
        seconds=time.monotonic() - began,
        predictions=scored.predictions(),
        truncated=encoder.truncated,
    )


def _base_format(
    model: FrozenModel,
    data: Rows,
    template: str | None,
    verbalizers: Mapping[str, str] | None,
    chat_template: bool,
    chat_date: str | None,
) -> Format:
    """Return how rows become text for the base model alone."""
    named = set(map(clean_label, verbalizers or ())) if data.task == "classification" else set()
    for label in named.difference(data.labels):
        close = nearest(label, data.labels)
        warnings.warn(
            f"{data.name}: no row has the label {label!r}{close}; it can be chosen all the same", stacklevel=3
        )
    labels = sorted({*data.labels, *named})
    if len(labels) == 1:
        raise DataError(
            f"{data.name}: all rows have the label {labels[0]}; there is nothing to choose from. Verbalizers can name "
            "other labels"
        )
    form = make_format(data.task, labels, template, verbalizers, chat_template, default_template(data))
    return dated(form, model.tokenizer, chat_date)


def _warn_of_known_rows(prompt: Prompt, data: Rows) -> None:
    """Warn of an evaluation on the training or validation rows; a record cannot tell whether some of them are."""
    for name, relation in (("training_data", "learned from"), ("validation_data", "chosen by")):
        if any(each.record.data.get(name) == data.sha256 for each in (prompt, *prompt.members)):
            warn(
                f"{data.name}: the prompt was {relation} these very rows, on which it looks better than it is; give "
                "rows that it has not seen"
            )
            return


class ScoredRows:
    """Rows with a prompt's scores and, for completions, with what it writes.

    Attributes:
        scores: with the prompt's label bias.
        plain: without it.
        completions: what was written; None for other tasks.
    """

    def __init__(self, model: FrozenModel, encoder: Encoder, scorer: Scorer, prompt: AnyPrompt) -> None:
        members = scorer.score_members(model, prompt)
        self.plain, self.scores = average_scores(members), scorer.combine(members, prompt)
        completion = encoder.format.task == "completion"
        self.completions = complete(model, prompt, encoder, scorer.rows) if completion else None

    def metrics(self) -> dict[str, Metric]:
        """Return all metrics, with intervals."""
        written = self.completions.metrics() if self.completions else {}
        return {**written, **self.scores.metrics()}

    def predictions(self) -> list[dict[str, Any]]:
        """Return each row with its prediction in added columns."""
        records = self.scores.predictions()
        if self.completions:
            written = zip(records, self.answers(), strict=True)
            records = [add_columns(record, {"prediction": text}) for record, text in written]
        return records

    def answers(self) -> list[str]:
        """Return the label that was chosen for each row, or what was written; nothing for plain text."""
        if self.completions:
            return [self.completions.outputs[place] for place in self.completions.place]
        scores = self.scores
        return [scores.labels[best] for best in scores.predicted] if isinstance(scores, LabelScores) else []

    def statistics(self) -> list[list[float]]:
        """Return what the primary metric is computed from, for each row or distinct input, see `compute_metric`."""
        return self.completions.statistics() if self.completions else self.scores.statistics()
