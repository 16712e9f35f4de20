"""The search of a thorough run: which learning rate and which start, by successive halving on the validation rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import Any

from softprompt.config import TuneConfig
from softprompt.data.rows import Task
from softprompt.errors import SettingsError
from softprompt.training.callbacks import Callback
from softprompt.training.prepare import PreparedRun, prepare_run
from softprompt.training.prepared_data import PreparedData
from softprompt.training.prompt_trainer import PromptTrainer

FACTORS = (1.0, 1 / 3, 3.0)  # times a method's usual learning rate, which is taken where they end alike
_SCORING = 0.25  # of max_minutes, at most, goes into scoring what is tried
_RUNGS = (0.025, 0.075)  # of the steps: all candidates go to the first, the better half goes on to the second


def candidates(config: TuneConfig, task: Task) -> list[tuple[str, float]]:
    """Return what is tried, of what was left open: starts, and factors of the learning rate that is usual for them."""
    factors = FACTORS if config.learning_rate is None else (1.0,)
    open_start = config.init == "auto" and config.init_text is None
    other = "examples" if task == "classification" and config.method == "prefix-tuning" else "text"  # than the usual
    return list(product(("auto", other) if open_start else (config.init,), factors))


def search_cost(config: TuneConfig, task: Task) -> tuple[float, int]:
    """Return what a search takes at most: the share of a run's steps, and how many times it scores the validation rows.

    Both are 0 where there is nothing to choose.
    """
    tried = len(candidates(config, task))
    half = (tried + 1) // 2
    return (tried * _RUNGS[0] + half * (_RUNGS[1] - _RUNGS[0]), tried + half) if tried > 1 else (0.0, 0)


def why_not_search(config: TuneConfig, task: Task, evaluation: float) -> str | None:
    """Return why a search would choose by nothing, or take too much of the time; an `evaluation` takes so many seconds.

    None where there is nothing to choose, too.
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

    Every candidate is a run of the same rows in the same order, on the schedule of the whole run. The same settings
    and seed give the same choice.

    Args:
        data: rows and model.
        config: settings; those that are given are not searched.
        callback: told of every candidate.

    Returns:
        Settings; none where there is nothing to choose, or no validation rows to choose by.
    """
    tried = candidates(config, data.data.task)
    if len(tried) == 1 or config.eval_rows == 0:
        return {}
    prepared_by_start = _prepared_by_start(data, config, dict.fromkeys(init for init, _ in tried))
    running: list[tuple[dict[str, Any], PromptTrainer]] = []
    for init, factor in tried:
        if init in prepared_by_start:
            prepared = prepared_by_start[init]
            assert prepared.config.learning_rate
            rate = prepared.config.learning_rate * factor
            prepared = replace(prepared, config=prepared.config.model_copy(update={"learning_rate": rate}))
            trainer = PromptTrainer(data.model, prepared)
            running.append(({"learning_rate": rate, "init": init}, trainer))
    for rung in _RUNGS if running[1:] else ():
        found = []
        for number, (settings, trainer) in enumerate(running):
            until = max(1, round(rung * trainer.max_steps))
            loss = trainer.tried(until)
            callback.candidate(settings, until, loss)
            found.append((loss, number))
        running = [running[number] for _, number in sorted(found)[: (len(found) + 1) // 2]]
    return running[0][0]


def _prepared_by_start(data: PreparedData, config: TuneConfig, starts: Iterable[str]) -> dict[str, PreparedRun]:
    """Return a plan for each start that fits and is another than those before it."""
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
