"""Test rows on which the methods disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from softprompt.comparison.report.ranking import MethodSummary
from softprompt.data.columns import INPUT_COLUMN, INSTRUCTED, TARGET_COLUMN, Task
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
    """Some of the inputs on which methods disagree.

    Attributes:
        shown: the first input of each pattern of disagreement, the most frequent pattern first, then the second of
            each.
        disagree, inputs: the number of inputs on which methods disagree, and of all inputs.
    """

    shown: list[Sample]
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
    found: dict[tuple[str, str], Sample] = {}
    for number, row in enumerate(rows):
        # Completions with the same input are several right answers to it.
        text = _input(row, task)
        key = (text, row[target] if task == "classification" else "")
        if key not in found:
            answers = [Answer(s, s.results[0].predictions[number], None) for s in summaries]
            found[key] = Sample(text, [], answers)
        if row[target] not in found[key].right:
            found[key].right.append(row[target])
    return [Sample(s.input, s.right, [_judged(answer, s.right) for answer in s.answers]) for s in found.values()]


def _input(row: Row, task: Task) -> str:
    """Return a row's input: of Alpaca's columns, the instruction and its input."""
    columns = INSTRUCTED if {*INSTRUCTED, "output"} <= row.keys() and task == "completion" else (INPUT_COLUMN[task],)
    return "\n".join(row[column] for column in columns if row[column])


def _judged(answer: Answer, right: list[str]) -> Answer:
    exact = answer.text.strip() in [text.strip() for text in right]
    judged = exact if answer.summary.task == "classification" else (exact or None)
    return Answer(answer.summary, answer.text, judged)
