"""What every method does: it learns, answers rows, and is stored and loaded again, under one protocol."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from softprompt.comparison.costs import Effort
from softprompt.comparison.results import Point
from softprompt.config import Calibration, TuneConfig
from softprompt.data.encoder import Encoder
from softprompt.data.rows import Rows, Task
from softprompt.data.templates import Format, require_template
from softprompt.errors import InputError
from softprompt.evaluation.calibration import calibrated_or_plain
from softprompt.evaluation.evaluate import ScoredRows
from softprompt.evaluation.scores import tokens_at_once
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.ensemble import AnyPrompt
from softprompt.prompt.soft_prompt import BasePrompt
from softprompt.storage import read_json_object
from softprompt.training.callbacks import Callback
from softprompt.training.prepare import PreparedRun, prepare_data, prepare_run
from softprompt.training.prepared_data import PreparedData

Equal = Literal["time", "examples"]
_FORMAT = "format.json"


@dataclass(frozen=True)
class Protocol:
    """What all methods have in common.

    Attributes:
        model: the base model.
        train, validation, test: rows to learn from, to choose by, and to be scored on.
        config: settings; what they leave open is chosen as `tune` chooses it. `max_minutes` is set.
        equal: whether all get the same wall time, `max_minutes`, or see the same number of examples.
        search: whether a part of the budget goes into finding the learning rate.
    """

    model: FrozenModel
    train: Rows
    validation: Rows
    test: Rows
    config: TuneConfig
    equal: Equal = "time"
    search: bool = True

    @property
    def seconds(self) -> float:
        """The budget in wall time."""
        assert self.config.max_minutes
        return 60 * self.config.max_minutes

    @cached_property
    def _data(self) -> PreparedData:
        """What all methods learn from."""
        return prepare_data(self.model, self.train, self.config, self.validation)

    def prepared(self, **settings: object) -> PreparedRun:
        """Make the plan of a method: the same rows, template and batches for all."""
        config = self.config.model_copy(update={"max_minutes": None, **settings})
        return prepare_run(self._data, config)


@dataclass
class Predictor:
    """How test rows are answered.

    Attributes:
        model: what they are run through.
        format, max_length: how they become tokens.
        prompt: what is before them; for the base model, what its labels are biased by.
        calibration: of labels.
    """

    model: FrozenModel
    format: Format
    max_length: int
    prompt: AnyPrompt = field(default_factory=BasePrompt)
    calibration: Calibration = "none"

    def at_once(self, rows: Rows) -> int:
        """Predict how many text tokens of rows can be run together."""
        return tokens_at_once(self.model, rows, self.prompt, self.max_length)

    def side(self, rows: Rows, at_once: int) -> ScoredRows:
        """Answer rows, so many text tokens together."""
        encoder = Encoder(self.model.tokenizer, self.format, self.max_length, self.model.vocabulary_size)
        scorer = calibrated_or_plain(encoder, rows, at_once, self.calibration)
        return ScoredRows(self.model, encoder, scorer, self.prompt)

    def save(self, folder: Path) -> None:
        """Write all but model and prompts as `format.json`: how rows become tokens, and labels are chosen."""
        form = self.format
        (label_bias,) = (member.label_bias for member in self.prompt.members)
        record = {
            "template": form.template,
            "verbalizers": dict(form.verbalizers),
            "chat_template": form.chat_template,
            "chat_date": form.chat_date,
            "demonstrations": [dict(row) for row in form.demonstrations],
            "calibration": self.calibration,
            "label_bias": dict(label_bias),
            "max_length": self.max_length,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _FORMAT).write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, model: FrozenModel, task: Task) -> Predictor:
        """Read what `save` wrote.

        Raises:
            InputError: the file is damaged.
            SettingsError: its template is none, or shows the answer.
        """
        cure = "remove it and the method's result, and the method is run again"
        record = read_json_object(folder / _FORMAT, cure)
        try:
            form = Format(
                task,
                record["template"],
                record["verbalizers"],
                record["chat_template"],
                demonstrations=tuple(record["demonstrations"]),
                chat_date=record.get("chat_date"),  # which earlier versions did not keep
            )
            require_template(form)
            return cls(model, form, record["max_length"], BasePrompt(record["label_bias"]), record["calibration"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder / _FORMAT} is damaged: {error}; {cure}") from error


@dataclass
class FitResult:
    """What learning gave.

    Attributes:
        answers: how rows are answered with it.
        parameters: how many numbers were learned.
        effort: what it took.
        tokens: text tokens that were run to learn; validation rows not counted.
        settings: what was in force.
        curve: the validation figures on the way.
    """

    answers: Predictor
    parameters: int
    effort: Effort
    tokens: int = 0
    settings: dict[str, object] = field(default_factory=dict)
    curve: list[Point] = field(default_factory=list)


class Method(ABC):
    """One method with one seed; `close` gives back what it took and leaves the base model as it was.

    Attributes:
        keeps: whether what it stores is kept with the results; a whole model is not.
        changes_weights: whether rows are answered with other weights than the base model's.
    """

    keeps = True
    changes_weights = False

    def __init__(self, protocol: Protocol, seed: int, callback: Callback) -> None:
        self.protocol, self.seed, self.callback = protocol, seed, callback
        self._stack = ExitStack()

    @abstractmethod
    def learn(self) -> FitResult:
        """Learn, or search, within the budget."""

    @abstractmethod
    def store(self, folder: Path) -> None:
        """Write what the task needs besides the base model."""

    @abstractmethod
    def load(self, folder: Path) -> Predictor:
        """Read what was stored, as if another task had been served before."""

    def close(self) -> None:
        """Leave the base model as it was."""
        self._stack.close()
