"""What all processes of a run must have in common: settings, initial prompt, checkpoint."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import torch
from safetensors.torch import load, save

from softprompt.config import TuneConfig
from softprompt.distributed.collective import Processes
from softprompt.errors import InputError
from softprompt.model.frozen import FrozenModel
from softprompt.training.checkpoint import Checkpoint, TrainerState
from softprompt.training.prepare import PreparedRun
from softprompt.training.run_folder import RunFolder

_OF_A_MACHINE = {"device", "threads"}


def broadcast_config(processes: Processes, config: TuneConfig | None) -> TuneConfig:
    """Return the settings of the first process."""
    text = config.model_dump_json() if config is not None else ""
    return TuneConfig.model_validate_json(processes.broadcast(text.encode()))


def broadcast_plan(processes: Processes, prepared: PreparedRun, identity: dict[str, str]) -> PreparedRun:
    """Return the run as the first process prepared it, with micro-batches that fit in the memory of every process.

    Raises:
        InputError: the processes were given different rows, models or settings.
    """
    if processes.count == 1:
        return prepared
    assert prepared.config.micro_batch_tokens
    sizes = torch.zeros(processes.count, dtype=torch.float64)
    sizes[processes.rank] = prepared.config.micro_batch_tokens
    fitting = int(processes.all_reduce(lambda: sizes, sizes.shape).min())
    needed = torch.tensor([float(bool(prepared.config.gradient_checkpointing))])
    # One process that has too little memory is enough.
    checkpointing = bool(processes.all_reduce(lambda: needed, needed.shape))
    own = prepared.config.model_copy(update={"micro_batch_tokens": fitting, "gradient_checkpointing": checkpointing})
    config = broadcast_config(processes, own)
    known: dict[str, str] = json.loads(processes.broadcast(json.dumps(identity).encode()))
    other = own.model_dump(exclude=_OF_A_MACHINE) != config.model_dump(exclude=_OF_A_MACHINE) or known != identity
    if processes.all_reduce(lambda: torch.tensor([other]), (1,)):
        raise InputError("the processes were given different rows, models or settings; start all with the same command")
    start = load(processes.broadcast(save({"start": prepared.start})))["start"]
    memory_estimate = replace(prepared.memory_estimate, activation_checkpointing=checkpointing)
    return prepared.share_among(processes, config, start, memory_estimate)


def resume(
    processes: Processes, folder: RunFolder | None, given: TuneConfig, identity: dict[str, str], model: FrozenModel
) -> tuple[TuneConfig, Checkpoint | None]:
    """Return the settings and the newest checkpoint of a run, which the first process reads (`RunFolder.resume`)."""
    config, checkpoint = folder.resume(given, identity, model) if folder is not None else (None, None)
    config = broadcast_config(processes, config)
    state = processes.broadcast((checkpoint.state.model_dump_json() if checkpoint else "").encode())
    if not state:
        return config, None
    tensors = processes.broadcast(save(checkpoint.tensors) if checkpoint else b"")
    found = TrainerState.model_validate_json(state)
    if processes.first and found.processes != processes.count:
        warnings.warn(
            f"the run was begun with {found.processes} processes and goes on with {processes.count}: it will not end "
            "with the same prompt to the byte",
            stacklevel=3,
        )
    return config, Checkpoint(found.model_copy(update={"processes": processes.count}), load(tensors))
