"""The folder of a run: settings, metrics, the best prompt, and states to resume from."""

from __future__ import annotations

import json
import platform
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from softprompt.prompt.soft_prompt import SoftPrompt

from softprompt.config import TuneConfig, read_settings, to_yaml
from softprompt.errors import InputError, SettingsError, StorageError
from softprompt.extras import require_package
from softprompt.model.fingerprint import AnyFingerprint, difference
from softprompt.model.frozen import FrozenModel
from softprompt.storage import (
    LOCK_FILE,
    TEMPORARY_MARK,
    clean_up,
    lock_folder,
    read_json_object,
    require_unlocked,
    storage_errors,
    strict_json,
    write_folder,
    write_records,
    write_text,
)

_KEPT_STATES = 2
_MEMBERS = "members"
_SETTINGS, _ENVIRONMENT, _METRICS = "config.yaml", "environment.json", "metrics.jsonl"
_STATE = re.compile(r"step-([1-9][0-9]{0,17})")
BASE_MODEL = "base_model"  # of what has to be the same for a run to go on


class TrainerState(BaseModel):
    """Where a run stands, as `state.json` holds it.

    Attributes:
        step: steps done.
        evaluated: the last step after which the validation rows were scored.
        best_step: the step after which the best prompt was found.
        best: its validation metrics.
        micro_batch_tokens: how much is run at once, where memory has not sufficed for what was planned.
        processes: how many share a step.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")  # metrics need not be finite, and come back as they were

    step: int = 0
    evaluated: int = -1
    best_step: int = 0
    best: dict[str, float] = {}
    micro_batch_tokens: int
    processes: int = 1


@dataclass(frozen=True)
class Checkpoint:
    """What is needed to go on as if nothing had happened.

    There are no random states in it: a step's rows follow from the seed and the step's number, and nothing else in
    a run is random.

    Attributes:
        progress: where the run stands.
        tensors: `learned.NAME` and `best.NAME`, and the optimizer's moments of what is learned.
    """

    progress: TrainerState
    tensors: dict[str, Tensor]

    def named(self, group: str) -> dict[str, Tensor]:
        """Return the tensors of a group, by their names in it."""
        ahead = f"{group}."
        return {name.removeprefix(ahead): t for name, t in self.tensors.items() if name.startswith(ahead)}


class RunFolder:
    """Reads and writes a run's files. Everything but `metrics.jsonl` is renamed into place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.prompt = path / "prompt"
        self._metrics = path / _METRICS
        self._states = path / "state"
        self._board: SummaryWriter | None = None

    @contextmanager
    def held(self, resume: bool) -> Iterator[None]:
        """Keep other commands out, and clear away what a killed one left half-written.

        Raises:
            InputError: another command is at work here, or see `require`.
        """
        self.require(resume)  # nothing is put into a folder of something else
        with lock_folder(self.path):
            self._require(resume)  # another one may have begun, and ended, since
            for folder in (self.path, self._states):
                clean_up(folder)
            yield

    def require(self, resume: bool) -> None:
        """Make sure that a run can begin here, or go on.

        Raises:
            InputError: another command is at work here; or see `require_new` and `require_begun`.
        """
        require_unlocked(self.path)
        self._require(resume)

    def _require(self, resume: bool) -> None:
        if resume:
            self.require_begun()
        else:
            self.require_new()

    def begin(self, config: TuneConfig, identity: dict[str, str], members: int = 1) -> None:
        """Write the settings of a new run, or of an ensemble of several.

        Raises:
            InputError: the folder holds another run, or something else.
        """
        self.require_new()
        noted = {**environment(), **identity, **({_MEMBERS: members} if members > 1 else {})}
        write_text(self.path / _ENVIRONMENT, json.dumps(noted, indent=2) + "\n")
        if members == 1:
            write_text(self._metrics, "")
        write_text(self.path / _SETTINGS, to_yaml(config))  # the last one: with it there is a run

    def require_new(self) -> None:
        """Make sure that nothing would be overwritten.

        Raises:
            InputError: the folder holds another run, or something else.
        """
        if (self.path / _SETTINGS).exists():
            raise InputError(f"{self.path} holds another run; give another folder, or --resume to go on with it")
        ours = {LOCK_FILE, _ENVIRONMENT, _METRICS, _SETTINGS}  # of a command that was stopped before the run had begun
        if self.path.exists() and (not self.path.is_dir() or any(not _is(ours, p) for p in self.path.iterdir())):
            raise InputError(f"{self.path} exists and is not empty; give a new folder")

    def require_begun(self) -> None:
        """Make sure that there is a run to go on with.

        Raises:
            InputError: there is none.
        """
        if not (self.path / _SETTINGS).exists():
            raise InputError(f"{self.path} holds no run to resume; leave --resume out to begin one")

    def resume(
        self, given: TuneConfig, identity: dict[str, str], model: FrozenModel, members: int = 1
    ) -> tuple[TuneConfig, Checkpoint | None]:
        """Return the settings of a run that was begun, and its newest state; None if it saved none.

        Raises:
            InputError: there is no run, or its data, model or settings are others than those given now.
        """
        self.require_begun()
        config = self.settings()
        # Where time or passes are limited, there may be fewer than were asked for.
        lowered = {"max_steps": config.epochs or config.max_minutes, "eval_rows": config.max_minutes}
        for name in given.model_fields_set:
            before, now = getattr(config, name), getattr(given, name)
            if lowered.get(name) and now and before and now >= before:
                continue
            if now not in (before, None, "auto"):
                raise SettingsError(f"the run was begun with {name} = {before!r}, not {now!r}; leave it out to resume")
        noted = read_json_object(self.path / _ENVIRONMENT, "begin a new run in another folder")
        if members != (of := noted.get(_MEMBERS, 1)):
            held = f"an ensemble; resume it with --ensemble {of}" if of > 1 else "one run; resume it without --ensemble"
            raise InputError(f"{self.path} holds {held}")
        self._require_model(noted, model, bool(config.chat_template))
        for name, value in identity.items():
            if name != BASE_MODEL and noted.get(name) != value:
                raise InputError(f"the {name.replace('_', ' ')} of {self.path} is another; resume with the same one")
        states = (self._load(step) for step in reversed(self._steps()))
        state = next((state for state in states if state is not None), None)
        if state is None and self._steps():
            warnings.warn(f"no state in {self._states} can be read; the run begins at its first step", stacklevel=2)
        self._cut_metrics(state.progress.step if state else -1)
        return config, state

    def _require_model(self, noted: dict[str, Any], model: FrozenModel, chat_template: bool) -> None:
        try:
            before: AnyFingerprint = TypeAdapter(AnyFingerprint).validate_json(noted.get(BASE_MODEL, ""))
        except (ValidationError, TypeError) as error:
            raise StorageError(f"{self.path} does not say which model it was begun with; begin a new run") from error
        differs = difference(before, model, chat_template)
        if differs:
            raise InputError(
                f"the base model of {self.path} is another: {differs}; resume with the model that it was begun with"
            )

    def save_state(self, state: Checkpoint) -> None:
        """Write a state aside, rename it into place, and drop old ones."""
        step = state.progress.step
        with write_folder(self._states / f"step-{step}") as aside:
            save_file(
                {name: tensor.contiguous() for name, tensor in state.tensors.items()}, aside / "state.safetensors"
            )
            (aside / "state.json").write_text(state.progress.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for old in self._steps()[:-_KEPT_STATES]:
            shutil.rmtree(self._states / f"step-{old}", ignore_errors=True)

    def _steps(self) -> list[int]:
        names = (_STATE.fullmatch(folder.name) for folder in self._states.glob("step-*"))
        return sorted(int(name[1]) for name in names if name)

    def _load(self, step: int) -> Checkpoint | None:
        """Read a state, or return None where it is damaged: an older one will do."""
        folder = self._states / f"step-{step}"
        try:
            progress = TrainerState.model_validate_json((folder / "state.json").read_text(encoding="utf-8"))
            return Checkpoint(progress, load_file(folder / "state.safetensors"))
        except (OSError, ValueError, SafetensorError):
            return None

    def settings(self) -> TuneConfig:
        """Return the settings that a run was begun with.

        Raises:
            SettingsError: the file is damaged.
        """
        file = self.path / _SETTINGS
        try:
            config, set_there = read_settings(TuneConfig, file)
        except SettingsError as error:
            raise SettingsError(f"{file} is damaged: {error}; begin a new run in another folder") from error
        if not set_there:
            raise SettingsError(f"{file} is damaged: it is empty; begin a new run in another folder")
        return config

    def open_board(self, step: int) -> None:
        """Also log to TensorBoard from now on; what was logged there after `step` is dropped.

        Raises:
            InputError: the package is not installed.
        """
        require_package("tensorboard", "tensorboard=true")
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)

    def close_board(self) -> None:
        if self._board is not None:
            self._board.close()

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`."""
        with storage_errors(self._metrics), self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(strict_json(record), allow_nan=False) + "\n")
        if self._board is not None:
            for name, value in record.get("validation", record).items():
                group = "validation" if "validation" in record else "training"
                self._board.add_scalar(f"{group}/{name}", value, record["step"])

    def _cut_metrics(self, step: int) -> None:
        """Drop what was logged after a state was saved, also a line that was written by half."""
        if not self._metrics.exists():  # of an ensemble
            return
        kept = []
        for line in self._metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        write_text(self._metrics, "".join(kept))

    def write_prompt(self, prompt: SoftPrompt) -> None:
        """Write the best prompt."""
        prompt.save(self.prompt)

    def write_predictions(self, predictions: list[dict[str, Any]]) -> None:
        """Write `predictions.jsonl`, the best prompt's on the validation rows."""
        write_records(self.path / "predictions.jsonl", predictions)


def _is(names: set[str], file: Path) -> bool:
    """Tell whether a file has one of some names, or was to get one when its writer was killed."""
    return file.name in names or any(file.name.startswith(f".{name}{TEMPORARY_MARK}") for name in names)


class SilentRunFolder(RunFolder):
    """Of a process that is not the first, or of a run that nothing is kept of: it writes nothing."""

    @contextmanager
    def held(self, resume: bool) -> Iterator[None]:
        yield

    def begin(self, config: TuneConfig, identity: dict[str, str], members: int = 1) -> None: ...

    def save_state(self, state: Checkpoint) -> None: ...

    def open_board(self, step: int) -> None: ...

    def log(self, record: dict[str, Any]) -> None: ...

    def write_prompt(self, prompt: SoftPrompt) -> None: ...

    def write_predictions(self, predictions: list[dict[str, Any]]) -> None: ...


NOWHERE = SilentRunFolder(Path())


def environment() -> dict[str, str]:
    """Return versions and machine."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    found["processor"] = _processor()
    for package in ("softprompt", "torch", "transformers", "tokenizers", "safetensors", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    """Return the processor's name, as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
