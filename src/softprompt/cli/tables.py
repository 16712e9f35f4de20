"""Tables and JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from softprompt.cli.streams import is_unicode
from softprompt.formatting import short_interval, short_metric
from softprompt.storage import strict_json

if TYPE_CHECKING:
    from softprompt.evaluation.evaluate import Evaluation
    from softprompt.evaluation.intervals import Metric
    from softprompt.evaluation.scores import Confusion

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)
_MOST_CONFUSIONS = 10
_MOST_LABELS = 8  # whose confusion matrix fits in a terminal


def plain_table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, whole: int = 0
) -> Table:
    """Return a table of texts, shown as they are; lines in the first `whole` columns are not broken."""
    table = Table(title=title, title_justify="left", show_header=any(headers))
    for place, header in enumerate(headers):
        table.add_column(Text(header), overflow="fold", no_wrap=place < whole)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def metrics_table(
    metrics: Mapping[str, Metric],
    without: Mapping[str, Metric] | None,
    title: str,
    unbiased: Mapping[str, Metric] | None = None,
) -> Table:
    """Return a table of metrics with their 95 % intervals.

    Args:
        metrics: with the prompt and its label bias; of the base model where `without` is None.
        without: of the base model, with the same template.
        title: above the table.
        unbiased: with the prompt, without its label bias; None where it has none.
    """
    columns = {"base model": metrics} if without is None else {"without prompt": without, "with prompt": metrics}
    if without is not None and unbiased is not None:
        columns = {"without prompt": without, "with prompt": unbiased, "with prompt and label bias": metrics}
    table = Table("", title=Text(title), title_justify="left")
    for header in columns:
        table.add_column(header, justify="right")
    apart = "  " if len(columns) < 3 else "\n"
    for name in metrics:
        found = [column[name] for column in columns.values()]
        cells = [f"{short_metric(name, m.value)}{apart}{short_interval(name, m.low, m.high)}" for m in found]
        table.add_row(name.replace("_", " "), *cells)
    return table


def evaluation_record(done: Evaluation) -> dict[str, Any]:
    """Return what `evaluate --json` prints."""

    def dumped(metrics: Mapping[str, Metric]) -> dict[str, Any]:
        return {name: metric.model_dump() for name, metric in metrics.items()}

    return {
        "task": done.task,
        "rows": done.rows,
        "metrics": dumped(done.metrics),
        "without_prompt": done.without_prompt and dumped(done.without_prompt),
        "without_bias": done.without_bias and dumped(done.without_bias),
        "confusion": done.confusion and done.confusion.model_dump(),
        "seconds": round(done.seconds, 1),
    }


def show_evaluation(done: Evaluation, data: str) -> None:
    """Print metrics and, for classification, the confusion matrix."""
    cut = f", {done.truncated} cut to fit" if done.truncated else ""
    title = f"{data}: {done.rows} rows{cut}, 95 % intervals"
    out.print(metrics_table(done.metrics, done.without_prompt, title, done.without_bias))
    if done.confusion is not None:
        out.print(confusion_table(done.confusion))


def confusion_table(confusion: Confusion) -> Table:
    """Return the confusion matrix of a few labels, or the most frequent mistakes of many."""
    labels, counts = confusion.labels, confusion.counts
    if len(labels) <= _MOST_LABELS:
        table = plain_table(
            ("right \\ predicted", *labels),
            ([label, *map(str, row)] for label, row in zip(labels, counts, strict=True)),
            "Confusion, in rows",
        )
        for column in table.columns[1:]:
            column.justify = "right"
        return table
    rows = [(str(count), right, wrong) for count, right, wrong in confusion.mistakes()[:_MOST_CONFUSIONS]]
    return plain_table(("rows", "right", "predicted"), rows, "Most frequent mistakes")


def side_by_side(
    inputs: Sequence[str], base: Sequence[str] | None, texts: Sequence[str], right: Sequence[str] | None = None
) -> Table:
    """Return a table of generations: the base model's, the prompt's and, where they are given, the right ones."""
    columns = {"input": inputs}
    if base is not None:
        columns["without prompt"] = base
    columns["with prompt" if base is not None else "text"] = texts
    if right is not None:
        columns["right"] = right
    table = Table(show_lines=True)
    for header in columns:
        table.add_column(header, overflow="fold", ratio=1 if right is None else None)
    for row in zip(*columns.values(), strict=True):
        # A text of line breaks and spaces alone is shown quoted: an empty cell looks like a mistake.
        table.add_row(*(Text(cell.strip() or repr(cell)) for cell in row))
    return table


def print_json(record: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout; a number that is not finite is null, what the encoding lacks is escaped."""
    sys.stdout.write(json.dumps(strict_json(record), ensure_ascii=not is_unicode(sys.stdout), allow_nan=False) + "\n")
