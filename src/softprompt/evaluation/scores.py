"""Scores: what scoring rows gave, and the metrics that follow from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from softprompt.data.added_columns import add_columns
from softprompt.data.rows import Rows
from softprompt.evaluation.intervals import Metric, bootstrap, proportion

AnyScores = TypeVar("AnyScores", bound="Scores")


@dataclass(frozen=True)
class Scores(ABC):
    """The scores of some rows.

    Attributes:
        rows: the rows, N of them.
        losses: `[N]`, the loss of each row's target in nats, summed over its tokens.
        tokens: `[N]`, how many target tokens each row has.
    """

    rows: Rows
    losses: NDArray[np.float64]
    tokens: NDArray[np.int64]

    def loss(self, rows: NDArray[np.int64] | slice = slice(None)) -> float:
        """Return the loss in nats per target token."""
        return float(self.losses[rows].sum() / self.tokens[rows].sum())

    @abstractmethod
    def values(self) -> dict[str, float]:
        """Return the metrics without intervals, for the training loop."""

    @abstractmethod
    def metrics(self) -> dict[str, Metric]:
        """Return the metrics with intervals."""

    def confusion(self) -> Confusion | None:
        """Return the confusion matrix; None for tasks without labels."""
        return None

    @abstractmethod
    def statistics(self) -> list[list[float]]:
        """Return for each row the two sums that the task's primary metric divides, see `compute_metric`."""

    def better_than(self, other: Scores) -> bool:
        """Tell whether the loss is lower; accuracy on few rows varies more than prompts differ."""
        return self.loss() < other.loss()

    @abstractmethod
    def predictions(self) -> list[dict[str, Any]]:
        """Return each row with its prediction in added columns, for the predictions file."""


def perplexity(loss: float) -> float:
    """Return the perplexity of a loss in nats; infinite from about 709.8 nats on, where floats end."""
    with np.errstate(over="ignore"):
        return float(np.exp(loss))


@dataclass(frozen=True)
class TextScores(Scores):
    """Scores of plain text and completions: the loss of their target tokens."""

    def values(self) -> dict[str, float]:
        return {"loss": self.loss(), "perplexity": perplexity(self.loss())}

    def statistics(self) -> list[list[float]]:
        return [[float(loss), float(tokens)] for loss, tokens in zip(self.losses, self.tokens, strict=True)]

    def metrics(self) -> dict[str, Metric]:
        scored = np.flatnonzero(self.tokens)
        loss = bootstrap(lambda chosen: self.loss(scored[chosen]), len(scored))
        return {"loss": loss, "perplexity": Metric(**{k: perplexity(v) for k, v in loss.model_dump().items()})}

    def predictions(self) -> list[dict[str, Any]]:
        each = zip(self.rows, self.losses, self.tokens, strict=True)
        return [
            add_columns(row, {"loss": float(loss / tokens) if tokens else None, "tokens": int(tokens)})
            for row, loss, tokens in each
        ]


class Confusion(BaseModel):
    """A confusion matrix: `counts[i][j]` rows of label i were predicted as label j."""

    labels: list[str]
    counts: list[list[int]]

    def mistakes(self) -> list[tuple[int, str, str]]:
        """Return number of rows, right label and predicted label of each kind of error, the most frequent first."""
        each = [(n, self.labels[i], self.labels[j]) for i, row in enumerate(self.counts) for j, n in enumerate(row)]
        return sorted((m for m in each if m[0] and m[1] != m[2]), key=lambda mistake: -mistake[0])


@dataclass(frozen=True)
class LabelScores(Scores):
    """Scores of classification.

    Attributes:
        log_likelihoods: `[N, labels]`, the summed log-probabilities of each label's tokens.
        gold: `[N]`, the index of each row's right label.
    """

    log_likelihoods: NDArray[np.float64]
    labels: list[str]
    gold: NDArray[np.int64]

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable label of each row."""
        best: NDArray[np.int64] = self.log_likelihoods.argmax(axis=1)
        return best

    def log_shares(self) -> NDArray[np.float64]:
        """Return the logarithms of `probabilities`, `[N, labels]`: small ones do not become 0."""
        total = np.logaddexp.reduce(self.log_likelihoods, axis=1, keepdims=True)
        shares: NDArray[np.float64] = self.log_likelihoods - total
        return shares

    def probabilities(self) -> NDArray[np.float64]:
        """Return the labels' probabilities, `[N, labels]`; those of a row add up to 1."""
        shares: NDArray[np.float64] = np.exp(self.log_shares())
        return shares

    def macro_f1(self, rows: NDArray[np.int64] | slice = slice(None)) -> float:
        """Return the mean of the labels' F1, over labels that occur or are predicted (scikit-learn's definition)."""
        counts = self._counts(rows)
        both = counts.sum(axis=0) + counts.sum(axis=1)
        there = both > 0
        return float((2 * counts.diagonal()[there] / both[there]).mean())

    def confusion(self) -> Confusion:
        return Confusion(labels=self.labels, counts=self._counts(slice(None)).tolist())

    def statistics(self) -> list[list[float]]:
        return [[float(right), 1.0] for right in self.predicted == self.gold]

    def _counts(self, rows: NDArray[np.int64] | slice) -> NDArray[np.int64]:
        count = len(self.labels)
        flat = np.bincount(self.gold[rows] * count + self.predicted[rows], minlength=count * count)
        return flat.reshape(count, count)

    def values(self) -> dict[str, float]:
        right = float((self.predicted == self.gold).mean())
        return {"accuracy": right, "macro_f1": self.macro_f1(), "loss": self.loss()}

    def metrics(self) -> dict[str, Metric]:
        count = len(self.rows)
        return {
            "accuracy": proportion(self.predicted == self.gold),
            "macro_f1": bootstrap(self.macro_f1, count),
            "loss": bootstrap(self.loss, count),
        }

    def predictions(self) -> list[dict[str, Any]]:
        made = []
        for row, best, shares in zip(self.rows, self.predicted, self.probabilities(), strict=True):
            probabilities = {label: float(share) for label, share in zip(self.labels, shares, strict=True)}
            made.append(add_columns(row, {"prediction": self.labels[best], "probabilities": probabilities}))
        return made


def add_label_bias(scores: AnyScores, label_bias: Mapping[str, float]) -> AnyScores:
    """Return scores with a bias added to labels' log-likelihoods, in nats; 0 for labels that it does not name."""
    if not label_bias or not isinstance(scores, LabelScores):
        return scores
    bias = np.array([label_bias.get(label, 0.0) for label in scores.labels])
    return replace(scores, log_likelihoods=scores.log_likelihoods + bias)


def average_scores(members: Sequence[AnyScores]) -> AnyScores:
    """Return the scores of an ensemble whose members' probabilities are averaged (Lester et al. 2021, section 6).

    A label's probability is the mean of the members' (each normalized over the labels); `log_likelihoods` are its
    logarithm. The losses are those of a mixture over whole rows: minus the logarithm of the mean probability that the
    members give to all of the target's tokens. Averaging token by token would be another mixture, with other losses.

    Args:
        members: the scores of the same rows with each member. One alone is returned as it is.
    """
    first = members[0]
    if len(members) == 1:
        return first
    losses = -_log_mean([-member.losses for member in members])
    if isinstance(first, LabelScores):
        shares = [member.log_shares() for member in members if isinstance(member, LabelScores)]
        return replace(first, losses=losses, log_likelihoods=_log_mean(shares))
    return replace(first, losses=losses)


def _log_mean(logs: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the logarithm of the mean of numbers that are given as logarithms."""
    mean: NDArray[np.float64] = np.logaddexp.reduce(np.stack(logs), axis=0) - np.log(len(logs))
    return mean
