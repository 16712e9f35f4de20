"""Throughput: measures the seconds of a step and of an evaluation, and fits a run to a number of minutes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel

from softprompt.config import TuneConfig
from softprompt.data.batching import batch_indices
from softprompt.model.frozen import FrozenModel
from softprompt.training.prepare import PreparedRun, most_steps
from softprompt.training.prompt_trainer import PromptTrainer
from softprompt.training.search import search_cost, why_not_search
from softprompt.training.settings import EVALUATIONS
from softprompt.training.trainer import Trainer, reproducible

TIMED_STEPS = 4  # at most
TIMING_SHARE = 0.05  # of the time, after which no further step is timed
_SHARE = 0.25  # of the time, at most, for evaluations, and for what follows the last step
_LABELLED_ROWS = 16  # validation rows that the scoring of all labels is timed on
_MIN_ROWS = 32  # validation rows, where they are slow to score
_RENDERED_ROWS = 3


@dataclass(frozen=True)
class Throughput:
    """How long training takes, in seconds of wall time, measured.

    Attributes:
        step: seconds per step.
        evaluation: seconds per evaluation of the validation rows.
        last: seconds for the label bias, after the last step.
        rows: validation rows that were scored; 0 where their number is fixed.
    """

    step: float
    evaluation: float
    last: float = 0.0
    rows: int = 0

    def fit_to_budget(
        self, seconds: float, max_steps: int | None = None, eval_every: int | None = None
    ) -> dict[str, int]:
        """Return the `max_steps` and `eval_every` of a run of about that duration, and `eval_rows` if it is lower.

        Evaluations take a quarter of the time at most, and what follows the last step another quarter. Where
        evaluations are slow, there are fewer of them, but at least one before the first step and two more; and these
        score fewer rows, at least 32. Where `eval_every` is given, all rows are scored that often.

        Args:
            seconds: the duration.
            max_steps: the most steps; None for as many as fit, one at least.
            eval_every: steps between evaluations; None where it is unset.
        """
        affordable_rows = int(self.rows * _SHARE * seconds / (3 * self.evaluation)) if self.evaluation else self.rows
        if eval_every is None and affordable_rows < self.rows > _MIN_ROWS:
            rows = max(affordable_rows, _MIN_ROWS)
            return {**self.with_eval_rows(rows).fit_to_budget(seconds, max_steps), "eval_rows": rows}
        seconds -= min(self.last, _SHARE * seconds)
        affordable = _SHARE * seconds / self.evaluation - 1 if self.evaluation else EVALUATIONS
        evaluations = round(min(max(affordable, 2), EVALUATIONS))
        if eval_every is None:
            steps = int((seconds - (evaluations + 1) * self.evaluation) / self.step)
        else:
            steps = int((seconds - self.evaluation) / (self.step + self.evaluation / eval_every))
        steps = max(1, steps)
        steps = min(steps, max_steps or steps)
        return {"max_steps": steps, "eval_every": eval_every or math.ceil(steps / evaluations)}

    def with_eval_rows(self, rows: int) -> Throughput:
        """Return the throughput for exactly this many validation rows."""
        share = rows / self.rows
        return Throughput(self.step, share * self.evaluation, share * self.last)


def measure_throughput(trainer: Trainer, seconds: float = 0.0) -> Throughput:
    """Time a few steps and an evaluation; the learning rate is 0, so no weight changes.

    Args:
        trainer: the trainer, before its first step.
        seconds: how long the run may take; timing its steps takes a twentieth of that at most, or one step.
    """
    config, prepared, evaluation, last = trainer.prepared.config, trainer.prepared, 0.0, 0.0
    assert config.batch_size and config.max_steps
    with reproducible(config.threads):
        trainer.optimizer.param_groups[0]["lr"] = 0.0
        # The same rows as the run's: others may not begin with the shared text.
        steps = [number % config.max_steps for number in range(TIMED_STEPS + 1)]
        batches = [batch_indices(len(prepared.examples), config.batch_size, step, config.seed) for step in steps]
        for number, rows in enumerate(batches):
            if number <= 1:  # the first one sets things up
                began = time.monotonic()
            trainer.gradient([prepared.examples[i] for i in rows])
            trainer.optimizer.step()
            spent = time.monotonic() - began
            if number and spent > TIMING_SHARE * seconds and trainer.processes.count == 1:
                break  # of several processes all have to take the same steps
        step = spent / number
        if prepared.scorer:
            evaluation = _seconds(trainer.evaluate)
            scorer = prepared.label_scorer(_LABELLED_ROWS)
            if scorer is not None:
                scoring = _seconds(lambda: trainer.evaluate(scorer=scorer))
                last = scoring * len(prepared.scorer.rows) / len(scorer.rows)
    return Throughput(step, evaluation, last, len(prepared.scorer.rows) if prepared.scorer else 0)


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


class RenderedRow(BaseModel):
    """A row as the model sees it.

    Attributes:
        input, target: the text, split where the target's tokens begin.
        tokens, targets: how many there are in all, and how many are learned.
    """

    input: str
    target: str
    tokens: int
    targets: int


class RunEstimate(BaseModel):
    """What a run would do and take; `minutes` follow from the measured throughput."""

    backend: str
    virtual_tokens: int
    parameters: int
    mean_tokens: float
    longest: int
    truncated: int
    rendered: list[RenderedRow]
    step_gigabytes: float
    free_gigabytes: float
    step_seconds: float
    steps: int
    eval_every: int
    eval_rows: int
    search_minutes: float
    minutes: float


def estimate_run(
    model: FrozenModel, prepared: PreparedRun, given: TuneConfig, throughput: Throughput | None = None
) -> RunEstimate:
    """Measure the throughput as a run does, keep nothing of it, and say what the whole run would take.

    Args:
        model: the frozen model.
        prepared: the run.
        given: settings as they were given; with `max_minutes`, as many steps are counted as fit.
        throughput: where it is known; None to measure it.
    """
    config, length_stats, scorer = prepared.config, prepared.length_stats, prepared.scorer
    assert config.batch_size and config.max_steps and config.eval_every
    seconds, most = 60 * (given.max_minutes or 0), most_steps(prepared, given)
    trainer = PromptTrainer(model, prepared)
    throughput = throughput or measure_throughput(trainer, seconds)
    length = {"max_steps": config.max_steps, "eval_every": config.eval_every, "eval_rows": config.eval_rows}
    if seconds:
        length |= throughput.fit_to_budget(seconds, most, given.eval_every)
    searched = 0.0
    if given.budget == "thorough" and why_not_search(given, prepared.train.task, throughput.evaluation) is None:
        share, times = search_cost(given, prepared.train.task)
        searched = share * length["max_steps"] * throughput.step + times * throughput.evaluation
    if seconds and searched:
        length |= throughput.fit_to_budget(seconds - searched, most, given.eval_every)
    if scorer is not None and length["eval_rows"] < len(scorer.rows):
        throughput = throughput.with_eval_rows(length["eval_rows"])
    evaluations = length["max_steps"] // length["eval_every"] + 1
    whole = searched + length["max_steps"] * throughput.step + evaluations * throughput.evaluation + throughput.last
    batch = [prepared.examples[i] for i in batch_indices(len(prepared.examples), config.batch_size, 0, config.seed)]
    return RunEstimate(
        backend=model.backend.name,
        virtual_tokens=prepared.start.shape[-2],
        parameters=prepared.start.numel(),
        mean_tokens=length_stats.tokens / length_stats.rows,
        longest=length_stats.longest,
        truncated=prepared.encoder.truncated,
        rendered=[rendered_row(prepared, i) for i in range(min(_RENDERED_ROWS, len(prepared.examples)))],
        step_gigabytes=max(prepared.step_bytes(part) for part in trainer.micro_batches(batch)) / 1e9,
        free_gigabytes=model.free_memory() / 1e9,
        step_seconds=throughput.step,
        steps=length["max_steps"],
        eval_every=length["eval_every"],
        eval_rows=length["eval_rows"],
        search_minutes=searched / 60,
        minutes=whole / 60,
    )


def rendered_row(prepared: PreparedRun, index: int) -> RenderedRow:
    """Return a training row as the model reads it."""
    example = prepared.examples[index]
    decode = prepared.encoder.tokenizer.decode
    return RenderedRow(
        input=str(decode(list(example.ids[: example.start]))),
        target=str(decode(list(example.ids[example.start :]))),
        tokens=len(example.ids),
        targets=example.targets,
    )
