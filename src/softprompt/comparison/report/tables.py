"""The tutorial's table, filled with measurements: a short one, and every figure behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from softprompt.comparison.report.ranking import PICKED, MethodSummary, negative, second
from softprompt.comparison.results import Costs
from softprompt.evaluation.intervals import Metric
from softprompt.formatting import (
    count,
    duration,
    gap_interval,
    interval,
    metric,
    metric_title,
    plain,
    signed_gap,
    size,
)

PARAMETERS, TRAINING = "Trainable parameters", "Time to train or choose"
MEMORY, KEPT, PREDICTION = "Peak memory above the model", "To keep for each task", "Time per prediction"


@dataclass(frozen=True)
class Cell:
    """A figure, and what has to stand beside it."""

    text: str
    detail: str = ""


@dataclass(frozen=True)
class Line:
    """A row of figures, one cell a method."""

    title: str
    cells: list[Cell]


@dataclass(frozen=True)
class Group:
    """Rows that belong together."""

    title: str
    lines: list[Line]


@dataclass(frozen=True)
class Short:
    """A method's row of the tutorial's table."""

    summary: MethodSummary
    figure: Cell
    to_best: Cell
    resources: Cell
    training: Cell


def short_table(summaries: Sequence[MethodSummary]) -> list[Short]:
    """Return the tutorial's table: resource intensity, training needed, what it is best for, and how well it did."""
    return [Short(s, _figure(s), _to_best(s, summaries), _resources(s), _training(s)) for s in summaries]


def full_table(summaries: Sequence[MethodSummary]) -> list[Group]:
    """Return every figure that was measured, methods side by side."""

    def line(title: str, cell: Callable[[MethodSummary], Cell]) -> Line:
        return Line(title, [cell(s) for s in summaries])

    def cost(title: str, words: Callable[[float], str], value: Callable[[Costs], float]) -> Line:
        return line(title, lambda s: Cell(words(value(s.costs))))

    def of_metric(name: str) -> Line:
        return line(metric_title(name), lambda s: _other(s, name))

    primary = summaries[0].primary
    others = dict.fromkeys(n for s in summaries for r in s.results for n in r.metrics if n != primary)
    return [
        Group(
            "Quality",
            [
                line(metric_title(primary), _figure),
                line("Difference to the best", lambda s: _to_best(s, summaries)),
                *map(of_metric, others),
            ],
        ),
        Group(
            "Training needed",
            [
                cost(PARAMETERS, count, lambda c: c.trainable_parameters),
                cost(TRAINING, duration, lambda c: c.train_seconds),
                cost("Processor time for that", duration, lambda c: c.train_cpu_seconds),
                cost("Text tokens learned from", count, lambda c: c.train_tokens),
            ],
        ),
        Group(
            "Resource intensity",
            [
                cost(MEMORY, size, lambda c: c.peak_bytes),
                cost(KEPT, size, lambda c: c.stored_bytes),
                cost(PREDICTION, duration, lambda c: c.prediction_seconds),
                cost("Time to switch tasks", duration, lambda c: c.switch_seconds),
            ],
        ),
        Group(
            "The model besides the task",
            [
                line("Base weights unchanged", lambda s: Cell("yes" if s.costs.base_unchanged else "no")),
                line("Perplexity on unrelated text", _perplexity),
            ],
        ),
    ]


def _figure(summary: MethodSummary) -> Cell:
    name = summary.primary
    detail = interval(name, summary.figure)
    if len(summary.results) > 1:
        values = [r.primary.value for r in summary.results]
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            detail += f"; seeds {interval(name, Metric(value=finite[0], low=min(finite), high=max(finite)))}"
        if len(finite) < len(values):
            detail += f"; of {len(values) - len(finite)} of {len(values)} seeds no finite number"
    return Cell(metric(name, summary.figure.value), detail)


def _to_best(summary: MethodSummary, summaries: Sequence[MethodSummary]) -> Cell:
    by = summary.to_best
    if by is None:
        return _best(summary, summaries)
    if not math.isfinite(by.value):
        return Cell("–", "cannot be compared")
    told = "; cannot be told apart" if summary.tied else ""
    return Cell(signed_gap(summary.primary, by.value), gap_interval(summary.primary, by) + told)


def _best(summary: MethodSummary, summaries: Sequence[MethodSummary]) -> Cell:
    if not summary.can_be_best:
        return Cell("–", "no method is the best")
    following = second(summaries)
    if following is None or following.to_best is None:
        return Cell("best", PICKED if len(summaries) > 1 else "")
    lead = negative(following.to_best)
    ahead = f"{signed_gap(summary.primary, lead.value)} ({gap_interval(summary.primary, lead)})"
    return Cell("best", f"{ahead} to the next, {following.kind.phrase}; {PICKED}")


def _other(summary: MethodSummary, name: str) -> Cell:
    found = [r.metrics[name] for r in summary.results if name in r.metrics]
    if not found:
        return Cell("–")
    # Several seeds' intervals cannot be put together: the mean stands alone.
    detail = interval(name, found[0]) if len(found) == 1 else ""
    return Cell(metric(name, float(np.mean([m.value for m in found]))), detail)


def _resources(summary: MethodSummary) -> Cell:
    costs = summary.costs
    return Cell(
        f"{size(costs.peak_bytes)} of memory above the model",
        f"{size(costs.stored_bytes)} to keep for each task; {duration(costs.prediction_seconds)} a prediction",
    )


def _training(summary: MethodSummary) -> Cell:
    costs = summary.costs
    needed = summary.kind.training or ("yes" if summary.learns else "no")
    learned = f"{count(costs.trainable_parameters)} numbers, " if summary.learns else ""
    return Cell(needed, f"{learned}{duration(costs.train_seconds)}")


def _perplexity(summary: MethodSummary) -> Cell:
    before, after = summary.costs.perplexity_before, summary.costs.perplexity_after
    if before == after:
        return Cell(plain(after), "exactly as before")
    return Cell(f"{plain(before)} → {plain(after)}", "before → after")
