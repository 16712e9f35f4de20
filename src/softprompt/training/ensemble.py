"""Training an ensemble: several prompts for one task, from different seeds."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from softprompt.config import TuneConfig
from softprompt.data.rows import Rows, Source, as_rows
from softprompt.distributed.collective import ALONE, launched
from softprompt.distributed.signals import save_before_exit
from softprompt.errors import SettingsError
from softprompt.evaluation.scores import average_scores
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.ensemble import Ensemble, make_ensemble
from softprompt.prompt.layout import member_name
from softprompt.training.callbacks import Callback
from softprompt.training.prepare import prepare_data, prepare_run
from softprompt.training.prompt_trainer import PromptTrainer
from softprompt.training.run_folder import RunFolder
from softprompt.training.throughput import Throughput, measure_throughput
from softprompt.training.tune import TuneResult, data_hashes, identity_of, tune

_MIN_MINUTES = 0.01  # of a member, where measuring the throughput takes all the time


@dataclass(frozen=True)
class EnsembleResult:
    """The result of `tune_ensemble`.

    Attributes:
        prompt: the ensemble.
        runs: the result of each member's run.
        seconds: time that this call took.
        metrics: the ensemble's, on the validation rows; empty without those.
    """

    prompt: Ensemble
    runs: list[TuneResult]
    seconds: float
    metrics: dict[str, float]


def tune_ensemble(
    model: FrozenModel,
    data: Source,
    config: TuneConfig | None = None,
    *,
    members: int,
    eval_data: Source | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    callback: Callback | None = None,
    throughput: Throughput | None = None,
) -> EnsembleResult:
    """Train several prompts for a task, each with a seed of its own (Lester et al. 2021, section 6).

    All have the same training and validation rows, in different orders. Only a random initialization differs between
    them. Each has an equal share of `max_minutes`.

    Args:
        model: the frozen model.
        data, config, eval_data: as for `tune`; the members' seeds count from `config.seed` on.
        members: how many, two at least.
        out: the folder: the settings as given, a run a member in `member-1`, `member-2`, …, the ensemble in `prompt`.
        resume: continue what is in `out`.
        callback: called at the steps of all members.
        throughput: as for `tune`.

    Raises:
        As `tune`.
    """
    if members < 2:
        raise SettingsError(f"an ensemble of {members} is none; give two members or more")
    if launched().count > 1:
        raise SettingsError("an ensemble is learned by one process; start it without torchrun, or learn one prompt")
    data = as_rows(data)
    eval_data = None if eval_data is None else as_rows(eval_data, data.task)
    folder = None if out is None else RunFolder(Path(out))
    with ExitStack() as stack:
        stack.enter_context(save_before_exit())
        if folder is not None:
            stack.enter_context(folder.lock(resume))
        return _tune_members(
            model, data, config or TuneConfig(), members, eval_data, folder, resume, callback, throughput
        )


def _tune_members(
    model: FrozenModel,
    data: Rows,
    given: TuneConfig,
    members: int,
    eval_data: Rows | None,
    folder: RunFolder | None,
    resume: bool,
    callback: Callback | None,
    throughput: Throughput | None,
) -> EnsembleResult:
    """Train one after the other, in the ensemble's folder, which is locked."""
    began = time.monotonic()
    places = [None if folder is None else folder.path / member_name(number) for number in range(1, members + 1)]
    if folder is not None and resume:
        given, _ = folder.resume(given, identity_of(model, data, eval_data), model, members)
    prepared_data = prepare_data(model, data, given, eval_data)
    if folder is not None and not resume:
        prepare_run(prepared_data, given)  # raises for what does not fit together before anything is written
    begun = [resume and place is not None and (place / "config.yaml").exists() for place in places]
    minutes = None
    if given.max_minutes is not None and not all(begun):
        if throughput is None:
            trainer = PromptTrainer(model, prepare_run(prepared_data, given))
            throughput = measure_throughput(trainer, 60 * given.max_minutes)
        minutes = max(given.max_minutes - (time.monotonic() - began) / 60, _MIN_MINUTES) / members
        rows = throughput.fit_to_budget(60 * minutes, eval_every=given.eval_every).get("eval_rows")
        if rows and not resume:
            given, throughput = given.model_copy(update={"eval_rows": rows}), throughput.with_eval_rows(rows)
        throughput = replace(throughput, rows=0)  # no member may score fewer validation rows
    if folder is not None and not resume:
        folder.begin(given, identity_of(model, data, eval_data), members)
    split = prepared_data.split(given)
    runs: list[TuneResult] = []
    for number, (place, there) in enumerate(zip(places, begun, strict=True)):
        settings = given.model_copy(update={"seed": given.seed + number, "max_minutes": None if there else minutes})
        run = tune(
            model,
            split.train,
            settings,
            eval_data=split.validation,
            out=place,
            resume=there,
            callback=callback,
            throughput=throughput,
            processes=ALONE,
        )
        runs.append(run)
    each = [run.scores for run in runs if run.scores is not None]
    scores = average_scores(each) if each else None
    values = scores.values() if scores is not None else {}
    hashes = data_hashes(data, eval_data)  # members know a part of the rows each
    prompt = make_ensemble([run.prompt for run in runs], values, hashes)
    if folder is not None:
        folder.write_result(prompt, scores)
    return EnsembleResult(prompt, runs, time.monotonic() - began, prompt.record.metrics)
