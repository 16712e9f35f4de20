"""Tuning: a run from rows to a prompt."""

from __future__ import annotations

import json
import time
import warnings
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softprompt.config import TuneConfig
from softprompt.data.rows import Rows, Source, as_rows
from softprompt.distributed.collective import Processes, launched
from softprompt.distributed.launch import is_single_of_accelerate
from softprompt.distributed.signals import save_before_exit, stop_together
from softprompt.errors import InputError
from softprompt.evaluation.scores import Scores
from softprompt.extras import require_package
from softprompt.model.fingerprint import fingerprint
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.training import sync
from softprompt.training.callbacks import NO_CALLBACK, Callback
from softprompt.training.checkpoint import Checkpoint
from softprompt.training.prepare import PreparedRun, most_steps, prepare_data, prepare_run
from softprompt.training.prepared_data import PreparedData
from softprompt.training.prompt_trainer import PromptTrainer
from softprompt.training.run_folder import BASE_MODEL, RunFolder
from softprompt.training.search import search, why_not_search
from softprompt.training.throughput import Throughput, measure_throughput
from softprompt.training.trainer import TrainResult, reproducible


@dataclass(frozen=True)
class TuneResult:
    """The result of `tune`.

    Attributes:
        prompt: the best prompt.
        run: the run's folder; None without `out`.
        steps: steps done in all, also before the run was resumed.
        seconds: wall time of this call.
        best_step: the step after which the best prompt was found.
        metrics: of the best prompt on the validation rows; empty without validation rows.
        scores: the scores that these metrics are computed from; None without validation rows.
        settings: the settings, all resolved.
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
    processes: Processes | None = None,
) -> TuneResult:
    """Train a soft prompt (Lester et al. 2021) or a prefix (Li and Liang 2021); the base model is not changed.

    Several processes that `torchrun` has started all call it with the same arguments and get the same result. The
    first one alone writes files and calls the callback.

    Args:
        model: the frozen model.
        data: training rows, or what `load_data` reads. Without `eval_data`, some are held out for validation.
        config: settings; None for the defaults.
        eval_data: validation rows.
        out: the run's folder; None to write nothing.
        resume: continue the run in `out`.
        callback: called at steps and evaluations.
        throughput: how long steps and evaluations take, where that is known; None to measure it for `max_minutes`.
        processes: the processes that share the run; None for those that `torchrun` has started, `ALONE` for this one
            alone, whatever the environment says.

    Raises:
        InputError: what was given does not fit together, or another command is using `out`.
        KeyboardInterrupt: Ctrl-C; a checkpoint is saved. So it is on SIGTERM and SIGHUP, unless the program handles
            them, and then the process ends.
        RunError: the loss is not finite, or one row does not fit in memory.
        StorageError: a file cannot be written.
    """
    began = time.monotonic()
    if processes is None:
        processes = launched()
        if is_single_of_accelerate():
            message = "accelerate launch has started one process, as it does with --cpu; try --multi_gpu"
            warnings.warn(message, stacklevel=2)
    if resume and out is None:
        raise InputError("resume continues the run in a folder; give it as out")
    rows = as_rows(data)
    eval_rows = None if eval_data is None else as_rows(eval_data, rows.task)
    given = config or TuneConfig()
    folder = RunFolder(Path(out)) if out is not None and processes.first else None
    callback = callback if callback and processes.first else NO_CALLBACK
    with save_before_exit(), nullcontext() if folder is None else folder.lock(resume):  # before minutes of search
        if given.tensorboard:
            require_package("tensorboard", "tensorboard=true")
        identity = identity_of(model, rows, eval_rows)
        checkpoint = None
        if resume:
            given, checkpoint = sync.resume(processes, folder, given, identity, model)
        prepared_data = prepare_data(model, rows, given, eval_rows, processes)
        if resume:
            prepared = prepare_run(prepared_data, given)
        else:
            prepared = _choose_and_prepare(prepared_data, given, identity, callback, throughput)
        prepared = sync.broadcast_plan(processes, prepared, identity)
        if folder is not None and not resume:
            folder.begin(prepared.config, identity)
        result = _train(model, prepared, folder, callback, checkpoint, processes)
        prompt = SoftPrompt(result.weights["prompt"], _record(model, prepared, result, identity))
        if folder is not None:
            folder.write_result(prompt, result.scores)
        processes.broadcast(b"written")  # no process returns before the files are there
    return TuneResult(
        prompt=prompt,
        run=None if out is None else Path(out),
        steps=result.state.step,
        seconds=time.monotonic() - began,
        best_step=result.state.best_step,
        metrics=result.state.best,
        scores=result.scores,
        settings=prepared.config,
    )


def _train(
    model: FrozenModel,
    prepared: PreparedRun,
    folder: RunFolder | None,
    callback: Callback,
    checkpoint: Checkpoint | None,
    processes: Processes,
) -> TrainResult:
    """Take all steps, and log them."""
    step = checkpoint.state.step if checkpoint else 0
    with ExitStack() as stack:
        run_log = None
        if folder is not None:
            run_log = folder.open_log(step, prepared.config.tensorboard)
            stack.callback(run_log.close)
        callback.begin(prepared, step)
        stack.callback(callback.end)
        stack.enter_context(reproducible(prepared.config.threads))
        if processes.count > 1:
            stack.enter_context(stop_together())
        return PromptTrainer(model, prepared, run_log, callback, checkpoint, processes).run()


def _choose_and_prepare(
    data: PreparedData,
    config: TuneConfig,
    identity: dict[str, str],
    callback: Callback,
    throughput: Throughput | None,
) -> PreparedRun:
    """Prepare the run: with `max_minutes` for as many steps as fit, with a thorough budget after a search."""
    began, seconds, processes = time.monotonic(), 60 * (config.max_minutes or 0), data.processes
    reasons: dict[str, str] = {}
    with reproducible(config.threads):
        most = None
        if not seconds:
            throughput = None
        else:
            pilot = sync.broadcast_plan(processes, prepare_run(data, config), identity)
            most = most_steps(pilot, config)
            if throughput is None:
                throughput = measure_throughput(PromptTrainer(data.model, pilot, processes=processes), seconds)
        if config.budget == "thorough":
            steps = config.max_steps
            if throughput:  # the search takes shares of the steps that there will be
                steps = throughput.fit_to_budget(seconds, most, config.eval_every)["max_steps"]
            evaluation = throughput.evaluation if throughput else 0.0
            chosen = _search(data, config.model_copy(update={"max_steps": steps}), evaluation, callback)
            config = config.model_copy(update=chosen)
            reasons = dict.fromkeys(chosen, "best of the search")
        if throughput:
            fitting = throughput.fit_to_budget(seconds - (time.monotonic() - began), most, config.eval_every)
            if config.eval_every is not None:
                del fitting["eval_every"]
            if fitting["max_steps"] == most and "eval_rows" not in fitting:
                del fitting["max_steps"]
            config = config.model_copy(update=json.loads(processes.broadcast(json.dumps(fitting).encode())))
            reasons |= dict.fromkeys(fitting, f"{config.max_minutes:.3g} minutes")
    prepared = prepare_run(data, config)
    return replace(prepared, reasons={**prepared.reasons, **reasons})


def _search(data: PreparedData, config: TuneConfig, evaluation: float, callback: Callback) -> dict[str, Any]:
    """Return the settings that a search chooses, the same in all processes; an evaluation takes so many seconds."""
    why_not = why_not_search(config, data.data.task, evaluation)
    if why_not is not None:
        warnings.warn(f"no search: {why_not}", stacklevel=4)
    chosen = search(data, config, callback) if why_not is None else {}
    shared: dict[str, Any] = json.loads(data.processes.broadcast(json.dumps(chosen).encode()))
    return shared


def data_hashes(data: Rows, eval_data: Rows | None) -> dict[str, str]:
    """Return the hashes of the rows that were given."""
    validation = eval_data.sha256 if eval_data is not None else "held back from the training data"
    return {"training_data": data.sha256, "validation_data": validation}


def identity_of(model: FrozenModel, data: Rows, eval_data: Rows | None) -> dict[str, str]:
    """Return what must be the same to resume a run."""
    return {
        **data_hashes(data, eval_data),
        BASE_MODEL: json.dumps(fingerprint(model).model_dump()),
        "precision": str(model.hf_model.dtype),
    }


def _record(model: FrozenModel, prepared: PreparedRun, result: TrainResult, identity: dict[str, str]) -> Record:
    return Record.of(
        model,
        prepared.encoder.format,
        prepared.encoder.max_length,
        label_bias=result.label_bias,
        training={
            "settings": prepared.config.model_dump(),
            "steps": result.state.step,
            "best_step": result.state.best_step,
            "train_rows": len(prepared.train),
            "validation_rows": len(prepared.validation) if prepared.validation is not None else 0,
        },
        metrics=result.state.best,
        data={name: identity[name] for name in ("training_data", "validation_data")},
    )
