"""What people see: tables on stdout, progress on stderr."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from softprompt.cli.settings_tables import row_text, settings_screen, settings_table
from softprompt.training.callbacks import Callback

if TYPE_CHECKING:
    from softprompt.evaluation.evaluate import Evaluation
    from softprompt.evaluation.intervals import Metric
    from softprompt.evaluation.scores import Confusion
    from softprompt.training.prepare import PreparedRun

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)
_SMOOTHING = 0.9
_LINES = 10  # of a run in a log, and of a table of mistakes
_LOG_WIDTH = 120
_REFRESHED = 2  # times a second
_TIMED = 50  # steps whose mean time tells how long the others take
_MOST_LABELS = 8  # whose confusion matrix fits in a terminal


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


def side_by_side(
    inputs: Sequence[str], base: Sequence[str] | None, texts: Sequence[str], right: Sequence[str] | None = None
) -> Table:
    """Return a table of generations: the base model's, the prompt's and, where it is known, what is right."""
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


@dataclass
class ProgressLine:
    """What one line says of a run: the step, the loss, the last evaluation, and how much time is left.

    Attributes:
        steps: of the whole run.
        step: done so far.
        eval_every: steps between evaluations; None where there are none.
    """

    steps: int
    step: int
    eval_every: int | None

    def __post_init__(self) -> None:
        self.loss: float | None = None
        self.validation: dict[str, float] = {}
        self.over = False
        self._began = self._last = time.monotonic()
        self._evaluated = self.step
        self._step_times, self._evaluation_times = deque[float](maxlen=_TIMED), deque[float](maxlen=_TIMED)

    def stepped(self, step: int, loss: float) -> None:
        """Note a step; the loss that is shown is smoothed."""
        self.step = step
        self._step_times.append(self._lap())
        self.loss = loss if self.loss is None else _SMOOTHING * self.loss + (1 - _SMOOTHING) * loss

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Note an evaluation."""
        self.validation, self._evaluated = values, step
        self._evaluation_times.append(self._lap())

    def evaluation_follows(self) -> bool:
        """Tell whether the step that was noted last is to be evaluated."""
        return self.eval_every is not None and (self.step % self.eval_every == 0 or self.step == self.steps)

    def seconds_left(self) -> float | None:
        """Return how long the steps and evaluations that are left take; None before the first step."""
        if not self._step_times:
            return None
        steps = list(self._step_times)[1:] or list(self._step_times)  # the first one sets things up
        evaluations = 0
        if self.eval_every is not None and self._evaluated < self.steps:
            evaluations = math.ceil(self.steps / self.eval_every) - self._evaluated // self.eval_every
        return (self.steps - self.step) * _mean(steps) + evaluations * _mean(self._evaluation_times)

    def text(self, width: int) -> str:
        """Write the line; where it is too long, the loss on validation rows is the first to go."""
        left, elapsed = self.seconds_left(), f"{clock(time.monotonic() - self._began)} elapsed"
        loss = "" if self.loss is None else f"loss {self.loss:.3f}"
        times = elapsed if left is None or self.over else f"{elapsed}, {clock(left)} left"
        shown = dict(list(self.validation.items())[:1])
        for values in (self.validation, shown) if self.validation else ({},):
            validation = validation_text(values) if values else ""
            line = "  ".join(filter(None, (f"step {self.step}/{self.steps}", loss, validation, times)))
            if len(line) <= width:
                break
        return line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.text(options.max_width), no_wrap=True, overflow="ellipsis")

    def _lap(self) -> float:
        before, self._last = self._last, time.monotonic()
        return self._last - before


def _mean(times: Collection[float]) -> float:
    return sum(times) / len(times) if times else 0.0


def clock(seconds: float) -> str:
    """Write a time as minutes and seconds, or as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class TerminalCallback(Callback):
    """Shows settings, then a run's progress: one line that is kept up to date on a terminal, about ten lines elsewhere.

    Args:
        origins: where each setting came from; None to show no settings.
        verbose: show every setting, not only those that matter.
        transient: wipe the line when the run ends.
    """

    def __init__(self, origins: Mapping[str, str] | None, *, verbose: bool = False, transient: bool = False) -> None:
        self.origins, self.verbose, self.transient = origins, verbose, transient
        self.live: Live | None = None
        self.began = False

    def candidate(self, settings: dict[str, Any], step: int, loss: float) -> None:
        tried = ", ".join(
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings.items()
        )
        err.print(f"search: {tried}: validation loss {loss:.3f} after {step} steps")

    def better(self, demonstrations: int, values: dict[str, float], spent: float) -> None:
        shown = "1 example" if demonstrations == 1 else f"{demonstrations} examples"
        err.print(f"best: {shown}, {validation_text(values)}; {min(spent, 1):.0%} of budget used")

    def begin(self, prepared: PreparedRun, step: int) -> None:
        if self.origins is not None:
            self._show_settings(prepared, self.origins)
        self.began = True
        if step:
            err.print(f"resuming after step {step}")
        assert prepared.config.max_steps
        evaluates = prepared.config.eval_every if prepared.validation is not None else None
        self.line = ProgressLine(prepared.config.max_steps, step, evaluates)
        self.due, self.printed = step, -1  # of the lines in a log
        if err.is_terminal and not err.is_dumb_terminal:
            self.live = Live(self.line, console=err, refresh_per_second=_REFRESHED, transient=self.transient)
            self.live.start()

    def step(self, step: int, loss: float) -> None:
        self.line.stepped(step, loss)
        if not self.line.evaluation_follows():
            self._log()

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        self.line.evaluated(step, values)
        self._log()

    def smaller(self, step: int, micro_batch_tokens: int) -> None:
        err.print(f"step {step}: memory is short; continuing with micro-batches of {micro_batch_tokens} tokens")

    def end(self) -> None:
        self.line.over = True
        if self.live is not None:
            self.live.stop()
            self.live = None
        elif self.printed < self.line.step:  # it was stopped between two lines
            self._print()

    def _show_settings(self, prepared: PreparedRun, origins: Mapping[str, str]) -> None:
        """Print them once: the runs of an ensemble differ in the seed alone."""
        if self.began:
            err.print(f"\nnext prompt: seed {prepared.config.seed}")
            return
        from softprompt.training.throughput import rendered_row

        if self.verbose:
            err.print(settings_table(prepared, origins))
        else:
            err.print(settings_screen(prepared, origins, err.width))
            err.print(row_text("first row: ", rendered_row(prepared, 0), err.width))
        err.print(rows_line(prepared))

    def _log(self) -> None:
        """Print a line where it is time for one and none is kept up to date."""
        line = self.line
        if self.live is None and (line.step >= self.due or line.step == line.steps):
            every = math.ceil(line.steps / _LINES)
            self.due = (line.step // every + 1) * every
            self._print()

    def _print(self) -> None:
        self.printed = self.line.step
        err.print(self.line.text(_LOG_WIDTH), soft_wrap=True)


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


def rows_line(prepared: PreparedRun) -> str:
    """Say how many rows are used for what."""
    held = f"{len(prepared.validation)} validation rows" if prepared.validation is not None else "no validation rows"
    cut = (
        f", {prepared.encoder.truncated} cut to {prepared.encoder.max_length} tokens"
        if prepared.encoder.truncated
        else ""
    )
    shared = (
        f"; all begin with the same text ({len(prepared.shared_text_ids)} tokens), which is run once a step"
        if prepared.shared_text_ids
        else ""
    )
    part = f" ({len(prepared.indices_seen)} of them taken)" if len(prepared.indices_seen) < len(prepared.train) else ""
    return f"{len(prepared.train)} training rows{part}, {held}{cut}{shared}"


def print_json(record: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout; a figure beyond all numbers is null, and what the stream lacks is escaped."""
    import json

    from softprompt.cli.streams import is_unicode
    from softprompt.storage import strict_json

    text = json.dumps(strict_json(record), ensure_ascii=not is_unicode(sys.stdout), allow_nan=False)
    sys.stdout.write(text + "\n")
