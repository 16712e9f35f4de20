"""What people see: tables on stdout, progress on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from softprompt.training.watcher import Watcher

if TYPE_CHECKING:
    from softprompt.evaluation.evaluate import Evaluation
    from softprompt.evaluation.intervals import Metric
    from softprompt.evaluation.scoring import Confusion
    from softprompt.training.plan import Plan

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)
_SMOOTHING = 0.9
_LINES = 10
_MOST_LABELS = 8  # whose confusion matrix fits in a terminal
_LONGEST_VALUE = 60


def figure(name: str, value: float) -> str:
    """Write a metric's value the way people write it."""
    if name in ("accuracy", "macro_f1", "exact_match", "rouge_l"):
        return f"{value:.1%}"
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def figures(values: Mapping[str, float]) -> str:
    """Write metrics in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {figure(name, value)}" for name, value in values.items())


def plain_table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, whole: int = 0
) -> Table:
    """Return a table of texts, shown as they are; the first `whole` columns are as wide as they need to be."""
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
    """Return a table of metrics with their 95 % intervals, next to those without the prompt.

    Where only the prompt has a label bias, what it gives without it (`unbiased`) stands beside the base, and then
    `metrics`.
    """
    sides = {"base model": metrics} if without is None else {"without prompt": without, "with prompt": metrics}
    if without is not None and unbiased is not None:
        sides = {"without prompt": without, "with prompt": unbiased, "with prompt and label bias": metrics}
    table = Table(title=Text(title), title_justify="left")
    table.add_column("")
    for side in sides:
        table.add_column(side, justify="right")
    apart = "  " if len(sides) < 3 else "\n"
    for name in metrics:
        cells = [name.replace("_", " ")]
        for one in (side[name] for side in sides.values()):
            cells.append(f"{figure(name, one.value)}{apart}({figure(name, one.low)} to {figure(name, one.high)})")
        table.add_row(*cells)
    return table


def evaluation_record(done: Evaluation) -> dict[str, Any]:
    """Return what `evaluate --json` prints."""
    return {
        "task": done.task,
        "rows": done.rows,
        "metrics": _dumped(done.metrics),
        "without_prompt": done.without_prompt and _dumped(done.without_prompt),
        "without_bias": done.without_bias and _dumped(done.without_bias),
        "confusion": done.confusion and done.confusion.model_dump(),
        "seconds": round(done.seconds, 1),
    }


def _dumped(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    return {name: metric.model_dump() for name, metric in metrics.items()}


def show_evaluation(done: Evaluation, data: str) -> None:
    """Print metrics, and for classification which labels were mistaken for which."""
    cut = f", {done.truncated} cut to fit" if done.truncated else ""
    title = f"{data}: {done.rows} rows{cut}, 95 % intervals"
    out.print(metrics_table(done.metrics, done.without_prompt, title, done.without_bias))
    if done.confusion is not None:
        out.print(confusion_table(done.confusion))


def confusion_table(confusion: Confusion) -> Table:
    """Return the whole matrix of a few labels, or the most frequent mistakes of many."""
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
    rows = [(str(count), right, wrong) for count, right, wrong in confusion.mistakes()[:_LINES]]
    return plain_table(("rows", "right", "predicted"), rows, "Most frequent mistakes")


def settings_table(plan: Plan, origins: Mapping[str, str]) -> Table:
    """Return a table of every setting in force and where it came from."""
    table = Table(title="Settings", title_justify="left")
    for column in ("setting", "value", "from"):
        table.add_column(column, overflow="fold")
    for name, value in plan.config.model_dump().items():
        origin = plan.reasons.get(name) or origins.get(name, "default")
        text = repr(value) if isinstance(value, str) else str(value)
        short = text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
        table.add_row(name, Text(short), Text(origin))
    return table


def side_by_side(
    inputs: Sequence[str], base: Sequence[str] | None, texts: Sequence[str], right: Sequence[str] | None = None
) -> Table:
    """Return a table of generations: the untouched model's, the prompt's and, where it is known, what is right."""
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
        # What is nothing but line breaks and spaces is shown as such: an empty cell looks like a mistake.
        table.add_row(*(Text(cell.strip() or repr(cell)) for cell in row))
    return table


class TerminalWatcher(Watcher):
    """Shows loss, validation metrics and time left: a bar on a terminal, lines elsewhere.

    Args:
        origins: where each setting came from, for the table of settings; None for no table.
    """

    def __init__(self, origins: Mapping[str, str] | None) -> None:
        self.origins = origins
        self.loss: float | None = None
        self.validation = ""
        self.steps = 0
        self.first = 0
        self.began = 0.0
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[loss]}  {task.fields[validation]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=err,
            disable=not err.is_terminal,
        )

    def candidate(self, settings: dict[str, Any], step: int, loss: float) -> None:
        tried = ", ".join(
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings.items()
        )
        err.print(f"search: {tried}: validation loss {loss:.3f} after {step} steps")

    def better(self, demonstrations: int, values: dict[str, float], spent: float) -> None:
        shown = "1 example" if demonstrations == 1 else f"{demonstrations} examples"
        err.print(f"best so far: {shown}, {validation_text(values)}; {min(spent, 1):.0%} of the budget spent")

    def begin(self, plan: Plan, step: int) -> None:
        if self.origins is not None:
            err.print(settings_table(plan, self.origins))
            err.print(rows_line(plan))
        if step:
            err.print(f"going on after step {step}")
        assert plan.config.max_steps
        self.steps, self.first, self.began = plan.config.max_steps, step, time.monotonic()
        self.task = self.bar.add_task("", total=self.steps, completed=step, loss="", validation="")
        self.bar.start()

    def step(self, step: int, loss: float) -> None:
        self.loss = loss if self.loss is None else _SMOOTHING * self.loss + (1 - _SMOOTHING) * loss
        self.bar.update(self.task, completed=step, loss=f"loss {self.loss:.3f}")
        if not err.is_terminal and (step % max(1, self.steps // _LINES) == 0 or step == self.steps):
            spent = time.monotonic() - self.began
            left = spent / (step - self.first) * (self.steps - step)
            err.print(f"step {step}/{self.steps}  loss {self.loss:.3f}  {self.validation}  {left:.0f} s left")

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        self.validation = validation_text(values)
        self.bar.update(self.task, validation=self.validation)
        err.print(f"step {step}: {self.validation}")

    def smaller(self, step: int, micro_batch_tokens: int) -> None:
        err.print(f"step {step}: memory is short; going on with micro-batches of {micro_batch_tokens} tokens")

    def end(self) -> None:
        self.bar.stop()


class PredictionProgress:
    """Says how many rows are predicted: a line that changes on a terminal, about ten lines in a log.

    Args:
        quiet: say nothing, where the rows themselves are shown on the same terminal.
    """

    def __init__(self, quiet: bool) -> None:
        self.done, self._said = 0, 0
        self._begun: tuple[int, float] | None = None  # rows that were there before, and when
        columns = (TextColumn("{task.completed} rows"), TextColumn("{task.fields[rate]}"), TimeElapsedColumn())
        self._live = err.is_terminal and not quiet
        self._quiet = quiet
        self._bar = Progress(*columns, console=err, disable=not self._live)
        self._task = self._bar.add_task("", total=None, rate="")

    def __enter__(self) -> PredictionProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def rows(self, done: int) -> None:
        """Note that so many rows are written; first of all, how many were there before."""
        self.done = done
        if self._begun is None:
            self._begun = done, time.monotonic()
        before, since = self._begun
        rate = f"{(done - before) / (time.monotonic() - since):.1f} a second" if done > before else ""
        self._bar.update(self._task, completed=done, rate=rate)
        if not (self._live or self._quiet) and done and done >= 2 * self._said:
            err.print(f"{done} rows")
            self._said = done


def validation_text(values: Mapping[str, float]) -> str:
    """Give the loss, which the best prompt is chosen by, and for classification the accuracy."""
    return "validation " + figures({name: values[name] for name in ("accuracy", "loss") if name in values})


def rows_line(plan: Plan) -> str:
    """Say how many rows are used for what."""
    held = f"{len(plan.validation)} validation rows" if plan.validation is not None else "no validation rows"
    cut = f", {plan.encoder.truncated} cut to {plan.encoder.max_length} tokens" if plan.encoder.truncated else ""
    shared = f"; all begin with the same text ({len(plan.text)} tokens), which is run once a step" if plan.text else ""
    part = f" ({len(plan.taken)} of them taken)" if len(plan.taken) < len(plan.train) else ""
    return f"{len(plan.train)} training rows{part}, {held}{cut}{shared}"


def print_json(record: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout."""
    import json

    sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
