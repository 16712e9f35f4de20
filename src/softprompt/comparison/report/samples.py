"""Test rows on which the methods disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from softprompt.comparison.report.ranking import MethodSummary
from softprompt.data.columns import INPUT_COLUMN, INSTRUCTED, TARGET_COLUMN
from softprompt.data.rows import Row

_MOST = 8


@dataclass(frozen=True)
class Answer:
    """A method's answer; `right` is None where an answer can be good without being one of the references."""

    summary: MethodSummary
    text: str
    right: bool | None


@dataclass(frozen=True)
class Sample:
    """A test input, all its right answers, and what the methods answered with their first seed."""

    input: str
    right: list[str]
    answers: list[Answer]


@dataclass(frozen=True)
class Samples:
    """Some of the inputs on which methods disagree, and the numbers of these and of all inputs."""

    shown: list[Sample]  # the first of each pattern of disagreement, the most frequent first, then the second of each
    disagree: int
    inputs: int


def choose_samples(summaries: Sequence[MethodSummary], rows: Sequence[Row]) -> Samples:
    """Choose inputs on which methods disagree; of a single method, any.

    A pattern of disagreement is which of the methods are right; the choice is automatic.
    """
    summaries = [s for s in summaries if s.results[0].predictions]
    if not summaries:
        return Samples([], 0, 0)
    samples = _samples(summaries, rows)
    differing = [s for s in samples if len({a.text for a in s.answers}) > 1 or len(summaries) == 1]
    by_pattern: dict[tuple[bool | None, ...], list[Sample]] = {}
    for sample in differing:
        by_pattern.setdefault(tuple(a.right for a in sample.answers), []).append(sample)
    groups = sorted(by_pattern.values(), key=len, reverse=True)
    in_turn = [sample for turn in zip_longest(*groups) for sample in turn if sample is not None]
    return Samples(in_turn[:_MOST], len(differing) if len(summaries) > 1 else 0, len(samples))


def _samples(summaries: Sequence[MethodSummary], rows: Sequence[Row]) -> list[Sample]:
    task = summaries[0].task
    target = TARGET_COLUMN[task]
    assert target is not None  # plain text has no predictions
    # Completions with the same input are several right answers to it: the first row's number, and the answers.
    found: dict[tuple[str, str], tuple[int, list[str]]] = {}
    for number, row in enumerate(rows):
        instructed = task == "completion" and {*INSTRUCTED, "output"} <= row.keys()
        columns = INSTRUCTED if instructed else (INPUT_COLUMN[task],)
        text = "\n".join(row[column] for column in columns if row[column])
        _, right = found.setdefault((text, row[target] if task == "classification" else ""), (number, []))
        if row[target] not in right:
            right.append(row[target])

    def answer(summary: MethodSummary, number: int, right: list[str]) -> Answer:
        text = summary.results[0].predictions[number]
        exact = text.strip() in [reference.strip() for reference in right]
        return Answer(summary, text, exact if task == "classification" else (exact or None))

    return [
        Sample(text, right, [answer(summary, number, right) for summary in summaries])
        for (text, _), (number, right) in found.items()
    ]
