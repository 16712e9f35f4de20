"""Scoring rows with a prompt: the probability of every label, or the loss of every target token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import Tensor

from softprompt.data.added_columns import with_columns
from softprompt.data.batching import micro_batches, shard_by_length
from softprompt.data.encoder import Encoder
from softprompt.data.example import Example, shared_text
from softprompt.data.rows import Rows
from softprompt.distributed.collective import ALONE, Processes
from softprompt.errors import DataError, RunError, is_out_of_memory
from softprompt.evaluation.intervals import Metric, bootstrap, proportion
from softprompt.model.finite import what_is_not_finite
from softprompt.model.frozen import FrozenModel
from softprompt.model.memory import measure, micro_batch_tokens
from softprompt.prompt.ensemble import AnyPrompt

_AT_ONCE = 1024  # text tokens
_Scored = TypeVar("_Scored", bound="Scores")


@dataclass(frozen=True)
class Scores(ABC):
    """What scoring some rows gave.

    Attributes:
        rows: the rows.
        losses: nats of each row's target, summed over its tokens.
        tokens: how many target tokens each row has.
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
        """Return which labels were taken for which; None where there are no labels."""
        return None

    @abstractmethod
    def statistics(self) -> list[list[float]]:
        """Return for each row what the task's first metric is made from: a sum, and what it is divided by."""

    def better_than(self, other: Scores) -> bool:
        """Prefer the lower loss: on few rows, accuracy jumps up and down by more than prompts differ."""
        return self.loss() < other.loss()

    @abstractmethod
    def predictions(self) -> list[dict[str, Any]]:
        """Return a record a row, for the predictions file; a row's own columns are kept."""


def perplexity(loss: float) -> float:
    """Return the perplexity of a loss in nats; infinite where there is no number for it, from about 709.8 on."""
    with np.errstate(over="ignore"):
        return float(np.exp(loss))


@dataclass(frozen=True)
class TextScores(Scores):
    """Of plain text and completions: how well the target tokens were predicted."""

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
            with_columns(row, {"loss": float(loss / tokens) if tokens else None, "tokens": int(tokens)})
            for row, loss, tokens in each
        ]


class Confusion(BaseModel):
    """Which labels were taken for which: `counts[i][j]` rows of label i were predicted as label j."""

    labels: list[str]
    counts: list[list[int]]

    def mistakes(self) -> list[tuple[int, str, str]]:
        """Return number of rows, right label and predicted label of what went wrong, the most frequent first."""
        each = [(n, self.labels[i], self.labels[j]) for i, row in enumerate(self.counts) for j, n in enumerate(row)]
        return sorted((m for m in each if m[0] and m[1] != m[2]), key=lambda mistake: -mistake[0])


@dataclass(frozen=True)
class LabelScores(Scores):
    """Of classification: `log_likelihoods` `[N, labels]` are the summed log-probabilities of each label's tokens."""

    log_likelihoods: NDArray[np.float64]
    labels: list[str]
    gold: NDArray[np.int64]

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable label of each row."""
        best: NDArray[np.int64] = self.log_likelihoods.argmax(axis=1)
        return best

    def log_shares(self) -> NDArray[np.float64]:
        """Return the logarithm of each label's share, `[N, labels]`; small ones do not become 0."""
        together = np.logaddexp.reduce(self.log_likelihoods, axis=1, keepdims=True)
        shares: NDArray[np.float64] = self.log_likelihoods - together
        return shares

    def probabilities(self) -> NDArray[np.float64]:
        """Return each label's share, `[N, labels]`."""
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
            made.append(with_columns(row, {"prediction": self.labels[best], "probabilities": probabilities}))
        return made


def add_label_bias(scores: _Scored, label_bias: Mapping[str, float]) -> _Scored:
    """Return scores with a bias added to labels' log-likelihoods, in nats; 0 for labels that it does not name."""
    if not label_bias or not isinstance(scores, LabelScores):
        return scores
    bias = np.array([label_bias.get(label, 0.0) for label in scores.labels])
    return replace(scores, log_likelihoods=scores.log_likelihoods + bias)


def average_scores(members: Sequence[_Scored]) -> _Scored:
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


class Scorer(ABC):
    """Rows made ready to be scored again and again, with one prompt after the other.

    Attributes:
        rows: the rows.
        at_once: how many text tokens are run at once.
        processes: those that share the rows among them.
        shape: of what is found for the rows.
    """

    rows: Rows
    at_once: int
    shape: tuple[int, ...]
    processes: Processes = ALONE

    def score(self, model: FrozenModel, prompt: AnyPrompt) -> Scores:
        """Score the rows with a prompt: with its label bias, and averaged over the members of an ensemble.

        Raises:
            RunError: not even one row fits in memory, or the model's output is not finite.
        """
        return self.combine(self.score_members(model, prompt), prompt)

    def combine(self, scores: Sequence[Scores], prompt: AnyPrompt) -> Scores:
        """Return a prompt's scores from those of its members: add each one's label bias, then average."""
        biases = [member.label_bias for member in prompt.members]
        return average_scores([add_label_bias(each, bias) for each, bias in zip(scores, biases, strict=True)])

    def score_members(self, model: FrozenModel, prompt: AnyPrompt) -> list[Scores]:
        """Score the rows with every member of a prompt, without label biases; texts of all members are run together.

        Where memory runs out, fewer tokens are run at once.

        Raises:
            RunError: not even one row fits in memory, or the model's output is not finite.
        """
        weights = [member.weights for member in prompt.members]
        while True:
            try:
                return self._score(model, weights)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self.at_once == 1:
                    raise RunError("out of memory at scoring one row; try a smaller max_length or model") from error
            self.at_once //= 2

    @torch.no_grad()
    def _score(self, model: FrozenModel, weights: Sequence[Tensor | None]) -> list[Scores]:
        shape = (len(weights), *self.shape)
        found = self.processes.all_reduce(lambda: torch.from_numpy(self._found(model, weights)), shape)
        if not self._tells(found.numpy()):
            raise RunError(f"what the model says of a row is not finite: {what_is_not_finite(model.hf_model)}")
        return [self._scores(each) for each in found.numpy()]

    def _tells(self, found: NDArray[np.float64]) -> bool:
        """Tell whether what was found for all rows can be compared."""
        return not bool(np.isnan(found).any())

    @abstractmethod
    def _found(self, model: FrozenModel, weights: Sequence[Tensor | None]) -> NDArray[np.float64]:
        """Return what this process finds for its share of the rows, of shape `shape` a prompt, and 0 for the others."""

    @abstractmethod
    def _scores(self, found: NDArray[np.float64]) -> Scores:
        """Return the scores that follow from what was found for all rows with one prompt."""

    def _parts(
        self, examples: Sequence[Example], prompts: int, shared_text_len: int, padded: bool
    ) -> list[tuple[list[int], list[int]]]:
        """Cut this process's share of the rows, each behind every prompt, into micro-batches.

        Returns:
            For each micro-batch, which prompts and which examples behind them.
        """
        dealt = shard_by_length(examples, self.processes.count)[self.processes.rank]
        mine = [(k, i) for i in dealt for k in range(prompts)]
        cut = micro_batches([examples[i] for _, i in mine], self.at_once, shared_text_len, padded)
        return [([mine[place][0] for place in part], [mine[place][1] for place in part]) for part in cut]


class TextScorer(Scorer):
    """Sums the loss over each row's target tokens.

    A text's very first token is left out: without a prompt nothing predicts it, and the same tokens have to count
    with and without.
    """

    def __init__(self, encoder: Encoder, rows: Rows, at_once: int = _AT_ONCE) -> None:
        self.rows, self.at_once = rows, at_once
        self.examples = [example.predicted for example in encoder.examples(rows)]
        self.scored = [i for i, e in enumerate(self.examples) if e.targets]
        if not self.scored:
            raise DataError(f"{rows.name}: no text has a second token, so there is nothing to predict")
        self.shape = (len(self.examples),)

    def _found(self, model: FrozenModel, weights: Sequence[Tensor | None]) -> NDArray[np.float64]:
        scored = [self.examples[i] for i in self.scored]
        text = shared_text(scored)
        prefixes = [model.prefix(each, text) for each in weights]
        losses = np.zeros((len(weights), *self.shape))
        for which, part in self._parts(scored, len(weights), len(text), model.backend.pads):
            examples = [scored[i] for i in part]
            each = model.loss([prefixes[k] for k in which], examples).cpu().double()
            for k, i, values in zip(which, part, each.split([e.targets for e in examples]), strict=True):
                losses[k, self.scored[i]] = float(values.sum())
        return losses

    def _scores(self, found: NDArray[np.float64]) -> TextScores:
        return TextScores(self.rows, found, np.array([e.targets for e in self.examples]))


class LabelScorer(Scorer):
    """Sums the log-probability of every label's tokens behind each row's input."""

    def __init__(self, encoder: Encoder, rows: Rows, at_once: int = _AT_ONCE) -> None:
        self.rows, self.at_once = rows, at_once
        self.choices = encoder.choices(rows)
        self.labels = list(encoder.format.verbalizers)
        self.gold = np.array([self.labels.index(row["label"]) for row in rows])
        self.shape = (len(self.choices), len(self.labels))

    def _found(self, model: FrozenModel, weights: Sequence[Tensor | None]) -> NDArray[np.float64]:
        prefixes = model.shared_prefixes(weights, [choice.input_ids for choice in self.choices])
        likelihoods = np.zeros((len(weights), *self.shape))
        examples = [Example(choice.ids, 0) for choice in self.choices]
        for which, part in self._parts(examples, len(weights), len(prefixes[0].shared_text_ids), model.backend.pads):
            found = model.score([prefixes[k] for k in which], [self.choices[i] for i in part])
            likelihoods[which, part] = found.numpy()
        return likelihoods

    def _tells(self, found: NDArray[np.float64]) -> bool:
        return super()._tells(found) and bool((found > -np.inf).any(axis=-1).all())  # of each row, some label

    def _scores(self, found: NDArray[np.float64]) -> LabelScores:
        tokens = np.array([len(c.tails[g]) for c, g in zip(self.choices, self.gold, strict=True)])
        losses = -found[np.arange(len(found)), self.gold]
        return LabelScores(self.rows, losses, tokens, found, self.labels, self.gold)


def tokens_at_once(model: FrozenModel, rows: Rows, prompt: AnyPrompt, longest: int) -> int:
    """Predict how many text tokens of rows can be scored at once with a prompt."""
    share = 0.0 if rows.task == "classification" else 1.0
    memory_estimate = replace(measure(model, prompt.num_virtual_tokens), prefixes=len(prompt.members))
    return micro_batch_tokens(model.device, memory_estimate, 1, longest, share, scoring=True)


def make_scorer(encoder: Encoder, rows: Rows, at_once: int = _AT_ONCE) -> Scorer:
    """Return the scorer of a task; `at_once` text tokens are run together."""
    return (LabelScorer if encoder.format.task == "classification" else TextScorer)(encoder, rows, at_once)
