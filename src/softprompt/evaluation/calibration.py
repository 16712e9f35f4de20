"""Calibration: correcting labels that are likely whatever the text says.

Contextual calibration measures that with texts without content, prior matching with real ones.
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
from softprompt.evaluation.label_scorer import LabelScorer
from softprompt.evaluation.scorer import MICRO_BATCH_TOKENS, Scorer
from softprompt.evaluation.scores import LabelScores, Scores, add_label_bias, average_scores
from softprompt.evaluation.token_scorer import TokenScorer
from softprompt.prompt.ensemble import AnyPrompt

CONTENT_FREE = ("N/A", "[MASK]", "")  # those of Zhao et al. 2021
_ROUNDS = 10  # of prior matching; more make no difference


@dataclass(frozen=True)
class CalibratedScores(LabelScores):
    """Label scores with calibrated `log_likelihoods`, from which predictions and probabilities follow.

    Losses are not calibrated: they stay the nats of the target's tokens, so that losses with and without calibration
    can be compared.
    """

    plain: LabelScores


class CalibratedScorer(LabelScorer):
    """Subtracts from each label's log-likelihood its mean over inputs without content (Zhao et al. 2021).

    For labels of one token this is the paper's division of probabilities. The inputs without content are scored along
    with the rows, after the same demonstrations and the same virtual tokens.
    """

    def __init__(self, encoder: Encoder, rows: Rows, micro_batch_tokens: int) -> None:
        if rows.task != "classification":
            raise SettingsError(f"calibration is for labels, and {rows.task} has none; leave calibration out")
        free = content_free(encoder.format)
        numbers = None if rows.row_numbers is None else np.append(rows.row_numbers, np.zeros(len(free), np.int64))
        super().__init__(encoder, replace(rows, rows=[*rows, *free], row_numbers=numbers), micro_batch_tokens)
        self.rows = rows

    def combine(self, scores: Sequence[Scores], prompt: AnyPrompt) -> Scores:
        """Average an ensemble's members; calibration replaces a prompt's label bias."""
        return average_scores(scores)

    def _to_scores(self, values: NDArray[np.float64]) -> CalibratedScores:
        both, own = super()._to_scores(values), slice(len(self.rows))
        plain = replace(
            both, losses=both.losses[own], tokens=both.tokens[own], log_likelihoods=values[own], gold=both.gold[own]
        )
        calibrated = values[own] - values[len(self.rows) :].mean(axis=0)
        return CalibratedScores(plain.rows, plain.losses, plain.tokens, calibrated, plain.labels, plain.gold, plain)


def content_free(form: Format) -> list[Row]:
    """Return rows without content in all columns of a template; the empty one only where the template has text."""
    label = next(iter(form.verbalizers))  # every row has one; it is not read
    rows = [{**dict.fromkeys(form.columns, text), "label": label} for text in CONTENT_FREE]
    return [row for row in rows if form.input(row)]


def make_scorer(
    encoder: Encoder, rows: Rows, micro_batch_tokens: int = MICRO_BATCH_TOKENS, calibration: Calibration = "none"
) -> Scorer:
    """Return the scorer of a task.

    Raises:
        SettingsError: an unknown calibration, or one for a task without labels.
    """
    if calibration not in get_args(Calibration):
        raise SettingsError(f"calibration {calibration!r} is unknown; allowed are {', '.join(get_args(Calibration))}")
    if calibration != "none":
        return CalibratedScorer(encoder, rows, micro_batch_tokens)
    return (LabelScorer if encoder.format.task == "classification" else TokenScorer)(encoder, rows, micro_batch_tokens)


def prior_matching(scores: LabelScores, train: Rows) -> dict[str, float]:
    """Return the label bias, in nats, that makes each label on average as likely as it is frequent.

    The labels of the scored rows are not used. Each label's mean probability over the rows is brought to its frequency
    in the training rows, by dividing repeatedly by the ratio of the two (Liusie et al. 2023, "Mitigating word bias in
    zero-shot prompt-based classifiers"; one round of it, for equally frequent labels, is the batch calibration of Zhou
    et al. 2024).

    Args:
        scores: of rows like those that will be predicted.
        train: rows that give the labels' frequencies; each label counts once more.
    """
    counts = Counter(row["label"] for row in train)
    frequencies = np.array([counts[label] + 1.0 for label in scores.labels])
    frequencies /= frequencies.sum()
    bias, rows = np.zeros(len(frequencies)), len(scores.rows)
    for _ in range(_ROUNDS):
        shares = replace(scores, log_likelihoods=scores.log_likelihoods + bias).probabilities().mean(axis=0)
        # One more row with the labels' frequencies limits the bias of labels that are likely in no row.
        bias -= np.log((rows * shares / frequencies + 1) / (rows + 1))
    return dict(zip(scores.labels, (bias - bias.mean()).tolist(), strict=True))


def fit_label_bias(plain: LabelScores, train: Rows) -> tuple[LabelScores, dict[str, float]]:
    """Fit a bias per label (`prior_matching`) and return scores and bias, which is empty unless it clearly helps.

    After little training, some labels are predicted far more often than they occur, and a bias helps. After more
    training it does harm: the model then predicts labels' frequencies better than the training rows do.

    Args:
        plain: of validation rows.
        train: rows that give the labels' frequencies.
    """
    label_bias = prior_matching(plain, train)
    biased = add_label_bias(plain, label_bias)
    return (biased, label_bias) if is_clearly_better(biased, plain) else (plain, {})


def is_clearly_better(scores: LabelScores, than: LabelScores) -> bool:
    """Tell whether more rows are right, by more than one standard error of the difference (McNemar 1947)."""
    change = (scores.predicted == scores.gold).astype(int) - (than.predicted == than.gold)
    return bool(change.sum() > np.sqrt(np.abs(change).sum()))
