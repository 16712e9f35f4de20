"""What all methods of a comparison share: base model, rows, settings and budget; and its record in the folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from softprompt.comparison.report.page import MARKDOWN, PAGE, PICTURE
from softprompt.config import PROMPT, TuneConfig
from softprompt.data.encoder import Encoder
from softprompt.data.rows import Rows
from softprompt.data.split import count_duplicates, sample, split_rows
from softprompt.data.templates import make_format
from softprompt.distributed.launch import world_size
from softprompt.errors import DataError, InputError, SettingsError
from softprompt.model.fingerprint import AnyFingerprint, difference, fingerprint
from softprompt.model.frozen import FrozenModel
from softprompt.old_names import current_settings
from softprompt.storage import LOCK_FILE, TEMPORARY_MARK, read_json_object, write_records, write_text
from softprompt.training.prepare import PreparedRun, prepare_data, prepare_run
from softprompt.training.prepared_data import PreparedData
from softprompt.training.throughput import Throughput, measure_throughput
from softprompt.training.trainer import Trainer

Equal = Literal["time", "examples"]
MINUTES = {"quick": 1.0, "normal": 5.0, "thorough": 15.0}
RESULTS, TASKS, ROWS, PROTOCOL = "results", "tasks", "test-rows.jsonl", "protocol.json"
_DAMAGED = "give another folder, or remove this one: its results cannot be matched to these rows"


@dataclass(frozen=True)
class Protocol:
    """What all methods have in common.

    Attributes:
        train, validation, test: rows to learn from, to choose by, and to score.
        config: settings; those that are unset are resolved as `tune` resolves them. `max_minutes` is set.
        equal: whether all methods get the same wall time, `max_minutes`, or see the same number of examples.
        search: whether a part of the budget goes into a search for the learning rate.
        measure_throughput: times a few steps and an evaluation of a trainer.
    """

    model: FrozenModel
    train: Rows
    validation: Rows
    test: Rows
    config: TuneConfig
    equal: Equal = "time"
    search: bool = True
    measure_throughput: Callable[[Trainer, float], Throughput] = measure_throughput

    @property
    def seconds(self) -> float:
        """The budget in wall time."""
        assert self.config.max_minutes
        return 60 * self.config.max_minutes

    @cached_property
    def _data(self) -> PreparedData:
        return prepare_data(self.model, self.train, self.config, self.validation)

    def prepare(self, **settings: object) -> PreparedRun:
        """Prepare a method's run: the same rows, template and batches for all."""
        config = self.config.model_copy(update={"max_minutes": None, **settings})
        return prepare_run(self._data, config)

    def record(self) -> dict[str, Any]:
        """Return what `protocol.json` holds."""
        parts = {"training": self.train, "validation": self.validation, "test": self.test}
        return {
            "rows": {name: rows.sha256 for name, rows in parts.items()},
            "base_model": fingerprint(self.model).model_dump(),
            "precision": str(self.model.hf_model.dtype),
            "settings": self.config.model_dump(exclude=self._excluded),
            "equal": self.equal,
            "search": self.search,
        }

    @property
    def _excluded(self) -> set[str]:
        """The settings that another setting stands for: `max_minutes` is the budget, unless examples are counted."""
        return {"budget"} if self.equal == "time" else set()


def make_protocol(
    model: FrozenModel,
    data: Rows,
    eval_data: Rows | None,
    test_data: Rows | None,
    config: TuneConfig,
    equal: Equal,
    search: bool,
) -> Protocol:
    """Split the rows, once for all methods and seeds."""
    if world_size() > 1:
        raise SettingsError("a comparison runs in one process; start it without torchrun")
    if config.init.startswith(PROMPT):
        raise SettingsError("init: an earlier prompt may have seen the test rows; leave it out")
    if config.eval_rows == 0:
        raise SettingsError("a comparison needs validation rows to choose by; leave eval_rows=0 out")
    if test_data is None:
        data, test_data = _split(data, None, len(data), config.seed, "--test-data")
    train, validation = _split(data, eval_data, config.eval_rows, config.seed, "--eval-data")
    if test_data.task != train.task:
        raise InputError(f"{test_data.name} is for {test_data.task}, {train.name} for {train.task}")
    unknown = set(test_data.labels) - set(train.labels) if train.task == "classification" else None
    if unknown:
        raise InputError(f"{test_data.name} has the label {min(unknown)!r}, which no training row has")
    duplicates = max(count_duplicates(rows, test_data) for rows in (data, eval_data) if rows is not None)
    if duplicates:
        warnings.warn(
            f"{duplicates} of {len(test_data)} test rows have the input of a training or validation row; their scores "
            "are too good for every method",
            stacklevel=3,
        )
    train = sample(train, config.train_rows, config.seed)
    if train.task == "text":
        train, validation, test_data = (_drop_single_tokens(model, config, r) for r in (train, validation, test_data))
    minutes = config.max_minutes or MINUTES[config.budget]
    settings = {"max_minutes": minutes, "eval_rows": len(validation), "train_rows": None}
    return Protocol(model, train, validation, test_data, config.model_copy(update=settings), equal, search)


def _split(data: Rows, other: Rows | None, most: int, seed: int, option: str) -> tuple[Rows, Rows]:
    """Return two parts of the rows, or the rows and the other rows that were given."""
    try:
        rest, part = split_rows(data, other, most, seed)
    except DataError as error:
        if other is not None:
            raise
        raise DataError(f"{data.name}: its {len(data)} rows are too few to split; give {option}") from error
    assert part is not None
    return rest, part


def _drop_single_tokens(model: FrozenModel, config: TuneConfig, texts: Rows) -> Rows:
    """Leave out texts of one token: without virtual tokens nothing predicts a first token."""
    form = make_format("text", [], config.template, None, bool(config.chat_template))
    encoder = Encoder(model.tokenizer, form, config.max_length, model.vocabulary_size)
    examples = (encoder.example(text, texts.where(i)) for i, text in enumerate(texts))
    longer = [i for i, example in enumerate(examples) if example.predicted.targets]
    if not longer:
        raise DataError(f"{texts.name}: no text has a second token, so there is nothing to predict")
    if len(longer) == len(texts):
        return texts
    left_out = len(texts) - len(longer)
    warnings.warn(f"{texts.name}: {left_out} of {len(texts)} texts have a single token and are left out", stacklevel=4)
    return texts.pick(longer)


def require_comparison(folder: Path) -> None:
    """Make sure that a folder is free for a comparison, or holds one."""
    # Files of a command that stopped before any result.
    ours = {ROWS, PROTOCOL, LOCK_FILE, f".{ROWS}.tmp", f".{PROTOCOL}.tmp"}
    if (folder / PROTOCOL).exists():
        if any((folder / RESULTS).glob("*.json")):
            return
        ours |= {RESULTS, TASKS, PAGE, MARKDOWN, PICTURE}
    if folder.exists() and (
        not folder.is_dir() or any(p.name not in ours and TEMPORARY_MARK not in p.name for p in folder.iterdir())
    ):
        raise InputError(f"{folder} exists and holds no comparison; give a new folder")


def write_protocol(folder: Path, protocol: Protocol) -> None:
    """Write what is compared, or make sure that the folder's earlier results are of the same protocol."""
    record, file = protocol.record(), folder / PROTOCOL
    if file.exists() and any((folder / RESULTS).glob("*.json")):
        _require_same(folder, record, protocol)
        return
    # Errors of the template, and test rows that cannot be read, are reported before anything is written.
    encoder = protocol.prepare().encoder
    protocol.test.require_inputs(encoder.format.columns)
    encoder.examples(protocol.test)
    write_records(folder / ROWS, protocol.test)
    write_text(file, json.dumps(record, indent=1) + "\n")


def _require_same(folder: Path, record: dict[str, Any], protocol: Protocol) -> None:
    file = folder / PROTOCOL
    before = read_json_object(file, _DAMAGED)
    if not isinstance(before.get("settings"), dict):
        raise InputError(f"{file} is damaged: it holds no settings; {_DAMAGED}")
    # What an older version did not write had its default value.
    defaults = TuneConfig().model_dump(exclude=protocol._excluded)
    before = {**record, **before, "settings": {**defaults, **current_settings(before["settings"], quiet=True)}}
    for name, value in record.items():
        if name == "base_model":
            _require_same_model(folder, before[name], protocol)
        elif before[name] != json.loads(json.dumps(value)):
            raise InputError(
                f"{folder} holds a comparison with other {name.replace('_', ' ')}; give another folder, or the same "
                "rows, model and settings to go on with it"
            )


def _require_same_model(folder: Path, recorded: object, protocol: Protocol) -> None:
    try:
        before: AnyFingerprint = TypeAdapter(AnyFingerprint).validate_python(recorded)
    except ValidationError as error:
        raise InputError(f"{folder / PROTOCOL} does not say which model was compared; give another folder") from error
    differs = difference(before, protocol.model, bool(protocol.config.chat_template))
    if differs:
        raise InputError(
            f"{folder} holds a comparison with another base model: {differs}; give another folder, or the same "
            "model to go on with it"
        )
