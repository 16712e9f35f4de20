"""Progress on stderr: of a run, and of the predictions for a file."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from softprompt.cli.settings_tables import row_text, rows_line, settings_screen, settings_table
from softprompt.cli.tables import err
from softprompt.formatting import clock, metrics_line
from softprompt.training.callbacks import Callback

if TYPE_CHECKING:
    from softprompt.training.prepare import PreparedRun

_SMOOTHING = 0.9
_LOG_LINES = 10  # of a run
_LOG_WIDTH = 120
_REFRESHES_PER_SECOND = 2
_TIMED = 50  # steps whose mean time is used to estimate the time left


class ProgressLine:
    """A run's line of progress: the step, the loss, the last evaluation, and the time left.

    Args:
        steps: of the whole run.
        step: the last one that is done.
        eval_every: steps between evaluations; None without evaluations.
        now: the clock, in seconds.
    """

    def __init__(
        self, steps: int, step: int, eval_every: int | None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.steps, self.step, self.eval_every, self.now = steps, step, eval_every, now
        self.loss: float | None = None
        self.validation: dict[str, float] = {}
        self.over = False
        self._began = self._last = self.now()
        self._evaluated = self.step
        self._step_times, self._evaluation_times = deque[float](maxlen=_TIMED), deque[float](maxlen=_TIMED)

    def stepped(self, step: int, loss: float) -> None:
        self.step = step
        self._step_times.append(self._lap())
        self.loss = loss if self.loss is None else _SMOOTHING * self.loss + (1 - _SMOOTHING) * loss

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        self.validation, self._evaluated = values, step
        self._evaluation_times.append(self._lap())

    def evaluation_follows(self) -> bool:
        return self.eval_every is not None and (self.step % self.eval_every == 0 or self.step == self.steps)

    def seconds_left(self) -> float | None:
        """Estimate the time of the remaining steps and evaluations; None before the first step."""
        if not self._step_times:
            return None
        steps = list(self._step_times)[1:] or list(self._step_times)  # the first one is slower
        evaluations = 0
        if self.eval_every is not None and self._evaluated < self.steps:
            evaluations = math.ceil(self.steps / self.eval_every) - self._evaluated // self.eval_every
        return (self.steps - self.step) * _mean(steps) + evaluations * _mean(self._evaluation_times)

    def text(self, width: int) -> str:
        """Write the line; one that is too long leaves out the validation loss."""
        left, elapsed = self.seconds_left(), f"{clock(self.now() - self._began)} elapsed"
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
        before, self._last = self._last, self.now()
        return self._last - before


def _mean(times: Collection[float]) -> float:
    return sum(times) / len(times) if times else 0.0


def validation_text(values: Mapping[str, float]) -> str:
    """Write the validation loss, which selects the best prompt, and for classification the accuracy."""
    return "validation " + metrics_line({name: values[name] for name in ("accuracy", "loss") if name in values})


class TerminalCallback(Callback):
    """Shows settings, then a run's progress: one line that changes on a terminal, about ten lines in a log.

    Args:
        origins: where each setting came from; None to show no settings.
        verbose: show every setting, not only those that matter.
        transient: wipe the line when the run ends.
    """

    def __init__(self, origins: Mapping[str, str] | None, *, verbose: bool = False, transient: bool = False) -> None:
        self.origins, self.verbose, self.transient = origins, verbose, transient
        self.live: Live | None = None
        self.settings_shown = False

    def candidate(self, settings: dict[str, Any], step: int, loss: float) -> None:
        written = [f"{name} {f'{v:g}' if isinstance(v, float) else v}" for name, v in settings.items()]
        err.print(f"search: {', '.join(written)}: validation loss {loss:.3f} after {step} steps")

    def begin(self, prepared: PreparedRun, step: int) -> None:
        if self.origins is not None:
            self._show_settings(prepared, self.origins)
        if step:
            err.print(f"resuming after step {step}")
        assert prepared.config.max_steps
        evaluates = prepared.config.eval_every if prepared.validation is not None else None
        self.line = ProgressLine(prepared.config.max_steps, step, evaluates)
        self.due, self.printed = step, -1  # of the lines in a log
        if err.is_terminal and not err.is_dumb_terminal:
            self.live = Live(self.line, console=err, refresh_per_second=_REFRESHES_PER_SECOND, transient=self.transient)
            self.live.start()

    def step(self, step: int, loss: float) -> None:
        self.line.stepped(step, loss)
        if not self.line.evaluation_follows():
            self._log()

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        self.line.evaluated(step, values)
        self._log()

    def micro_batch_reduced(self, step: int, micro_batch_tokens: int) -> None:
        err.print(f"step {step}: memory is short; continuing with micro-batches of {micro_batch_tokens} tokens")

    def end(self) -> None:
        self.line.over = True
        if self.live is not None:
            self.live.stop()
            self.live = None
        elif self.printed < self.line.step:  # it was stopped between two lines of the log
            self._print()

    def _show_settings(self, prepared: PreparedRun, origins: Mapping[str, str]) -> None:
        """Print the settings once: the runs of an ensemble differ only in the seed."""
        if self.settings_shown:
            err.print(f"\nnext prompt: seed {prepared.config.seed}")
            return
        self.settings_shown = True
        from softprompt.training.throughput import rendered_row

        if self.verbose:
            err.print(settings_table(prepared, origins))
        else:
            err.print(settings_screen(prepared, origins, err.width))
            err.print(row_text("first row: ", rendered_row(prepared, 0), err.width))
        err.print(rows_line(prepared))

    def _log(self) -> None:
        """Print a line of the log if it is due."""
        line = self.line
        if self.live is None and (line.step >= self.due or line.step == line.steps):
            every = math.ceil(line.steps / _LOG_LINES)
            self.due = (line.step // every + 1) * every
            self._print()

    def _print(self) -> None:
        self.printed = self.line.step
        err.print(self.line.text(_LOG_WIDTH), soft_wrap=True)


class PredictionProgress:
    """Shows how many rows are predicted: a line that changes on a terminal, about ten lines in a log.

    Args:
        quiet: show nothing, because the rows themselves are printed.
    """

    def __init__(self, quiet: bool) -> None:
        self.done, self._printed = 0, 0
        self._start: tuple[int, float] | None = None  # rows that a resumed file had, and the time
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
        """Show that so many rows are written. The first call says how many there were before."""
        self.done = done
        if self._start is None:
            self._start = done, time.monotonic()
        before, since = self._start
        rate = f"{(done - before) / (time.monotonic() - since):.1f} a second" if done > before else ""
        self._bar.update(self._task, completed=done, rate=rate)
        if not (self._live or self._quiet) and done and done >= 2 * self._printed:
            err.print(f"{done} rows")
            self._printed = done
