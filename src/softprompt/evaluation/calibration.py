"""Calibration: what makes a label more likely whatever the text says is taken off its score.

Contextual calibration finds it behind texts that say nothing, prior matching behind real ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from softprompt.config import Calibration
from softprompt.data.encoder import Encoder
from softprompt.data.rows import Row, Rows
from softprompt.data.templates import Format
from softprompt.errors import SettingsError
from softprompt.evaluation.scores import (
    LabelScorer,
    LabelScores,
    Scorer,
    Scores,
    add_label_bias,
    average_scores,
    make_scorer,
)
from softprompt.prompt.ensemble import AnyPrompt

CONTENT_FREE = ("N/A", "[MASK]", "")  # those of Zhao et al. 2021
_ROUNDS = 10  # of prior matching; more change nothing to speak of


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
        free = content_free(encoder.format)
        numbers = None if rows.numbers is None else np.append(rows.numbers, np.zeros(len(free), np.int64))
        super().__init__(encoder, replace(rows, rows=[*rows, *free], numbers=numbers), at_once)
        self.rows = rows

    def combine(self, scores: Sequence[Scores], prompt: AnyPrompt) -> Scores:
        """Average an ensemble's members; calibration replaces a prompt's label bias."""
        return average_scores(scores)

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


def prior_matching(scores: LabelScores, train: Rows) -> dict[str, float]:
    """Return the nats to add to each label's log-likelihood so that on average it is as likely as it is frequent.

    The rows are used without their labels: each label's mean share among all is brought to its frequency in the
    training rows, by dividing by it what it is too large, again and again (Liusie et al. 2023, "Mitigating word bias in
    zero-shot prompt-based classifiers"; one round of it, for equally frequent labels, is the batch calibration of Zhou
    et al. 2024).

    Args:
        scores: of rows like those that will be asked.
        train: rows that tell how frequent labels are; each counts once more.
    """
    counts = Counter(row["label"] for row in train)
    frequencies = np.array([counts[label] + 1.0 for label in scores.labels])
    frequencies /= frequencies.sum()
    bias, rows = np.zeros(len(frequencies)), len(scores.rows)
    for _ in range(_ROUNDS):
        shares = replace(scores, log_likelihoods=scores.log_likelihoods + bias).probabilities().mean(axis=0)
        # One more row with the labels' frequencies: what no row takes for a label at all says little about it.
        bias -= np.log((rows * shares / frequencies + 1) / (rows + 1))
    return dict(zip(scores.labels, (bias - bias.mean()).tolist(), strict=True))


def fit_label_bias(plain: LabelScores, train: Rows) -> tuple[LabelScores, dict[str, float]]:
    """Find the bias that labels are chosen with, where one is of use (`prior_matching`).

    Until much is learned of them, some labels are chosen far more often than they occur. Later a bias does harm: by
    then the model knows better how often a label occurs than its frequency says. So it is taken where clearly more rows
    are right.

    Args:
        plain: of validation rows.
        train: rows that tell how frequent labels are.

    Returns:
        The scores, with the bias if it is taken; and the bias, empty if not.
    """
    label_bias = prior_matching(plain, train)
    found = add_label_bias(plain, label_bias)
    return (found, label_bias) if clearly_better(found, plain) else (plain, {})


def clearly_better(scores: LabelScores, than: LabelScores) -> bool:
    """Tell whether more rows are right, by more than one standard error of the change (McNemar 1947)."""
    change = (scores.predicted == scores.gold).astype(int) - (than.predicted == than.gold)
    return bool(change.sum() > np.sqrt(np.abs(change).sum()))
