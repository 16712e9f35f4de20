"""Test rows on which the methods disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from softprompt.comparison.report.ranking import MethodSummary
from softprompt.data.columns import INPUT_COLUMN, INSTRUCTED, TARGET_COLUMN, Task
from softprompt.data.rows import Row

_MOST = 8


@dataclass(frozen=True)
class Answer:
    """What a method answered; `right` is None where an answer can be good without being one of the right ones."""

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
        shown: the first input of each way to disagree, the most frequent way first, then the second of each.
        disagree, inputs: how many inputs of how many.
    """

    shown: list[Sample]
    disagree: int
    inputs: int


def choose_samples(summaries: Sequence[MethodSummary], rows: Sequence[Row]) -> Samples:
    """Choose inputs on which methods disagree; of a single method, any.

    A way to disagree is which of the methods are right: nothing is chosen by hand.
    """
    summaries = [s for s in summaries if s.results[0].predictions]
    if not summaries:
        return Samples([], 0, 0)
    samples = _samples(summaries, rows)
    apart = [s for s in samples if len({a.text for a in s.answers}) > 1 or len(summaries) == 1]
    by_way: dict[tuple[bool | None, ...], list[Sample]] = {}
    for sample in apart:
        by_way.setdefault(tuple(a.right for a in sample.answers), []).append(sample)
    ways = sorted(by_way, key=lambda way: -len(by_way[way]))
    longest = max(map(len, by_way.values()), default=0)
    dealt = [by_way[way][turn] for turn in range(longest) for way in ways if turn < len(by_way[way])]
    return Samples(dealt[:_MOST], len(apart) if len(summaries) > 1 else 0, len(samples))


def _samples(summaries: Sequence[MethodSummary], rows: Sequence[Row]) -> list[Sample]:
    task = summaries[0].task
    target = TARGET_COLUMN[task]
    assert target is not None  # plain text has no predictions
    found: dict[tuple[str, str], Sample] = {}
    for number, row in enumerate(rows):
        # Completions that share an input are several right answers to it.
        asked = _asked(row, task)
        key = (asked, row[target] if task == "classification" else "")
        if key not in found:
            answers = [Answer(s, s.results[0].predictions[number], None) for s in summaries]
            found[key] = Sample(asked, [], answers)
        if row[target] not in found[key].right:
            found[key].right.append(row[target])
    return [Sample(s.input, s.right, [_judged(answer, s.right) for answer in s.answers]) for s in found.values()]


def _asked(row: Row, task: Task) -> str:
    """Return what a row asks: of Alpaca's columns, the instruction and the input that it is about."""
    columns = INSTRUCTED if {*INSTRUCTED, "output"} <= row.keys() and task == "completion" else (INPUT_COLUMN[task],)
    return "\n".join(row[column] for column in columns if row[column])


def _judged(answer: Answer, right: list[str]) -> Answer:
    exact = answer.text.strip() in [text.strip() for text in right]
    judged = exact if answer.summary.task == "classification" else (exact or None)
    return Answer(answer.summary, answer.text, judged)
