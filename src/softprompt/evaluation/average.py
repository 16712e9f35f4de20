"""Ensembles: what several prompts found for the same rows, made one (Lester et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from softprompt.evaluation.calibration import shifted
from softprompt.evaluation.scores import LabelScores, Scorer, Scores
from softprompt.model.frozen import FrozenModel

_Scored = TypeVar("_Scored", bound=Scores)


def scored(
    scorer: Scorer,
    model: FrozenModel,
    prompts: Sequence[Tensor | None],
    biases: Sequence[Mapping[str, float]] = (),
) -> Scores:
    """Score a scorer's rows with one prompt, or with an ensemble's.

    Args:
        scorer: of the rows.
        model: the frozen model.
        prompts: `[P, H]` or `[L, 2, K, P, D]` each, or None for the untouched model.
        biases: for each prompt, the nats that are added to labels' log-likelihoods; none where it is empty.
    """
    return combine_scores(scorer.score_all(model, prompts), biases)


def combine_scores(members: Sequence[_Scored], biases: Sequence[Mapping[str, float]] = ()) -> _Scored:
    """Return the scores of one prompt, or of an ensemble of several, with the nats that `biases` add to labels."""
    if biases:
        members = [shifted(scores, bias) for scores, bias in zip(members, biases, strict=True)]
    return average_scores(members) if len(members) > 1 else members[0]


def average_scores(members: Sequence[_Scored]) -> _Scored:
    """Return the scores of an ensemble whose members' probabilities are averaged.

    A label's probability, its share among the labels, is the mean of the members'; `log_likelihoods` are its logarithm.
    The losses are those of a mixture that takes one member for a whole row: minus the logarithm of the mean probability
    that the members give to all of the target's tokens. Averaging token by token would be another mixture, with other
    losses; rows' likelihoods do not tell them.

    Args:
        members: for each prompt, what scoring the same rows with it gave.
    """
    first = members[0]
    losses = -_log_mean([-member.losses for member in members])
    if isinstance(first, LabelScores):
        shares = [member.log_shares() for member in members if isinstance(member, LabelScores)]
        return replace(first, losses=losses, log_likelihoods=_log_mean(shares))
    return replace(first, losses=losses)


def _log_mean(logs: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the logarithm of the mean of what the given numbers are the logarithms of."""
    mean: NDArray[np.float64] = np.logaddexp.reduce(np.stack(logs), axis=0) - np.log(len(logs))
    return mean
