"""The interface of a method: it is fitted, scores rows, and is stored and loaded, all under one protocol."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import ValidationError

from softprompt.comparison.costs import Effort
from softprompt.comparison.protocol import Protocol
from softprompt.comparison.results import Point
from softprompt.config import Calibration
from softprompt.data.encoder import Encoder
from softprompt.data.rows import Rows, Task
from softprompt.data.templates import Format, require_template
from softprompt.errors import InputError
from softprompt.evaluation.calibration import make_scorer
from softprompt.evaluation.evaluate import ScoredRows
from softprompt.evaluation.scorer import scoring_micro_batch_tokens
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.ensemble import AnyPrompt
from softprompt.prompt.record import FormatRecord, format_fields
from softprompt.prompt.soft_prompt import BasePrompt
from softprompt.storage import read_json_object
from softprompt.training.callbacks import Callback

_FORMAT = "format.json"
_FIELDS = (
    "template",
    "verbalizers",
    "chat_template",
    "chat_date",
    "demonstrations",
    "calibration",
    "label_bias",
    "max_length",
)


class MethodCallback(Callback):
    """Told of a method's course, a search for demonstrations included; this one shows nothing."""

    def demonstrations(self, number: int, values: dict[str, float], spent: float) -> None:
        """A few-shot prompt scores best so far; `spent` is the used share of the budget."""


@dataclass
class Predictor:
    """How test rows are scored: by the base model, or one with other weights."""

    model: FrozenModel
    format: Format
    max_length: int
    prompt: AnyPrompt = field(default_factory=BasePrompt)
    calibration: Calibration = "none"

    def micro_batch_tokens(self, rows: Rows) -> int:
        """Predict how many text tokens of rows fit in memory together."""
        return scoring_micro_batch_tokens(self.model, rows, self.prompt, self.max_length)

    def score(self, rows: Rows, at_once: int) -> ScoredRows:
        """Score rows, and complete them where the task is completion, with `at_once` text tokens together."""
        encoder = Encoder(self.model.tokenizer, self.format, self.max_length, self.model.vocabulary_size)
        scorer = make_scorer(encoder, rows, at_once, self.calibration)
        return ScoredRows(self.model, encoder, scorer, self.prompt)

    def save(self, folder: Path) -> None:
        """Write `format.json`: how rows become tokens and how labels are chosen, without model and virtual tokens."""
        (member,) = self.prompt.members
        record = {
            **format_fields(self.format, self.max_length),
            "demonstrations": list(map(dict, self.format.demonstrations)),
            "calibration": self.calibration,
            "label_bias": dict(member.label_bias),
        }
        text = json.dumps({name: record[name] for name in _FIELDS}, ensure_ascii=False, indent=2)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _FORMAT).write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, model: FrozenModel, task: Task) -> Predictor:
        """Read what `save` wrote."""
        cure = "remove it and the method's result, and the method is run again"
        record = read_json_object(folder / _FORMAT, cure)
        try:
            # Files of early versions have no date.
            fields = {name: record[name] for name in _FIELDS if name != "chat_date" or name in record}
            own = FormatRecord(task=task, **fields)
            form = replace(own.format, demonstrations=tuple(record["demonstrations"]))
            require_template(form)
            return cls(model, form, own.max_length, BasePrompt(own.label_bias), record["calibration"])
        except (KeyError, TypeError, ValidationError) as error:
            raise InputError(f"{folder / _FORMAT} is damaged: {error}; {cure}") from error


@dataclass
class FitResult:
    """The result of fitting a method."""

    predictor: Predictor
    parameters: int  # that were trained
    effort: Effort
    tokens: int = 0  # of the text trained on; validation rows are not counted
    settings: dict[str, object] = field(default_factory=dict)
    curve: list[Point] = field(default_factory=list)


class Method(ABC):
    """One method with one seed; `close` frees its memory and restores the base model."""

    keeps = True  # its files, beside the results
    changes_weights = False  # rows are scored with other weights than the base model's

    def __init__(self, protocol: Protocol, seed: int, callback: MethodCallback) -> None:
        self.protocol, self.seed, self.callback = protocol, seed, callback
        self._stack = ExitStack()

    @abstractmethod
    def fit(self) -> FitResult:
        """Train, or search, within the budget."""

    @abstractmethod
    def store(self, folder: Path) -> None:
        """Write what the task needs besides the base model."""

    @abstractmethod
    def load(self, folder: Path) -> Predictor:
        """Read what was stored, as if another task had been served before."""

    def close(self) -> None:
        """Restore the base model."""
        self._stack.close()
