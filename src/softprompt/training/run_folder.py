"""The folder of a run: settings, environment, log, the best prompt and its predictions."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError

if TYPE_CHECKING:
    from softprompt.evaluation.scores import Scores
    from softprompt.prompt.ensemble import Ensemble
    from softprompt.prompt.soft_prompt import SoftPrompt

from softprompt.config import TuneConfig, read_settings, to_yaml
from softprompt.errors import InputError, SettingsError, StorageError
from softprompt.model.fingerprint import AnyFingerprint, difference
from softprompt.model.frozen import FrozenModel
from softprompt.storage import (
    LOCK_FILE,
    TEMPORARY_MARK,
    clean_up,
    lock_folder,
    read_json_object,
    require_unlocked,
    write_records,
    write_text,
)
from softprompt.training.checkpoint import Checkpoint, load_newest_checkpoint
from softprompt.training.run_log import CHECKPOINTS, METRICS, RunLog

_MEMBERS = "members"
_SETTINGS, _ENVIRONMENT = "config.yaml", "environment.json"
BASE_MODEL = "base_model"  # in the identity of a run, which must be the same to resume it


class RunFolder:
    """Reads and writes the files of a run. All but `metrics.jsonl` are renamed into place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.prompt = path / "prompt"
        self._metrics = path / METRICS
        self._checkpoints = path / CHECKPOINTS

    @contextmanager
    def lock(self, resume: bool) -> Iterator[None]:
        """Lock the folder, and delete temporary files of a command that was killed.

        Raises:
            InputError: another command is using the folder; or see `require`.
        """
        self.require(resume)  # before the lock file is written
        with lock_folder(self.path):
            self._require(resume)  # another command may have written a run since
            for folder in (self.path, self._checkpoints):
                clean_up(folder)
            yield

    def require(self, resume: bool) -> None:
        """Make sure that a run can begin here, or be resumed.

        Raises:
            InputError: another command is using the folder; or see `require_new` and `require_begun`.
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
        record = {**environment(), **identity, **({_MEMBERS: members} if members > 1 else {})}
        write_text(self.path / _ENVIRONMENT, json.dumps(record, indent=2) + "\n")
        if members == 1:
            write_text(self._metrics, "")
        write_text(self.path / _SETTINGS, to_yaml(config))  # written last: a folder with this file holds a run

    def require_new(self) -> None:
        """Make sure that nothing would be overwritten.

        Raises:
            InputError: the folder holds another run, or something else.
        """
        if (self.path / _SETTINGS).exists():
            raise InputError(f"{self.path} holds another run; give another folder, or --resume to go on with it")
        ours = {LOCK_FILE, _ENVIRONMENT, METRICS, _SETTINGS}  # of a command that was stopped before its run began
        if self.path.exists() and (not self.path.is_dir() or any(not _is(ours, p) for p in self.path.iterdir())):
            raise InputError(f"{self.path} exists and is not empty; give a new folder")

    def require_begun(self) -> None:
        """Make sure that there is a run to resume.

        Raises:
            InputError: there is none.
        """
        if not (self.path / _SETTINGS).exists():
            raise InputError(f"{self.path} holds no run to resume; leave --resume out to begin one")

    def resume(
        self, given: TuneConfig, identity: dict[str, str], model: FrozenModel, members: int = 1
    ) -> tuple[TuneConfig, Checkpoint | None]:
        """Return the settings of the run, and its newest checkpoint; None if there is none.

        Raises:
            InputError: there is no run, or it has other data, another model or other settings.
        """
        self.require_begun()
        config = self.settings()
        # Where time or epochs are limited, these may be lower than what was given.
        lowered = {"max_steps": config.epochs or config.max_minutes, "eval_rows": config.max_minutes}
        for name in given.model_fields_set:
            before, now = getattr(config, name), getattr(given, name)
            if lowered.get(name) and now and before and now >= before:
                continue
            if now not in (before, None, "auto"):
                raise SettingsError(f"the run was begun with {name} = {before!r}, not {now!r}; leave it out to resume")
        record = read_json_object(self.path / _ENVIRONMENT, "begin a new run in another folder")
        if members != (of := record.get(_MEMBERS, 1)):
            found = (
                f"an ensemble; resume it with --ensemble {of}" if of > 1 else "one run; resume it without --ensemble"
            )
            raise InputError(f"{self.path} holds {found}")
        self._require_model(record, model, bool(config.chat_template))
        for name, value in identity.items():
            if name != BASE_MODEL and record.get(name) != value:
                raise InputError(f"the {name.replace('_', ' ')} of {self.path} is another; resume with the same one")
        checkpoint = load_newest_checkpoint(self._checkpoints)
        self._cut_metrics(checkpoint.state.step if checkpoint else -1)
        return config, checkpoint

    def _require_model(self, record: dict[str, Any], model: FrozenModel, chat_template: bool) -> None:
        try:
            before: AnyFingerprint = TypeAdapter(AnyFingerprint).validate_json(record.get(BASE_MODEL, ""))
        except (ValidationError, TypeError) as error:
            raise StorageError(f"{self.path} does not say which model it was begun with; begin a new run") from error
        differs = difference(before, model, chat_template)
        if differs:
            raise InputError(
                f"the base model of {self.path} is another: {differs}; resume with the model that it was begun with"
            )

    def settings(self) -> TuneConfig:
        """Return the settings of the run.

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

    def open_log(self, step: int, tensorboard: bool) -> RunLog:
        """Open the log of a run that has done so many steps.

        Raises:
            InputError: TensorBoard is to be written, and is not installed.
        """
        return RunLog(self.path, step, tensorboard)

    def _cut_metrics(self, step: int) -> None:
        """Delete lines of later steps than the checkpoint's, and lines that are incomplete."""
        if not self._metrics.exists():  # an ensemble
            return
        lines = []
        for line in self._metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    lines.append(line + "\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        write_text(self._metrics, "".join(lines))

    def write_result(self, prompt: SoftPrompt | Ensemble, scores: Scores | None) -> None:
        """Write the best prompt, and its predictions on the validation rows, `predictions.jsonl`."""
        prompt.save(self.prompt)
        if scores is not None:
            write_records(self.path / "predictions.jsonl", scores.predictions())


def _is(names: set[str], file: Path) -> bool:
    """Tell whether a file has one of these names, or is a temporary file that was to be renamed to one."""
    return file.name in names or any(file.name.startswith(f".{name}{TEMPORARY_MARK}") for name in names)


def environment() -> dict[str, str]:
    """Return package versions, processor and GPU."""
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
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
