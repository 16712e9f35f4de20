"""The report's tables: the tutorial's, filled with measurements; every figure; and which labels were confused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from softprompt.comparison.report.ranking import PICKED, MethodSummary, second
from softprompt.evaluation.intervals import Metric
from softprompt.evaluation.scores import Confusion
from softprompt.formatting import count, duration, gap_interval, interval, metric, metric_title, plain, signed_gap, size

TO_BEST = "Difference to the best"
PARAMETERS, TRAINING = "Trainable parameters", "Time to train or choose"
MEMORY, STORED, PREDICTION = "Peak memory above the model", "Disk space for each task", "Time per prediction"
_MOST_LABELS = 10  # whose matrix can be read
_MOST_MISTAKES = 12


@dataclass(frozen=True)
class Cell:
    """A figure, and its detail."""

    text: str
    detail: str = ""


Table = dict[str, dict[str, list[Cell]]]  # by the titles of groups and of lines, one cell per method


def full_table(summaries: Sequence[MethodSummary]) -> Table:
    """Return every measured figure."""

    def cost(words: Callable[[float], str], name: str) -> list[Cell]:
        return [Cell(words(getattr(s.costs, name))) for s in summaries]

    primary = summaries[0].primary
    others = dict.fromkeys(n for s in summaries for r in s.results for n in r.metrics if n != primary)
    return {
        "Quality": {
            metric_title(primary): [_figure(s) for s in summaries],
            TO_BEST: [_to_best(s, summaries) for s in summaries],
            **{metric_title(name): [_other(s, name) for s in summaries] for name in others},
        },
        "Training needed": {
            PARAMETERS: cost(count, "trainable_parameters"),
            TRAINING: cost(duration, "train_seconds"),
            "Processor time for that": cost(duration, "train_cpu_seconds"),
            "Text tokens trained on": cost(count, "train_tokens"),
        },
        "Resource intensity": {
            MEMORY: cost(size, "peak_bytes"),
            STORED: cost(size, "stored_bytes"),
            PREDICTION: cost(duration, "prediction_seconds"),
            "Time to switch tasks": cost(duration, "switch_seconds"),
        },
        "The model besides the task": {
            "Base weights unchanged": [Cell("yes" if s.costs.base_unchanged else "no") for s in summaries],
            "Perplexity on unrelated text": [_perplexity(s) for s in summaries],
        },
    }


def _figure(summary: MethodSummary) -> Cell:
    name = summary.primary
    detail = interval(name, summary.figure)
    if len(summary.results) > 1:
        values = [r.primary.value for r in summary.results]
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            detail += f"; seeds {interval(name, Metric(value=finite[0], low=min(finite), high=max(finite)))}"
        if len(finite) < len(values):
            detail += f"; {len(values) - len(finite)} of {len(values)} seeds without a finite number"
    return Cell(metric(name, summary.figure.value), detail)


def _to_best(summary: MethodSummary, summaries: Sequence[MethodSummary]) -> Cell:
    by = summary.to_best
    if by is None:
        return _best(summary, summaries)
    if not math.isfinite(by.value):
        return Cell("–", "cannot be compared")
    significance = "; not significant" if summary.tied else ""
    return Cell(signed_gap(summary.primary, by.value), gap_interval(summary.primary, by) + significance)


def _best(summary: MethodSummary, summaries: Sequence[MethodSummary]) -> Cell:
    if not summary.can_be_best:
        return Cell("–", "no method is the best")
    following = second(summaries)
    if following is None or following.to_best is None:
        return Cell("best", PICKED if len(summaries) > 1 else "")
    by = following.to_best
    lead = Metric(value=-by.value, low=-by.high, high=-by.low)
    shown = f"{signed_gap(summary.primary, lead.value)} ({gap_interval(summary.primary, lead)})"
    return Cell("best", f"{shown} to the second, {following.info.phrase}; {PICKED}")


def _other(summary: MethodSummary, name: str) -> Cell:
    found = [r.metrics[name] for r in summary.results if name in r.metrics]
    if not found:
        return Cell("–")
    # Intervals of several seeds cannot be combined: the mean has none.
    detail = interval(name, found[0]) if len(found) == 1 else ""
    return Cell(metric(name, float(np.mean([m.value for m in found]))), detail)


def resources(summary: MethodSummary) -> Cell:
    """Return a method's resource intensity."""
    costs = summary.costs
    return Cell(
        f"{size(costs.peak_bytes)} of memory above the model",
        f"{size(costs.stored_bytes)} on disk for each task; {duration(costs.prediction_seconds)} per prediction",
    )


def training(summary: MethodSummary) -> Cell:
    """Return what training a method needs."""
    costs = summary.costs
    needed = summary.info.training or ("yes" if summary.learns else "no")
    parameters = f"{count(costs.trainable_parameters)} parameters, " if summary.learns else ""
    return Cell(needed, f"{parameters}{duration(costs.train_seconds)}")


def _perplexity(summary: MethodSummary) -> Cell:
    before, after = summary.costs.perplexity_before, summary.costs.perplexity_after
    if before == after:
        return Cell(plain(after), "exactly as before")
    return Cell(f"{plain(before)} → {plain(after)}", "before → after")


@dataclass(frozen=True)
class ConfusionTable:
    """Which labels a method confused, over all its seeds.

    Attributes:
        matrix: for each right label, the number of rows predicted as each label, and their share of the label's rows.
        frequent: the most frequent mistakes, where the labels are too many for a matrix: number of rows, right label,
            predicted label.
    """

    summary: MethodSummary
    labels: list[str]
    matrix: list[list[tuple[int, float]]]
    frequent: list[tuple[int, str, str]]


def confusion_table(summary: MethodSummary) -> ConfusionTable | None:
    """Return which labels a method confused; None unless this is classification."""
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
