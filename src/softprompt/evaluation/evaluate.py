"""Evaluating a prompt on rows, always next to the same figures without it."""

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
from softprompt.data.templates import default_template, make_format, require_unseen_answer
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
    """What an evaluation gave.

    Attributes:
        task: the task's kind.
        rows: how many rows were scored.
        metrics: with the prompt, as it answers: with its label bias where it has one; without any where none was given.
        without_prompt: with the same template and no virtual tokens; None where no prompt was given.
        without_bias: with the prompt, but without its label bias, for the base has none either; None where the prompt
            has none, or the base has got one by the same rule.
        base_bias: the label bias that the base has got; empty if none.
        confusion: of classification, which labels were taken for which; None otherwise.
        seconds: time it took.
        predictions: a record a row.
        truncated: rows whose input was cut to fit.
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
    """Score rows with a prompt and without.

    Args:
        model: the frozen model.
        data: rows with their labels or targets, or what `load_data` reads; completions that share an input are several
            right answers to it.
        prompt: None for the untouched model.
        template, verbalizers, chat_template, chat_date, max_length: for the untouched model; a prompt brings its own.
            Verbalizers may name labels that no row has, and are chosen among all the same.
        calibration: `contextual` to make labels less likely that are likely whatever the text says, with the prompt and
            without; a prompt's own label bias is then left out.
        bias_rows: training and validation rows, by which the base gets a label bias as `tune` gives one to a prompt;
            None where they are not at hand.

    Raises:
        PromptError: the prompt was trained on another model.
        SettingsError: the template or the verbalizers do not fit the rows, or there is no label to calibrate.
        DataError: the rows are for another task, or have a label that was not learned.
    """
    began = time.monotonic()
    data = as_rows(data, prompt.record.task if prompt is not None else None)
    if prompt is None:
        labels = _labels(data, verbalizers or {})
        if len(labels) == 1:
            raise DataError(
                f"{data.name}: all rows have the label {labels[0]}; there is nothing to choose from. Verbalizers can "
                "name other labels"
            )
        default = default_template(data)
        form, virtual = make_format(data.task, labels, template, verbalizers, chat_template, default), 0
        form = dated(form, model.tokenizer, chat_date)
    else:
        require_fit(prompt, model)
        if prompt.record.task != data.task:
            raise DataError(f"{data.name} is for {data.task}, the prompt was trained for {prompt.record.task}")
        _warn_of_known_rows(prompt, data)
        form, virtual, max_length = prompt.format, prompt.num_virtual_tokens, prompt.record.max_length
    require_unseen_answer(form, data)
    # So long that the model has positions for it, without the prompt too: both read the same.
    most = min(max_length, (model.context_length or max_length + virtual) - virtual)
    encoder = Encoder(model.tokenizer, form, most, model.vocabulary_size)
    at_once = scoring_micro_batch_tokens(model, data, prompt or BasePrompt(), most)
    scorer = make_scorer(encoder, data, at_once, calibration)
    biased = calibration == "none"  # contextual calibration stands in for what a prompt has learned of its labels
    base_bias: dict[str, float] = {}
    if prompt is not None and bias_rows is not None and biased and data.task == "classification":
        plain = LabelScorer(copy(encoder), bias_rows[1], at_once).score(model, BasePrompt())
        assert isinstance(plain, LabelScores)
        _, base_bias = fit_label_bias(plain, bias_rows[0])
    base = ScoredRows(model, encoder, scorer, BasePrompt(base_bias))
    side = base if prompt is None else ScoredRows(model, encoder, scorer, prompt)
    has_bias = biased and prompt is not None and any(member.label_bias for member in prompt.members)
    return Evaluation(
        task=data.task,
        rows=len(data),
        metrics=side.metrics(),
        without_prompt=None if prompt is None else base.metrics(),
        without_bias=side.plain.metrics() if has_bias and bias_rows is None else None,
        base_bias=base_bias,
        confusion=side.scores.confusion(),
        seconds=time.monotonic() - began,
        predictions=side.predictions(),
        truncated=encoder.truncated,
    )


def _labels(data: Rows, verbalizers: Mapping[str, str]) -> list[str]:
    """Return what the untouched model chooses among: labels that rows have, and others that verbalizers name."""
    if data.task != "classification":
        return []
    named = set(map(clean_label, verbalizers))
    for label in named.difference(data.labels):
        close = nearest(label, data.labels)
        warnings.warn(
            f"{data.name}: no row has the label {label!r}{close}; it can be chosen all the same", stacklevel=3
        )
    return sorted({*data.labels, *named})


def _warn_of_known_rows(prompt: Prompt, data: Rows) -> None:
    """Say that a prompt was learned from these very rows; that it was from some of them, its record cannot tell."""
    for name, did in (("training_data", "learned from"), ("validation_data", "chosen by")):
        if any(each.record.data.get(name) == data.sha256 for each in (prompt, *prompt.members)):
            warn(
                f"{data.name}: the prompt was {did} these very rows, on which it looks better than it is; give rows "
                "that it has not seen",
            )
            return


class ScoredRows:
    """Rows answered: scored, and for completions also written.

    Args:
        model: the frozen model.
        encoder: how rows become tokens.
        scorer: of the rows.
        prompt: a prompt, or the base model.

    Attributes:
        scores: the prompt's, with its label bias.
        plain: the same without it.
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
        """Return a record a row."""
        records = self.scores.predictions()
        if self.completions:
            written = zip(records, self.answers(), strict=True)
            records = [add_columns(record, {"prediction": text}) for record, text in written]
        return records

    def answers(self) -> list[str]:
        """Return the label that was chosen for each row, or what was written; nothing of plain text."""
        if self.completions:
            return [self.completions.outputs[place] for place in self.completions.place]
        scores = self.scores
        return [scores.labels[best] for best in scores.predicted] if isinstance(scores, LabelScores) else []

    def statistics(self) -> list[list[float]]:
        """Return what the ranking metric is made from, by row or distinct input (see `evaluation.primary_metric`)."""
        return self.completions.statistics() if self.completions else self.scores.statistics()
