"""`softprompt.json`: what a prompt is for and where it comes from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator

from softprompt.config import ChatDate
from softprompt.data.labels import clean_label
from softprompt.data.rows import Task
from softprompt.data.templates import DEFAULT_TEMPLATE, Format, make_format
from softprompt.errors import PromptError, SettingsError
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.base_model import BaseModelRecord, base_model_record
from softprompt.prompt.layout import RECORD, read_json

FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, 2)  # version 1 has another fingerprint


class FormatRecord(BaseModel):
    """How rows become tokens, and how labels are chosen: in `softprompt.json`, and in a comparison's `format.json`.

    Attributes:
        task, template, chat_template, verbalizers, max_length: how rows become tokens.
        chat_date: the day that the chat template prints, where it prints one; None in files of earlier versions.
        label_bias: nats that are added to labels' log-likelihoods when a label is chosen (prior matching).
    """

    model_config = ConfigDict(extra="ignore")

    task: Task = "text"
    template: str = DEFAULT_TEMPLATE["text"]
    chat_template: bool = False
    chat_date: ChatDate | None = None
    verbalizers: dict[str, str] = {}
    max_length: int = Field(512, ge=2)
    label_bias: dict[str, FiniteFloat] = {}

    @field_validator("verbalizers", "label_bias")
    @classmethod
    def _clean_labels(cls, by_label: dict[str, Any]) -> dict[str, Any]:
        """Write labels as they are read from rows; older prompts have them as they were in the file."""
        clean: dict[str, Any] = {}
        for label, value in by_label.items():
            clean.setdefault(clean_label(label), value)
        return clean

    @property
    def format(self) -> Format:
        """How rows become text."""
        return Format(self.task, self.template, self.verbalizers, self.chat_template, chat_date=self.chat_date)


class _Origin(BaseModel):
    format_version: int = FORMAT_VERSION
    base_model: BaseModelRecord


class Record(FormatRecord, _Origin):  # in the file, the fields of the last base come first
    """The content of `softprompt.json`.

    Attributes:
        base_model: the model that the prompt was trained on.
        training: the settings, and how many steps were done.
        data: hashes of the training and validation rows.
    """

    training: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    data: dict[str, str] = {}

    @field_validator("metrics", mode="before")
    @classmethod
    def _drop_null_metrics(cls, metrics: object) -> object:
        """Leave out metrics that are null: an infinite perplexity is written so."""
        if not isinstance(metrics, dict):
            return metrics
        return {name: value for name, value in metrics.items() if value is not None}

    @classmethod
    def of(cls, model: FrozenModel, form: Format, max_length: int, **more: Any) -> Record:
        """Return the record of a prompt that was made for a model and a format."""
        return cls(base_model=base_model_record(model), **format_fields(form, max_length), **more)


def format_fields(form: Format, max_length: int) -> dict[str, Any]:
    """Return what a `FormatRecord` says of a format."""
    return {
        "task": form.task,
        "template": form.template,
        "chat_template": form.chat_template,
        "chat_date": form.chat_date,
        "verbalizers": dict(form.verbalizers),
        "max_length": max_length,
    }


def read_record(path: Path, adapter: Mapping[str, Any]) -> Record:
    """Read a folder's record; a folder that PEFT wrote has none, and gets one from PEFT's configuration.

    Raises:
        PromptError: the record is damaged, or of a version that this softprompt does not read.
    """
    file = path / RECORD
    if not file.is_file():
        warnings.warn(
            f"{path} has no {RECORD}: which model it belongs to cannot be checked, and text is read without a "
            "template; softprompt prompts import adds both",
            stacklevel=4,
        )
        base = BaseModelRecord(id=adapter.get("base_model_name_or_path") or "", revision=adapter.get("revision"))
        return Record(base_model=base)
    loaded = read_json(file)
    version = loaded.get("format_version")
    if version not in _READABLE_VERSIONS or isinstance(version, bool):
        readable = " and ".join(map(str, _READABLE_VERSIONS))
        raise PromptError(f"{file} has format version {version}; this softprompt reads {readable}")
    try:
        record = Record(**loaded)
        make_format(record.task, list(record.verbalizers), record.template, record.verbalizers, record.chat_template)
    except ValidationError as error:
        raise PromptError(f"{file} is damaged: {error.errors()[0]['msg']}") from error
    except SettingsError as error:
        raise PromptError(f"{file} cannot be used: {error}") from error
    if record.task == "classification" and not record.verbalizers:
        raise PromptError(f"{file} is damaged: a classification prompt without verbalizers")
    unknown = [label for label in record.label_bias if label not in record.verbalizers]
    if unknown:
        raise PromptError(f"{file} is damaged: label_bias names {unknown[0]!r}, which is no label")
    return record
