"""Which labels a method took for which."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from softprompt.comparison.report.ranking import MethodSummary
from softprompt.evaluation.scores import Confusion

_MOST_LABELS = 10  # whose matrix can be read
_MOST_MISTAKES = 12


@dataclass(frozen=True)
class ConfusionTable:
    """What a method took for what, over all its seeds.

    Attributes:
        summary: the method.
        labels: of the matrix; empty where there are too many for one.
        matrix: for each right label, the number of rows predicted as each label, with its share of the right label's.
        frequent: instead of a matrix the most frequent mistakes: number of rows, right label, predicted label.
    """

    summary: MethodSummary
    labels: list[str]
    matrix: list[list[tuple[int, float]]]
    frequent: list[tuple[int, str, str]]


def mistakes(summary: MethodSummary) -> ConfusionTable | None:
    """Return what a method took for what; None unless this is classification."""
    found = [r.confusion for r in summary.results if r.confusion is not None]
    if not found:
        return None
    labels = found[0].labels
    counts = np.sum([c.counts for c in found], axis=0)
    if len(labels) > _MOST_LABELS:
        frequent = Confusion(labels=labels, counts=counts.tolist()).mistakes()
        return ConfusionTable(summary, [], [], frequent[:_MOST_MISTAKES])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    matrix = [list(zip(*both, strict=True)) for both in zip(counts.tolist(), shares.tolist(), strict=True)]
    return ConfusionTable(summary, labels, matrix, [])
