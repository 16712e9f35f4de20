"""The search of a thorough run: learning rate and initialization, by successive halving on the validation rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeVar

from softprompt.config import TuneConfig
from softprompt.data.rows import Task
from softprompt.errors import SettingsError
from softprompt.training.callbacks import Callback
from softprompt.training.prepare import PreparedRun, prepare_run
from softprompt.training.prepared_data import PreparedData
from softprompt.training.prompt_trainer import PromptTrainer

FACTORS = (1.0, 1 / 3, 3.0)  # of the default learning rate, which is preferred where losses are equal
C = TypeVar("C")  # a candidate
R = TypeVar("R")  # a rung
S = TypeVar("S", float, tuple[float, float])  # a score
_SCORING = 0.25  # of max_minutes, at most, for scoring candidates
_RUNGS = (0.025, 0.075)  # of the steps: all candidates do the first, the better half the second


def candidates(config: TuneConfig, task: Task) -> list[tuple[str, float]]:
    """Return the candidates, of unset settings: an init, and a factor of its default learning rate."""
    factors = FACTORS if config.learning_rate is None else (1.0,)
    start_unset = config.init == "auto" and config.init_text is None
    other = "examples" if task == "classification" and config.method == "prefix-tuning" else "text"  # not the default
    return list(product(("auto", other) if start_unset else (config.init,), factors))


def search_cost(config: TuneConfig, task: Task) -> tuple[float, int]:
    """Return the cost of a search: a share of the run's steps, and how often it scores the validation rows.

    Both are 0 where there is nothing to choose.
    """
    tried = len(candidates(config, task))
    half = (tried + 1) // 2
    return (tried * _RUNGS[0] + half * (_RUNGS[1] - _RUNGS[0]), tried + half) if tried > 1 else (0.0, 0)


def why_not_search(config: TuneConfig, task: Task, evaluation: float) -> str | None:
    """Return why there is no search; None if there is one, or nothing to choose.

    Args:
        config: settings.
        task: what the rows are for.
        evaluation: seconds that scoring the validation rows takes.
    """
    _, times = search_cost(config, task)
    if times and config.eval_rows == 0:
        return "eval_rows=0 leaves no validation rows to choose by"
    if config.max_minutes and times * evaluation > _SCORING * 60 * config.max_minutes:
        return (
            f"scoring the validation rows takes {evaluation:.0f} s each time; give a higher max_minutes, or a lower "
            "eval_rows"
        )
    return None


def search(data: PreparedData, config: TuneConfig, callback: Callback) -> dict[str, Any]:
    """Return the candidate with the lowest validation loss (successive halving, Jamieson and Talwalkar 2016).

    Candidates learn from the same rows in the same order, with the learning rate schedule of the whole run. The same
    settings and seed give the same choice.

    Args:
        data: rows and model.
        config: settings; those that are given are not searched.
        callback: called for every candidate.

    Returns:
        Settings; none where there is nothing to choose, or no validation rows to choose by.
    """
    settings = candidates(config, data.data.task)
    if len(settings) == 1 or config.eval_rows == 0:
        return {}
    prepared_by_start = _prepare_starts(data, config, dict.fromkeys(init for init, _ in settings))
    running: list[_Candidate] = []
    for init, factor in settings:
        if init in prepared_by_start:
            prepared = prepared_by_start[init]
            assert prepared.config.learning_rate
            rate = prepared.config.learning_rate * factor
            prepared = replace(prepared, config=prepared.config.model_copy(update={"learning_rate": rate}))
            running.append(_Candidate({"learning_rate": rate, "init": init}, PromptTrainer(data.model, prepared)))

    def score(candidate: _Candidate, rung: float) -> float:
        steps = max(1, round(rung * candidate.trainer.max_steps))
        loss = candidate.trainer.loss_after(steps)
        callback.candidate(candidate.settings, steps, loss)
        return -loss

    return successive_halving(running, _RUNGS if running[1:] else (), score).settings


@dataclass(frozen=True)
class _Candidate:
    """Settings to try, and a run that tries them."""

    settings: dict[str, Any]
    trainer: PromptTrainer


def successive_halving(
    candidates: Sequence[C], rungs: Sequence[R], score: Callable[[C, R], S | None], keep: float = 1 / 2
) -> C:
    """Return the best candidate: each rung scores those that are left, and keeps the best share of them.

    Args:
        candidates: one or more; of several that score the same, the first is preferred.
        rungs: what a score may take, rising from rung to rung.
        score: the higher the better; None where there is no time left: then the best one so far is returned.
        keep: the share that is left after a rung, rounded up.
    """
    for rung in rungs:
        scores: list[tuple[S, C]] = []
        for candidate in candidates:
            found = score(candidate, rung)
            if found is None:
                break
            scores.append((found, candidate))
        ranked = [candidate for _, candidate in sorted(scores, key=lambda scored: scored[0], reverse=True)]
        if len(scores) < len(candidates):
            return ranked[0] if ranked else candidates[0]
        candidates = ranked[: math.ceil(keep * len(ranked))]
    return candidates[0]


def _prepare_starts(data: PreparedData, config: TuneConfig, starts: Iterable[str]) -> dict[str, PreparedRun]:
    """Prepare a run for each start that fits and differs from those before it."""
    prepared_by_start: dict[str, PreparedRun] = {}
    for init in starts:
        try:
            prepared = prepare_run(data, config.model_copy(update={"init": init}))
        except SettingsError:
            if not prepared_by_start:
                raise
            continue  # a text that names hundreds of labels is longer than a prompt can be
        if all(prepared.config.init != other.config.init for other in prepared_by_start.values()):
            prepared_by_start[init] = prepared  # where examples do not fit, "auto" is "text"
    return prepared_by_start
