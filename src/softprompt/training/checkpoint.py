"""Checkpoints: what `--resume` continues from, in a run's folder `state/step-N/`."""

from __future__ import annotations

import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from softprompt.storage import write_folder

_CHECKPOINTS_KEPT = 2
_FOLDER = re.compile(r"step-([1-9][0-9]{0,17})")
_STATE, _TENSORS = "state.json", "state.safetensors"


class TrainerState(BaseModel):
    """Where a run stands, as `state.json` holds it.

    Attributes:
        step: steps done.
        evaluated: the last step after which the validation rows were scored; -1 for none.
        best_step: the step after which the best weights were found.
        best: their validation metrics.
        micro_batch_tokens: text tokens run at once; less than in the settings where memory did not suffice.
        processes: how many share a step.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")  # metrics need not be finite

    step: int = 0
    evaluated: int = -1
    best_step: int = 0
    best: dict[str, float] = {}
    micro_batch_tokens: int
    processes: int = 1


@dataclass(frozen=True)
class Checkpoint:
    """All that a resumed run needs to end as if it had not been stopped.

    There are no random states in it: a step's rows follow from the seed and the step's number, and nothing else in
    a run is random.

    Attributes:
        state: where the run stands.
        tensors: `learned.NAME` and `best.NAME`, and the optimizer's moments of the trainable parameters.
    """

    state: TrainerState
    tensors: dict[str, Tensor]

    def group(self, group: str) -> dict[str, Tensor]:
        """Return the tensors of a group, by their names in it."""
        start = f"{group}."
        return {name.removeprefix(start): t for name, t in self.tensors.items() if name.startswith(start)}


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint under another name, rename it into place, and delete all but the newest two."""
    with write_folder(folder / f"step-{checkpoint.state.step}") as aside:
        save_file({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}, aside / _TENSORS)
        (aside / _STATE).write_text(checkpoint.state.model_dump_json(indent=2) + "\n", encoding="utf-8")
    for step in _steps(folder)[:-_CHECKPOINTS_KEPT]:
        shutil.rmtree(folder / f"step-{step}", ignore_errors=True)


def load_newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint that is not damaged; None where there is none."""
    steps = _steps(folder)
    checkpoints = (load_checkpoint(folder / f"step-{step}") for step in reversed(steps))
    found = next((checkpoint for checkpoint in checkpoints if checkpoint is not None), None)
    if found is None and steps:
        warnings.warn(f"no state in {folder} can be read; the run begins at its first step", stacklevel=3)
    return found


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Read a checkpoint; None where it is damaged."""
    try:
        state = TrainerState.model_validate_json((folder / _STATE).read_text(encoding="utf-8"))
        return Checkpoint(state, load_file(folder / _TENSORS))
    except (OSError, ValueError, SafetensorError):
        return None


def _steps(folder: Path) -> list[int]:
    names = (_FOLDER.fullmatch(each.name) for each in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)
