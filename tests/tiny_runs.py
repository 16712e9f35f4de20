"""Settings of runs that tests wait for, what a command leaves behind, and what two runs are compared by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.config import TuneConfig
from softprompt.data.rows import Rows
from softprompt.model.frozen import FrozenModel
from softprompt.training.prepare import PreparedRun, prepare_data, prepare_run

# A run that tests wait for, as options of the command and as settings.
SHORT = ["--set", "max_steps=3", "--set", "batch_size=4", "--set", "num_virtual_tokens=5"]
SHORT_SETTINGS = {"max_steps": 6, "batch_size": 4, "eval_every": 2, "save_every": 2, "num_virtual_tokens": 5}


def prepared_run(model: FrozenModel, rows: Rows, config: TuneConfig, eval_data: Rows | None = None) -> PreparedRun:
    """Prepare a single run."""
    return prepare_run(prepare_data(model, rows, config, eval_data), config)


@dataclass
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def record(self) -> dict[str, Any]:
        """The one JSON object that stdout holds."""
        assert self.out.endswith("}\n")
        assert self.out.count("\n") == 1
        loaded = json.loads(self.out)
        assert isinstance(loaded, dict)
        return loaded


Command = Callable[..., Done]


def short(**settings: object) -> TuneConfig:
    return TuneConfig(**{**SHORT_SETTINGS, **settings})  # type: ignore[arg-type]


def weights_hash(model: FrozenModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.hf_model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def prompt_bytes(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "prompt").iterdir())}


def log_without_times(run: Path) -> list[dict[str, object]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "step_seconds"} for record in records]
