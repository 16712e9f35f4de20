"""The results of a comparison: one JSON file for each method and seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from softprompt.data.rows import Rows, Task
from softprompt.data.templates import Format
from softprompt.errors import InputError
from softprompt.evaluation.intervals import Metric, bootstrap, proportion
from softprompt.evaluation.primary_metric import PRIMARY, compute_metric, lower_is_better
from softprompt.evaluation.scores import Confusion
from softprompt.old_names import current_method
from softprompt.storage import write_text


class _Record(BaseModel):
    """Written as JSON, with infinities and NaN, of a run that diverged, as the texts `Infinity`, `-Infinity`, `NaN`."""

    model_config = ConfigDict(ser_json_inf_nan="strings")


class Costs(_Record):
    """The costs of a method; prompt engineering has no trainable parameters and no training tokens."""

    trainable_parameters: int
    stored_bytes: int  # of the task's files, the base model not counted
    train_seconds: float  # wall time of training or searching, validation included
    train_cpu_seconds: float
    train_tokens: int  # text tokens of the rows trained on
    peak_bytes: int  # peak memory of training or searching, the loaded base model not counted
    prediction_seconds: float  # wall time per test row
    switch_seconds: float  # to load another task's files and answer a first row
    base_unchanged: bool  # the weights that answer are the base model's, by their hash; full fine-tuning needs a copy
    perplexity_before: float  # of unrelated text, with the base model's weights
    perplexity_after: float  # with the method's weights


class Point(_Record):
    """A point of a learning curve."""

    step: int
    seconds: float  # since training began
    loss: float | None = None  # mean since the point before, in nats per target token
    validation: dict[str, float]


class Result(_Record):
    """The result of one method with one seed.

    Attributes:
        rows: numbers of `train`, `validation` and `test` rows.
        settings: the settings used, the method's own choices included.
        predictions: for each test row, the label or the text; empty for plain text.
        ranked_by: the metric that methods are ranked by (`ranking_metric`). Old files do not name one; theirs is
            `PRIMARY`.
        statistics: `[N, …]` per test row (per distinct input of a completion task): the sums that the ranking metric
            is computed from, see `compute_metric`.
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
    ranked_by: str = ""
    statistics: list[list[float]] = []
    costs: Costs
    curve: list[Point] = []
    environment: dict[str, str] = {}
    date: str = ""

    @field_validator("method")
    @classmethod
    def _current_method(cls, method: str) -> str:
        return current_method(method, quiet=True)

    @field_validator("settings")
    @classmethod
    def _current_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        method = settings.get("method")
        return {**settings, "method": current_method(method, quiet=True)} if isinstance(method, str) else settings

    @property
    def ranking(self) -> str:
        """The name of the metric that methods are ranked by."""
        return self.ranked_by or PRIMARY[self.task]

    @property
    def primary(self) -> Metric:
        """The metric that methods are ranked by."""
        return self.metrics[self.ranking]

    def save(self, folder: Path) -> Path:
        """Write `METHOD-SEED.json`."""
        path = folder / f"{self.method}-{self.seed}.json"
        write_text(path, self.model_dump_json(indent=1) + "\n")
        return path


def rejudge(result: Result, form: Format, rows: Rows) -> Result:
    """Judge the answers of an old completion result as new ones are judged; one without all answers stays as it is.

    Old files were all ranked by BLEU over words, which is 0.0 for right answers of fewer than four words.
    """
    if len(result.predictions) != len(rows):
        return result
    from softprompt.evaluation.completions import judge

    judged = judge(form, rows, result.predictions)
    metrics = {**result.metrics, **judged.metrics()}
    update = {"metrics": metrics, "statistics": judged.statistics(), "ranked_by": judged.ranked_by}
    return result.model_copy(update=update)


def read_result(path: Path) -> Result:
    """Read a result."""
    try:
        return Result.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc'])) or 'not JSON'}: {first['msg']}"
        raise InputError(f"cannot read {path}: {reason}; remove it, and the method is run again") from error


_RESAMPLES = 2000


def difference(first: Sequence[Result], second: Sequence[Result]) -> Metric:
    """Return by how much one method is better than another in the primary metric; negative where it is worse.

    The interval is that of a paired bootstrap over the test rows (Koehn 2004).

    Args:
        first, second: a method's results, one per seed; a method's figure is the mean over its seeds, and the same
            rows are sampled for all of them.
    """
    sign = -1.0 if lower_is_better(first[0].ranking) else 1.0
    mean_first, mean_second = _mean_over_seeds(first), _mean_over_seeds(second)
    return bootstrap(lambda rows: sign * (mean_first(rows) - mean_second(rows)), len(first[0].statistics), _RESAMPLES)


def mean_primary(results: Sequence[Result]) -> Metric:
    """Return a method's primary metric: the mean over its seeds, with its interval over the test rows."""
    if len(results) == 1:
        return results[0].primary
    if results[0].ranking in ("accuracy", "exact_match"):
        return proportion(np.mean([np.array(result.statistics)[:, 0] for result in results], axis=0))
    return bootstrap(_mean_over_seeds(results), len(results[0].statistics))


def _mean_over_seeds(results: Sequence[Result]) -> Callable[[NDArray[np.int64]], float]:
    """Return what computes a method's primary metric from row indices."""
    statistics = [np.array(result.statistics) for result in results]
    metric = results[0].ranking
    return lambda rows: float(np.mean([compute_metric(metric, of_seed[rows].sum(axis=0)) for of_seed in statistics]))
