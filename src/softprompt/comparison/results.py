"""What a comparison finds: one result for each method and seed, kept as a JSON file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from softprompt.data.rows import Task
from softprompt.errors import InputError
from softprompt.evaluation.intervals import Metric, bootstrap, proportion
from softprompt.evaluation.scoring import Confusion
from softprompt.storage import write_text

# What each task's methods are ranked by: higher is better, but for the loss.
PRIMARY: dict[Task, str] = {"classification": "accuracy", "completion": "bleu", "text": "loss"}


class _Kept(BaseModel):
    """What is kept as JSON: figures that are not finite, of a run that diverged, come back as they were.

    JSON has no numbers for them: they are written as the texts `Infinity`, `-Infinity` and `NaN`.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")


class Costs(_Kept):
    """What a method takes.

    Attributes:
        trainable_parameters: numbers that are learned; 0 for prompt engineering.
        stored_bytes: what has to be kept for the task besides the base model.
        train_seconds, train_cpu_seconds: wall and processor time of learning or searching, validation included.
        train_tokens: text tokens of the rows that steps were taken on; 0 for prompt engineering.
        peak_bytes: memory above the loaded model while learning or searching.
        prediction_seconds: wall time of a test row.
        switch_seconds: from the stored files of another task to the first row that can be answered.
        base_unchanged: whether the base model's weights have the same hash before and after, and serve the task
            as they are: full fine-tuning needs another copy.
        perplexity_before, perplexity_after: of the model on text that has nothing to do with the task, without and
            with what the task has added to its weights.
    """

    trainable_parameters: int
    stored_bytes: int
    train_seconds: float
    train_cpu_seconds: float
    train_tokens: int
    peak_bytes: int
    prediction_seconds: float
    switch_seconds: float
    base_unchanged: bool
    perplexity_before: float
    perplexity_after: float


class Point(_Kept):
    """A point of a learning curve.

    Attributes:
        step: steps done.
        seconds: wall time until then.
        loss: mean training loss since the point before, in nats per target token; None before the first step.
        validation: the metrics on the validation rows.
    """

    step: int
    seconds: float
    loss: float | None = None
    validation: dict[str, float]


class Result(_Kept):
    """What one method gave with one seed.

    Attributes:
        method, seed: which.
        task: the task's kind.
        data: name of the rows.
        base_model: name of the model.
        rows: how many were there for `train`, `validation` and `test`.
        settings: what was in force, the method's own choices included.
        metrics: on the test rows, with 95 % intervals.
        confusion: of classification.
        predictions: for each test row, the label or the text; empty for plain text.
        statistics: `[N, …]` per test row (per distinct input of a completion task): what the primary metric is
            made from, see `statistic`.
        costs: what it took.
        curve: how it learned; empty for prompt engineering.
        environment: versions and machine.
        date: ISO.
    """

    method: str
    seed: int
    task: Task
    data: str
    base_model: str
    rows: dict[str, int]
    settings: dict[str, Any]
    metrics: dict[str, Metric]
    confusion: Confusion | None = None
    predictions: list[str] = []
    statistics: list[list[float]] = []
    costs: Costs
    curve: list[Point] = []
    environment: dict[str, str] = {}
    date: str = ""

    @property
    def primary(self) -> Metric:
        """The metric that methods are ranked by."""
        return self.metrics[PRIMARY[self.task]]

    def save(self, folder: Path) -> Path:
        """Write `METHOD-SEED.json`.

        Raises:
            StorageError: it cannot be written.
        """
        path = result_file(folder, self.method, self.seed)
        write_text(path, self.model_dump_json(indent=1) + "\n")
        return path


def result_file(folder: Path, method: str, seed: int) -> Path:
    """Return where a result is kept."""
    return folder / f"{method}-{seed}.json"


def read_result(path: Path) -> Result:
    """Read a result.

    Raises:
        InputError: the file is damaged.
    """
    try:
        return Result.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, ValidationError) as error:
        reason = _first(error) if isinstance(error, ValidationError) else str(error)
        raise InputError(f"cannot read {path}: {reason}; remove it, and the method is run again") from error


def _first(error: ValidationError) -> str:
    """Return the first thing that is wrong, and where."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'not JSON'}: {first['msg']}"


def statistic(task: Task, sums: NDArray[np.float64]) -> float:
    """Return the primary metric of rows whose statistics add up to `sums`.

    Classification has `[right, 1]` per row, text `[nats, tokens]`, completion what sacrebleu sums up: both lengths,
    then how many n-grams were right and how many there are.
    """
    if task == "completion":
        from sacrebleu.metrics.bleu import BLEU

        return float(BLEU()._compute_score_from_stats(sums.tolist()).score)
    return float(sums[0] / sums[1])


_RESAMPLES = 2000


def difference(first: Sequence[Result], second: Sequence[Result]) -> Metric:
    """Return how much better one method is than another: the difference of the primary metric, positive if so.

    The interval is that of a paired bootstrap over the test rows (Koehn 2004).

    Args:
        first, second: a method's results, one a seed; a method's figure is the mean over its seeds, and the same rows
            are drawn for all of them.
    """
    sign = -1.0 if first[0].task == "text" else 1.0
    of_first, of_second = _mean_over_seeds(first), _mean_over_seeds(second)
    return bootstrap(lambda drawn: sign * (of_first(drawn) - of_second(drawn)), len(first[0].statistics), _RESAMPLES)


def mean_primary(results: Sequence[Result]) -> Metric:
    """Return a method's primary metric: the mean over its seeds, with its interval over the test rows.

    Args:
        results: a method's results, one a seed.
    """
    if len(results) == 1:
        return results[0].primary
    if results[0].task == "classification":
        return proportion(np.mean([np.array(result.statistics)[:, 0] for result in results], axis=0))
    return bootstrap(_mean_over_seeds(results), len(results[0].statistics))


def _mean_over_seeds(results: Sequence[Result]) -> Callable[[NDArray[np.int64]], float]:
    """Return what computes a method's primary metric from row indices."""
    statistics = [np.array(result.statistics) for result in results]
    task = results[0].task
    return lambda drawn: float(np.mean([statistic(task, rows[drawn].sum(axis=0)) for rows in statistics]))
