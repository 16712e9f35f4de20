"""Contextual calibration: what a model makes of each label behind a text that says nothing is taken off its score."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from softprompt.config import Calibration
from softprompt.data.examples import Encoder
from softprompt.data.rows import Row, Rows
from softprompt.data.templates import Format
from softprompt.errors import SettingsError
from softprompt.evaluation.scoring import LabelScorer, LabelScores, Scorer, make_scorer

CONTENT_FREE = ("N/A", "[MASK]", "")  # those of Zhao et al. 2021


@dataclass(frozen=True)
class CalibratedScores(LabelScores):
    """Label scores whose `log_likelihoods` were shifted; predictions and probabilities follow from the shifted ones.

    Losses are not: they stay the nats of the target's tokens. Calibration changes which label is chosen, not what the
    model expects of a token, and so losses with and without it can be compared.

    Attributes:
        plain: the scores as they were.
    """

    plain: LabelScores


class CalibratedScorer(LabelScorer):
    """Scores labels less their mean log-likelihood behind inputs without content.

    Zhao et al. 2021, "Calibrate before use", for labels of any number of tokens: their probabilities over a label's
    one token, divided by those of the content-free inputs, are these differences. The inputs are scored along with the
    rows, behind the same demonstrations and the same virtual tokens.

    Raises:
        SettingsError: the task has no labels.
    """

    def __init__(self, encoder: Encoder, rows: Rows, at_once: int) -> None:
        if rows.task != "classification":
            raise SettingsError(f"calibration is for labels, and {rows.task} has none; leave calibration out")
        super().__init__(encoder, Rows([*rows, *content_free(encoder.format)], rows.task, rows.name), at_once)
        self.rows = rows

    def _scores(self, found: NDArray[np.float64]) -> CalibratedScores:
        both, own = super()._scores(found), slice(len(self.rows))
        plain = replace(
            both, losses=both.losses[own], tokens=both.tokens[own], log_likelihoods=found[own], gold=both.gold[own]
        )
        shifted = found[own] - found[len(self.rows) :].mean(axis=0)
        return CalibratedScores(plain.rows, plain.losses, plain.tokens, shifted, plain.labels, plain.gold, plain)


def content_free(form: Format) -> list[Row]:
    """Return rows that say nothing, in all columns of a template; the empty one only where other text is left."""
    label = next(iter(form.verbalizers))  # every row has one; it is not read
    rows = [{**dict.fromkeys(form.columns, text), "label": label} for text in CONTENT_FREE]
    return [row for row in rows if form.input(row)]


def calibrated_or_plain(encoder: Encoder, rows: Rows, at_once: int, calibration: Calibration) -> Scorer:
    """Return the scorer of a task, with calibration or without; `at_once` text tokens are run together.

    Raises:
        SettingsError: an unknown calibration, or one for a task without labels.
    """
    if calibration not in get_args(Calibration):
        raise SettingsError(f"calibration {calibration!r} is unknown; allowed are {', '.join(get_args(Calibration))}")
    return (make_scorer if calibration == "none" else CalibratedScorer)(encoder, rows, at_once)
