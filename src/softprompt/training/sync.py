"""What all processes of a run have to hold alike: its settings, its start, and the state that it goes on from."""

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
from softprompt.training.prepare import Plan
from softprompt.training.run_folder import Progress, RunFolder, State

_OF_A_MACHINE = {"device", "threads"}


def share_config(processes: Processes, config: TuneConfig | None) -> TuneConfig:
    """Return the first process's settings."""
    text = config.model_dump_json() if config is not None else ""
    return TuneConfig.model_validate_json(processes.share(text.encode()))


def agree(processes: Processes, plan: Plan, identity: dict[str, str]) -> Plan:
    """Return the first process's plan, with micro-batches that fit into every process's memory.

    Raises:
        InputError: the processes were given different rows, models or settings.
    """
    if processes.count == 1:
        return plan
    assert plan.config.micro_batch_tokens
    sizes = torch.zeros(processes.count, dtype=torch.float64)
    sizes[processes.rank] = plan.config.micro_batch_tokens
    fitting = int(processes.total(lambda: sizes, sizes.shape).min())
    needed = torch.tensor([float(bool(plan.config.gradient_checkpointing))])
    recompute = bool(processes.total(lambda: needed, needed.shape))  # one that has too little memory is enough
    own = plan.config.model_copy(update={"micro_batch_tokens": fitting, "gradient_checkpointing": recompute})
    config = share_config(processes, own)
    known: dict[str, str] = json.loads(processes.share(json.dumps(identity).encode()))
    other = own.model_dump(exclude=_OF_A_MACHINE) != config.model_dump(exclude=_OF_A_MACHINE) or known != identity
    if processes.total(lambda: torch.tensor([other]), (1,)):
        raise InputError("the processes were given different rows, models or settings; start all with the same command")
    start = load(processes.share(save({"start": plan.start})))["start"]
    if plan.scorer is not None:
        plan.scorer.at_once, plan.scorer.processes = fitting, processes
    footprint = replace(plan.footprint, recompute=recompute)
    return replace(plan, config=config, start=start, footprint=footprint)


def resume(
    processes: Processes, run: RunFolder, given: TuneConfig, identity: dict[str, str], model: FrozenModel
) -> tuple[TuneConfig, State | None]:
    """Return the settings and the newest state of a run, which the first process alone reads (`RunFolder.resume`)."""
    config, state = run.resume(given, identity, model) if processes.first else (None, None)
    config = share_config(processes, config)
    progress = processes.share((state.progress.model_dump_json() if state else "").encode())
    if not progress:
        return config, None
    tensors = processes.share(save(state.tensors) if state else b"")
    found = Progress.model_validate_json(progress)
    if processes.first and found.processes != processes.count:
        warnings.warn(
            f"the run was begun with {found.processes} processes and goes on with {processes.count}: it will not end "
            "with the same prompt to the byte",
            stacklevel=3,
        )
    return config, State(found.model_copy(update={"processes": processes.count}), load(tensors))
