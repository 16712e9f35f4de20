"""How a comparison was measured: rows, seeds, settings and machine, and what the figures mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from softprompt.comparison.report.ranking import MethodSummary
from softprompt.comparison.results import Result
from softprompt.data.rows import Row
from softprompt.formatting import count

_LONGEST_VALUE = 200
_PARTS = {"train": "training", "validation": "validation"}


@dataclass(frozen=True)
class ExperimentSetup:
    """How a comparison was measured."""

    summary: str  # rows, seeds and days
    notes: list[str]  # what the figures mean
    shared: dict[str, str]  # settings of all methods
    own: dict[str, dict[str, str]]  # each method's other settings
    environments: list[dict[str, str]]  # the distinct versions and machines


def experiment_setup(summaries: Sequence[MethodSummary], rows: Sequence[Row]) -> ExperimentSetup:
    """Collect how a comparison was measured."""
    results = [r for s in summaries for r in s.results]
    shared, own = _settings(summaries)
    environments = [r.environment for r in results]
    return ExperimentSetup(
        summary=", ".join([_rows(results, rows), _seeds(summaries), *_days(results)]),
        notes=_notes(summaries),
        shared=shared,
        own=own,
        environments=[e for n, e in enumerate(environments) if e and e not in environments[:n]],
    )


_NOTES = [
    "All methods had the same rows, template and label texts, and were scored by the same code.",
    "Intervals are 95 % intervals over the test rows: they show how much a figure varies with the choice of rows, not "
    "of seeds. With several seeds a figure is their mean.",
    "Differences are tested by a paired bootstrap: the same test rows are sampled for both methods, 2,000 times (Koehn "
    "2004). A difference is not significant where its 95 % interval contains 0.",
    "The recommended method is the cheapest of those that are not significantly worse than the best. Cheapest: no "
    "training first, then the fewest bytes per task, then the least processor time.",
    "Costs are means over the seeds. Memory is the peak above the loaded model while training or choosing; the time to "
    "switch tasks is the time to load another task's files and answer a first row.",
]


_RANKED = {
    "exact_match": "exact match, because most right answers have fewer than four words",
    "chrf": "chrF, which counts characters, because most right answers have no spaces, or some are short and some long",
    "bleu": "BLEU, because most right answers have at least four words between spaces",
}


def _notes(summaries: Sequence[MethodSummary]) -> list[str]:
    found = list(_NOTES)
    by = _RANKED.get(summaries[0].results[0].ranked_by)
    if by is not None:
        found.append(f"Methods are ranked by {by}. The answers of the methods have no influence on that choice.")
    if len(summaries) > 1:
        found.append(
            "The best method is picked by its figure on the test rows themselves. So it looks better than it is: a "
            "part of its advantage is chance, which its interval does not include. For an unbiased figure, evaluate "
            "the method once more on rows that were not used here."
        )
    fewer = []
    for summary in summaries:
        each = [(r.settings.get("eval_rows"), r.rows.get("validation", 0)) for r in summary.results]
        fewest = min((rows for rows, all_rows in each if isinstance(rows, int) and rows < all_rows), default=None)
        if fewest is not None:
            fewer.append(f"{summary.info.title} {fewest}")
    if fewer:
        found.append(f"To stay within the time, some methods used a part of the validation rows: {', '.join(fewer)}.")
    return found


def _rows(results: Sequence[Result], rows: Sequence[Row]) -> str:
    """Return the numbers of rows; completions with the same input are scored together."""
    scored = len(results[0].statistics)
    inputs = "" if scored == len(rows) else f" with {count(scored)} inputs"
    used = {name: max(r.rows.get(part, 0) for r in results) for part, name in _PARTS.items()}
    said = [f"{count(number)} {name} rows" for name, number in used.items() if number]
    return ", ".join([*said, f"{count(len(rows))} test rows{inputs}"])


def _seeds(summaries: Sequence[MethodSummary]) -> str:
    numbers = {len(s.results) for s in summaries}
    if len(numbers) > 1:
        return "seeds: " + ", ".join(f"{s.info.title} {len(s.results)}" for s in summaries)
    (number,) = numbers
    return "one seed" if number == 1 else f"{number} seeds"


def _days(results: Sequence[Result]) -> list[str]:
    days = sorted({r.date[:10] for r in results if r.date})
    return [" to ".join(dict.fromkeys([days[0], days[-1]]))] if days else []


def _settings(summaries: Sequence[MethodSummary]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Return the settings that all methods share, and each method's own."""
    every: dict[str, dict[str, str]] = {}
    for summary in summaries:
        of_seeds: dict[str, dict[str, None]] = {}  # the distinct values of each setting, in order
        for name, value in (item for result in summary.results for item in result.settings.items()):
            of_seeds.setdefault(name, {})[_value(value)] = None
        every[summary.info.title] = {name: " / ".join(values) for name, values in of_seeds.items()}
    first = next(iter(every.values()))
    shared = {name: text for name, text in first.items() if all(s.get(name) == text for s in every.values())}
    own = {method: {n: v for n, v in settings.items() if n not in shared} for method, settings in every.items()}
    return shared, {method: settings for method, settings in own.items() if settings}


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
