"""Predicting: labels with their probabilities, or completions, for rows without targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.config import GenerateConfig, Mode
from softprompt.data.readers import read_records
from softprompt.data.rows import Row
from softprompt.errors import SettingsError
from softprompt.evaluation.label_scorer import choose
from softprompt.generation import answer_mode, generate, input_columns, input_row, require_columns
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.ensemble import Prompt

AT_ONCE = 256  # rows; the same rows are run together in every run, so that rounding is the same
_DIGITS = 6


@dataclass(frozen=True)
class Prediction:
    """The prediction for a row: a label, or a text.

    Attributes:
        label: the chosen label's name; None for a text.
        text: what was written; None for a label.
        probability: the label's probability; those of all labels add up to 1. None for a text.
        probabilities: every label's; None for a text.
    """

    label: str | None = None
    text: str | None = None
    probability: float | None = None
    probabilities: dict[str, float] | None = None

    def columns(self, *, probabilities: bool) -> dict[str, Any]:
        """Return the columns of a file of predictions: `prediction`, and for labels `probability`."""
        if self.label is None:
            return {"prediction": self.text}
        every = {"probabilities": self.probabilities} if probabilities else {}
        return {"prediction": self.label, "probability": self.probability, **every}


def predict(
    model: FrozenModel,
    rows: str | Path | Iterable[str | Mapping[str, Any]],
    prompt: Prompt | None = None,
    *,
    map: Mapping[str, str] | None = None,
    mode: Mode | None = None,
    config: GenerateConfig | None = None,
) -> list[Prediction]:
    """Predict the labels of rows, or complete them.

    Args:
        rows: texts, dictionaries, a data frame, or anything else that `load_data` reads; they need no targets.
        prompt: None for the base model, which continues texts as they are.
        map: the template's column names to the columns that hold them, `{"text": "review"}`.
        mode: `choose` or `write`, as of `generate`.
        config: decoding settings, for writing.

    Returns:
        A prediction a row, in order.

    Raises:
        PromptError: the prompt was trained on another model.
        DataError: a row lacks a column or is empty.
        SettingsError: the settings do not fit the prompt.
    """
    answer_mode(prompt, mode, config)
    require_columns(prompt, map or {})
    if isinstance(rows, (list, tuple)) and all(isinstance(row, str) for row in rows):
        columns = input_columns(prompt)
        if len(columns) > 1:
            raise SettingsError(f"the template names the columns {', '.join(columns)}; give dictionaries of them")
        records: Iterable[Mapping[str, Any]] = ({columns[0]: text} for text in rows)
    else:
        records = read_records(rows)
    inputs = [input_row(prompt, record, f"row {n}", map) for n, record in enumerate(records, start=1)]
    found: list[Prediction] = []
    for first in range(0, len(inputs), AT_ONCE):
        found += predict_inputs(model, inputs[first : first + AT_ONCE], prompt, mode=mode, config=config)
    return found


def predict_inputs(
    model: FrozenModel,
    inputs: Sequence[Row],
    prompt: Prompt | None,
    *,
    mode: Mode | None = None,
    config: GenerateConfig | None = None,
) -> list[Prediction]:
    """Predict rows of the template's columns together; arguments as of `predict`."""
    if answer_mode(prompt, mode, config) == "write":
        columns = input_columns(prompt)
        texts = inputs if len(columns) > 1 else [row[columns[0]] for row in inputs]
        return [Prediction(text=text) for text in generate(model, texts, prompt, config, mode=mode)]
    assert prompt is not None
    scores = choose(model, prompt, inputs)
    predictions = []
    for best, shares in zip(scores.predicted, scores.probabilities().tolist(), strict=True):
        probabilities = {label: round(share, _DIGITS) for label, share in zip(scores.labels, shares, strict=True)}
        label = scores.labels[best]
        predictions.append(Prediction(label=label, probability=probabilities[label], probabilities=probabilities))
    return predictions
