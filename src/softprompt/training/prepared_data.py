"""What several runs on the same rows share, computed once: split, format, encoder, start, lengths, memory, scorer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

from softprompt.config import MANY_LABELS, PROMPT, TuneConfig
from softprompt.data.batching import indices_seen
from softprompt.data.chat import dated
from softprompt.data.encoder import Encoder
from softprompt.data.lazy_examples import LengthStats
from softprompt.data.rows import Rows
from softprompt.data.split import count_duplicates, sample, split_rows
from softprompt.data.templates import Format, default_template, make_format, require_unseen_answer
from softprompt.distributed.collective import Processes
from softprompt.errors import DataError
from softprompt.evaluation.calibration import make_scorer
from softprompt.evaluation.scorer import Scorer
from softprompt.evaluation.token_scorer import TokenScorer
from softprompt.model.frozen import FrozenModel
from softprompt.model.memory import MemoryEstimate, measure
from softprompt.prompt.initialization import Start, initialize, load_source
from softprompt.training.objectives import Objective

_CACHED = 16  # results of each kind
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Split:
    """Training and validation rows; there are no validation rows where the last prompt is the result."""

    train: Rows
    validation: Rows | None


@dataclass(frozen=True, eq=False)
class ResolvedFormat:
    """How rows become text, and which of its settings are taken from the prompt that `init` names."""

    format: Format
    inherited_settings: frozenset[str]


class PreparedData:
    """Rows and a model; what runs on them need is computed at the first request and cached.

    Args:
        model: the frozen model.
        data: the rows that were given.
        eval_data: the validation rows that were given, if any.
        processes: the processes that take part.
    """

    def __init__(self, model: FrozenModel, data: Rows, eval_data: Rows | None, processes: Processes) -> None:
        self.model, self.data, self.eval_data, self.processes = model, data, eval_data, processes
        self._splits: list[Split] = []
        self._warned: set[str] = set()
        self._split = _cached(self._make_split)
        self._format = _cached(self._make_format)
        self._start = _cached(self._make_start)
        self._source = _cached(lambda init: load_source(model, init))
        self._lengths = _cached(self._measure_lengths)
        self._duplicates = _cached(lambda split: count_duplicates(split.train, split.validation))
        self.encoder = _cached(self._make_encoder)
        self.scorer = _cached(self._make_scorer)
        self._memory = _cached(lambda prefix_length, _trainable: measure(model, prefix_length))

    def split(self, config: TuneConfig) -> Split:
        """Return the rows to learn from, and those to choose the best prompt by.

        Raises:
            DataError: there are too few rows, or too few labels.
        """
        return self._split(config.eval_rows, config.train_rows, config.seed)

    def format(self, config: TuneConfig, split: Split) -> ResolvedFormat:
        """Return how rows become text.

        Raises:
            SettingsError: the template shows the answer, or does not fit the rows.
        """
        verbalizers = None if config.verbalizers is None else tuple(config.verbalizers.items())
        given = config.template, config.chat_template, config.chat_date, verbalizers
        return self._format(split, *given, config.init if config.init.startswith(PROMPT) else "")

    def start(self, config: TuneConfig, split: Split, form: ResolvedFormat, rows_seen: int) -> Start:
        """Return the prompt before the first step of a run that takes so many training rows.

        Raises:
            SettingsError: settings do not fit together.
        """
        names = ("method", "init", "init_text", "num_virtual_tokens", "seed")
        return self._start(split, form, rows_seen, tuple((name, getattr(config, name)) for name in names))

    def lengths(
        self,
        split: Split,
        form: ResolvedFormat,
        max_length: int,
        objective: Objective,
        first: int,
        rows_seen: int,
        seed: int,
    ) -> tuple[LengthStats, int]:
        """Return the lengths of the examples of so many training rows, and how many of these rows are cut."""
        seed = seed if rows_seen < len(split.train) else 0  # the order of all rows does not matter
        objective = replace(objective, candidates=False)  # which changes no length
        return self._lengths(split, form, max_length, objective, first, rows_seen, seed)

    def memory(self, prefix_length: int) -> MemoryEstimate:
        """Return the memory that a step takes after a prefix of this length."""
        # The adapters of LoRA, which a comparison puts into the model, keep more for the backward pass.
        trainable = sum(p.numel() for p in self.model.hf_model.parameters() if p.requires_grad)
        return self._memory(prefix_length, trainable)

    def warn_of_duplicates(self, split: Split) -> None:
        """Warn of validation rows that are training rows too; rows that were held out share no input with those."""
        if self.eval_data is not None and split.validation is not None and (count := self._duplicates(split)):
            self.warn_once(
                "duplicates",
                f"{count} of {len(split.validation)} validation rows have the same input as a training row; on those a "
                "prompt looks better than it is. Give other rows as validation data",
            )

    def warn_once(self, kind: str, message: str) -> None:
        """Warn, unless there was a warning of this kind before."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=4)

    def _make_split(self, eval_rows: int, train_rows: int | None, seed: int) -> Split:
        data = self.data
        train, validation = split_rows(data, self.eval_data, eval_rows, seed)
        train = sample(train, train_rows, seed)
        first = train[0]
        if data.task == "classification" and all(row["label"] == first["label"] for row in train):
            raise DataError(f"{data.name}: the training rows have one label only ({first['label']}); two are needed")
        for known in self._splits:  # where all rows are used, another seed changes nothing
            if known.train is train and known.validation is validation:
                return known
        self._splits.append(Split(train, validation))
        return self._splits[-1]

    def _make_format(
        self,
        split: Split,
        template: str | None,
        chat_template: bool | None,
        chat_date: str | None,
        verbalizers: tuple[tuple[str, str], ...] | None,
        init: str,
    ) -> ResolvedFormat:
        data, source, labels = self.data, self._source(init), self.data.labels
        chosen: dict[str, Any] = {"template": template, "chat_template": chat_template, "chat_date": chat_date}
        chosen["verbalizers"] = None if verbalizers is None else dict(verbalizers)
        inherited_settings: list[str] = []
        if source is not None and source.format.task == data.task and set(labels) <= set(source.record.verbalizers):
            labels = list(source.record.verbalizers) or labels
            inherited_settings = [name for name in chosen if chosen[name] is None and getattr(source.record, name)]
            chosen |= {name: getattr(source.record, name) for name in inherited_settings}
        texts = chosen["template"], chosen["verbalizers"], bool(chosen["chat_template"])
        form = make_format(data.task, labels, *texts, default_template(data))
        form = dated(form, self.model.tokenizer, chosen["chat_date"])
        for rows in (split.train, split.validation):
            if rows is not None:
                require_unseen_answer(form, rows)
        return ResolvedFormat(form, frozenset(inherited_settings))

    def _make_encoder(self, form: ResolvedFormat, max_length: int) -> Encoder:
        return Encoder(self.model.tokenizer, form.format, max_length, self.model.vocabulary_size)

    def _make_start(
        self, split: Split, form: ResolvedFormat, rows_seen: int, settings: tuple[tuple[str, Any], ...]
    ) -> Start:
        config = TuneConfig(**dict(settings))
        rows = split.train.pick(indices_seen(len(split.train), rows_seen, 1, config.seed))
        return initialize(self.model, config, self._source(config.init), form.format, rows)

    def _measure_lengths(
        self,
        split: Split,
        form: ResolvedFormat,
        max_length: int,
        objective: Objective,
        first: int,
        rows_seen: int,
        seed: int,
    ) -> tuple[LengthStats, int]:
        encoder = copy(self.encoder(form, max_length))
        examples = objective.examples(encoder, split.train, first)
        length_stats = LengthStats.of(examples[i] for i in indices_seen(len(split.train), rows_seen, 1, seed))
        return length_stats, encoder.truncated

    def _make_scorer(self, split: Split, form: ResolvedFormat, max_length: int) -> tuple[Scorer, int]:
        """Return the scorer of the validation rows, and how many of these rows are cut.

        The tokens of many labels would cost more than all steps: there the loss of the right label alone is computed.
        """
        assert split.validation is not None
        encoder = copy(self.encoder(form, max_length))
        kind = TokenScorer if len(form.format.verbalizers) > MANY_LABELS else make_scorer
        return kind(encoder, split.validation), encoder.truncated


def _cached(compute: Callable[..., T]) -> Callable[..., T]:
    """Return a function that keeps its last results."""
    return lru_cache(maxsize=_CACHED)(compute)
