"""The log of a run: `metrics.jsonl`, TensorBoard's files, and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.extras import require_package
from softprompt.storage import storage_errors, strict_json
from softprompt.training.checkpoint import Checkpoint, save_checkpoint

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS, CHECKPOINTS = "metrics.jsonl", "state"


class RunLog:
    """Writes down the course of a run. Only the first of several processes has one.

    Args:
        folder: the run's folder.
        step: steps done before.
        tensorboard: also log to TensorBoard; what was logged there after `step` is dropped.

    Raises:
        InputError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, step: int = 0, tensorboard: bool = False) -> None:
        self._metrics, self._checkpoints = folder / METRICS, folder / CHECKPOINTS
        self._board: SummaryWriter | None = None
        if tensorboard:
            require_package("tensorboard", "tensorboard=true")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`."""
        with storage_errors(self._metrics), self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(strict_json(record), allow_nan=False) + "\n")
        if self._board is not None:
            group = "validation" if "validation" in record else "training"
            for name, value in record.get("validation", record).items():
                self._board.add_scalar(f"{group}/{name}", value, record["step"])

    def save(self, checkpoint: Checkpoint) -> None:
        """Save a checkpoint."""
        save_checkpoint(self._checkpoints, checkpoint)

    def close(self) -> None:
        """Write what TensorBoard has not written yet."""
        if self._board is not None:
            self._board.close()
