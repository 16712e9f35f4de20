"""Tuning: a run from rows to a prompt."""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from softprompt.config import TuneConfig
from softprompt.data.rows import Rows, Source, as_rows
from softprompt.distributed.collective import launched
from softprompt.distributed.launch import is_single_of_accelerate
from softprompt.distributed.signals import save_before_exit, stop_together
from softprompt.evaluation.scores import Scores
from softprompt.extras import require_package
from softprompt.model.fingerprint import fingerprint
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.training import sync
from softprompt.training.callbacks import Callback
from softprompt.training.prepare import PreparedRun, most_steps, prepare_data, prepare_run
from softprompt.training.prepared_data import PreparedData
from softprompt.training.prompt_trainer import PromptTrainer
from softprompt.training.run_folder import BASE_MODEL, RunFolder, SilentRunFolder
from softprompt.training.search import search, why_not_search
from softprompt.training.trainer import Throughput, TrainResult, measure_throughput


@dataclass(frozen=True)
class TuneResult:
    """What a run gave.

    Attributes:
        prompt: the best prompt.
        run: the run's folder, None if none was asked for.
        steps: steps done in all.
        seconds: time that this call took, model loading not counted.
        best_step: the step after which the prompt was found.
        metrics: the best prompt's, on the validation rows; empty without those.
        scores: what the metrics are of; None without validation rows.
        settings: all settings, decided.
    """

    prompt: SoftPrompt
    run: Path | None
    steps: int
    seconds: float
    best_step: int
    metrics: dict[str, float]
    scores: Scores | None
    settings: TuneConfig


def tune(
    model: FrozenModel,
    data: Source,
    config: TuneConfig | None = None,
    *,
    eval_data: Source | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    callback: Callback | None = None,
    throughput: Throughput | None = None,
) -> TuneResult:
    """Learn a soft prompt (Lester et al. 2021) or a deep prefix (Li and Liang 2021); the model itself is not changed.

    Of several processes that `torchrun` has started, all call it with the same arguments and get the same result; the
    first one alone writes, and tells its watcher.

    Args:
        model: the frozen model.
        data: rows to learn from, or what `load_data` reads; a part is held back to choose the best prompt on, unless
            `eval_data` is given.
        config: settings; None for the defaults.
        eval_data: validation rows.
        out: the run's folder; None to keep nothing but the result.
        resume: go on with the run in `out`.
        callback: told of every step.
        throughput: how long steps and evaluations take, where `max_minutes` is set and it is known; None to measure it.

    Raises:
        InputError: what was given does not fit together, or another command is at work in `out`.
        KeyboardInterrupt: Ctrl-C; the state is saved. On SIGTERM and SIGHUP, where nobody handles them, it is too, and
            then the process ends as they have it.
        RunError: the loss is not finite, or one row does not fit in memory.
        StorageError: a file cannot be written.
    """
    began = time.monotonic()
    data = as_rows(data)
    eval_data = None if eval_data is None else as_rows(eval_data, data.task)
    processes = launched()
    callback = callback if callback and processes.first else Callback()
    if is_single_of_accelerate():
        warnings.warn("accelerate launch has started one process, as it does with --cpu; try --multi_gpu", stacklevel=2)
    with ExitStack() as stack:
        stack.enter_context(save_before_exit())
        kind = RunFolder if processes.first else SilentRunFolder
        run = kind(Path(out if out is not None else stack.enter_context(tempfile.TemporaryDirectory())))
        stack.enter_context(run.held(resume))  # before minutes of searching
        if config is not None and config.tensorboard:
            require_package("tensorboard", "tensorboard=true")
        identity = identity_of(model, data, eval_data)
        state = None
        given = config or TuneConfig()
        if resume:
            given, state = sync.resume(processes, run, given, identity, model)
            prepared = prepare_run(prepare_data(model, data, given, eval_data, processes), given)
        else:
            prepared_data = prepare_data(model, data, given, eval_data, processes)
            prepared = _prepared(prepared_data, given, identity, callback, throughput)
        prepared = sync.broadcast_plan(processes, prepared, identity)
        if not resume:
            run.begin(prepared.config, identity)
        step = state.progress.step if state else 0
        if prepared.config.tensorboard:
            run.open_board(step)
        callback.begin(prepared, step)
        try:
            with reproducible(prepared.config.threads), stop_together():
                found = PromptTrainer(model, prepared, run, callback, state, processes).run()
        finally:
            callback.end()
            run.close_board()
        made = SoftPrompt(found.weights["prompt"], _record(model, prepared, found, identity))
        run.write_prompt(made)
        if found.scores is not None:
            run.write_predictions(found.scores.predictions())
        processes.broadcast(b"written")  # what a process does with the result, it finds the files there
    seconds = time.monotonic() - began
    place, progress = run.path if out is not None else None, found.progress
    best = progress.best_step, progress.best, found.scores
    return TuneResult(made, place, progress.step, seconds, *best, prepared.config)


def _prepared(
    data: PreparedData,
    config: TuneConfig,
    identity: dict[str, str],
    callback: Callback,
    throughput: Throughput | None,
) -> PreparedRun:
    """Make the plan: a thorough run searches first, and one that has so many minutes counts how many steps fit."""
    began, reasons, processes = time.monotonic(), {}, data.processes
    with reproducible(config.threads):
        seconds, most = 60 * (config.max_minutes or 0), None
        if not seconds:
            throughput = None
        else:
            pilot = sync.broadcast_plan(processes, prepare_run(data, config), identity)
            most = most_steps(pilot, config)
            throughput = throughput or measure_throughput(
                PromptTrainer(data.model, pilot, processes=processes), seconds
            )
        if config.budget == "thorough":
            # The search takes shares of the steps that there will be.
            steps = (
                throughput.fit_to_budget(seconds, most, config.eval_every)["max_steps"]
                if throughput
                else config.max_steps
            )
            chosen, why = {}, why_not_search(config, data.data.task, throughput.evaluation if throughput else 0.0)
            if why is None:
                chosen = search(data, config.model_copy(update={"max_steps": steps}), callback)
            else:
                warnings.warn(f"no search: {why}", stacklevel=3)
            chosen = json.loads(processes.broadcast(json.dumps(chosen).encode()))
            config = config.model_copy(update=chosen)
            reasons = dict.fromkeys(chosen, "best of the search")
        if throughput:
            fit_to_budget = throughput.fit_to_budget(seconds - (time.monotonic() - began), most, config.eval_every)
            if config.eval_every is not None:
                del fit_to_budget["eval_every"]
            if fit_to_budget["max_steps"] == most and "eval_rows" not in fit_to_budget:
                del fit_to_budget["max_steps"]
            config = config.model_copy(update=json.loads(processes.broadcast(json.dumps(fit_to_budget).encode())))
            reasons |= dict.fromkeys(fit_to_budget, f"{config.max_minutes:.3g} minutes")
    prepared = prepare_run(data, config)
    return replace(prepared, reasons={**prepared.reasons, **reasons})


def throughput_of(model: FrozenModel, data: Rows, config: TuneConfig, eval_data: Rows | None) -> Throughput:
    """Return how long steps and evaluations of a run of `max_minutes` take, for several like it."""
    assert config.max_minutes
    with reproducible(config.threads):
        trainer = PromptTrainer(model, prepare_run(prepare_data(model, data, config, eval_data), config))
        return measure_throughput(trainer, 60 * config.max_minutes)


@contextmanager
def reproducible(threads: int | None) -> Iterator[None]:
    """Make runs repeatable bit by bit: gathering with repeated indices is not, on several threads, by default."""
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cores = torch.get_num_threads()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(threads or cores)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
        torch.set_num_threads(cores)


def data_hashes(data: Rows, eval_data: Rows | None) -> dict[str, str]:
    """Return which rows a prompt is learned from and chosen by."""
    held = eval_data.sha256 if eval_data is not None else "held back from the training data"
    return {"training_data": data.sha256, "validation_data": held}


def identity_of(model: FrozenModel, data: Rows, eval_data: Rows | None) -> dict[str, str]:
    """Return what has to be the same for a run to go on."""
    return {
        **data_hashes(data, eval_data),
        BASE_MODEL: json.dumps(fingerprint(model).model_dump()),
        "precision": str(model.hf_model.dtype),
    }


def _record(model: FrozenModel, prepared: PreparedRun, found: TrainResult, identity: dict[str, str]) -> Record:
    return Record.of(
        model,
        prepared.encoder.format,
        prepared.encoder.max_length,
        label_bias=found.label_bias,
        training={
            "settings": prepared.config.model_dump(),
            "steps": found.progress.step,
            "best_step": found.progress.best_step,
            "train_rows": len(prepared.train),
            "validation_rows": len(prepared.validation) if prepared.validation is not None else 0,
        },
        metrics=found.progress.best,
        data={name: identity[name] for name in ("training_data", "validation_data")},
    )
