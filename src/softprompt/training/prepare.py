"""The settings and the first prompt of one run, with its rows, examples, scorer and memory estimate.

`prepare_data` is called once for all runs on the same rows: the pilot that is timed, the candidates of a search, the
run itself, all methods of a comparison. `prepare_run` computes for each what no run before it has computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from softprompt.config import TuneConfig
from softprompt.data.batching import indices_seen
from softprompt.data.encoder import Encoder
from softprompt.data.example import Example
from softprompt.data.lazy_examples import LengthStats
from softprompt.data.rows import Rows
from softprompt.data.split import sample
from softprompt.distributed.collective import ALONE, Processes
from softprompt.errors import SettingsError
from softprompt.evaluation.label_scorer import LabelScorer
from softprompt.evaluation.scorer import Scorer
from softprompt.evaluation.token_scorer import TokenScorer
from softprompt.model.free_memory import trim_allocator
from softprompt.model.frozen import FrozenModel
from softprompt.model.load import resolve_threads
from softprompt.model.memory import MemoryEstimate, micro_batch_tokens
from softprompt.model.prefix import is_prefix
from softprompt.prompt.initialization import Start
from softprompt.training.objectives import OBJECTIVES, Objective
from softprompt.training.prepared_data import PreparedData, ResolvedFormat, Split
from softprompt.training.settings import (
    Facts,
    resolve_batch_size,
    resolve_checkpointing,
    resolve_loss,
    resolve_max_steps,
    resolve_settings,
)


@dataclass(frozen=True)
class PreparedRun:
    """All that a run needs.

    Attributes:
        config: settings, all resolved.
        reasons: for each setting that was unset, why it has its value.
        encoder: rows to token ids; `truncated` counts the rows in `indices_seen` and the validation rows, once each.
        train, validation: the rows; validation is None where the last prompt is the result.
        objective: what is learned of the examples.
        examples: of the training rows.
        indices_seen: the training rows of the run's steps, in ascending order.
        length_stats: of their examples.
        start: the prompt before the first step: `[P, H]`, or of a prefix `[L, 2, K, P, D]`.
        scorer: of the validation rows, to choose the best prompt by.
        memory_estimate: the memory that a step takes.
    """

    config: TuneConfig
    reasons: dict[str, str]
    encoder: Encoder
    train: Rows
    validation: Rows | None
    objective: Objective
    examples: Sequence[Example]
    indices_seen: NDArray[np.int64]
    length_stats: LengthStats
    start: Tensor
    scorer: Scorer | None
    memory_estimate: MemoryEstimate

    def label_scorer(self, max_rows: int | None = None) -> LabelScorer | None:
        """Return a scorer of all labels of the validation rows, where `scorer` scores the right ones alone; else None.

        Args:
            max_rows: the most rows; None for all.
        """
        if not isinstance(self.scorer, TokenScorer) or not self.encoder.format.verbalizers:
            return None
        rows = sample(self.scorer.rows, max_rows, self.config.seed)
        scorer = LabelScorer(copy(self.encoder), rows, self.scorer.micro_batch_tokens)
        scorer.processes = self.scorer.processes
        return scorer

    def step_bytes(self, micro_batch: Sequence[Example]) -> float:
        """Predict the memory of a step whose largest micro-batch is given."""
        shared_text_len = len(self.shared_text_ids)
        return self.memory_estimate.step(
            [max(len(e.ids) - shared_text_len - 1, 1) for e in micro_batch], sum(e.targets for e in micro_batch)
        )

    @property
    def shared_text_ids(self) -> tuple[int, ...]:
        """The ids that all examples begin with, up to their first targets."""
        return self.length_stats.shared_text_ids

    def share_among(
        self, processes: Processes, config: TuneConfig, start: Tensor, memory_estimate: MemoryEstimate
    ) -> PreparedRun:
        """Return the run as several processes share it, with the settings and the start of the first of them."""
        scorer = None if self.scorer is None else _resized(self.scorer, config.micro_batch_tokens, processes)
        return replace(self, config=config, start=start, memory_estimate=memory_estimate, scorer=scorer)


def prepare_data(
    model: FrozenModel,
    data: Rows,
    config: TuneConfig,
    eval_data: Rows | None = None,
    processes: Processes = ALONE,
) -> PreparedData:
    """Make rows ready for one run or several.

    Args:
        model: the frozen model.
        data: the training rows; some are held out for validation where `eval_data` is None.
        config: settings of the first run.
        eval_data: the validation rows.
        processes: the processes that take part.

    Raises:
        DataError, SettingsError: what the user gave does not fit together.
    """
    _require_device(model, config)
    prepared = PreparedData(model, data, eval_data, processes)
    prepared.split(config)
    return prepared


def prepare_run(data: PreparedData, config: TuneConfig) -> PreparedRun:
    """Resolve the unset settings, and make a run ready.

    Args:
        data: rows and model.
        config: settings.

    Raises:
        DataError, SettingsError: what the user gave does not fit together.
    """
    model, task = data.model, data.data.task
    _require_device(model, config)
    split = data.split(config)
    form = data.format(config, split)
    objective = OBJECTIVES[resolve_loss(config, task, len(form.format.verbalizers))[0]]
    steps, batch_size = resolve_max_steps(config, task, len(split.train))[0], resolve_batch_size(config, task)[0]
    rows_seen = min(steps * batch_size, len(split.train))
    start = data.start(config, split, form, rows_seen)
    virtual, first = start.num_virtual_tokens, int(is_prefix(start.weights))
    max_length = _max_length(model, config.max_length, virtual)
    length_stats, truncated = data.lengths(split, form, max_length, objective, first, rows_seen, config.seed)
    memory_estimate = data.memory(virtual + len(length_stats.shared_text_ids))
    facts = _facts(data, split, form, start, memory_estimate, length_stats)
    if resolve_checkpointing(config, facts)[0]:
        trim_allocator()  # glibc would keep several times what is needed, in holes between what the layers keep
        memory_estimate = replace(memory_estimate, activation_checkpointing=True)
    fitting = _micro_batch_tokens(model, memory_estimate, length_stats)
    settings = resolve_settings(config, replace(facts, micro_batch_tokens=fitting))
    _warn(data, split, memory_estimate, length_stats)
    scorer: Scorer | None = None
    if split.validation is not None:
        scorer, cut = data.scorer(split, form, max_length)
        scorer, truncated = _resized(scorer, settings.config.micro_batch_tokens, ALONE), truncated + cut
    encoder = copy(data.encoder(form, max_length))
    encoder.truncated = truncated
    return PreparedRun(
        config=settings.config,
        reasons=settings.reasons,
        encoder=encoder,
        train=split.train,
        validation=split.validation,
        objective=objective,
        examples=objective.examples(copy(encoder), split.train, first),
        indices_seen=indices_seen(len(split.train), rows_seen, 1, config.seed),
        length_stats=length_stats,
        start=start.weights,
        scorer=scorer,
        memory_estimate=memory_estimate,
    )


def _facts(
    data: PreparedData,
    split: Split,
    form: ResolvedFormat,
    start: Start,
    memory_estimate: MemoryEstimate,
    length_stats: LengthStats,
) -> Facts:
    """Return what settings are resolved from; how many tokens fit in memory is found later."""
    model = data.model
    return Facts(
        task=data.data.task,
        num_train_rows=len(split.train),
        template=form.format.template,
        chat_template=form.format.chat_template,
        chat_date=form.format.chat_date,
        verbalizers=form.format.verbalizers,
        inherited_settings=form.inherited_settings,
        start=start.resolved,
        num_virtual_tokens=start.num_virtual_tokens,
        micro_batch_tokens=0,
        longest_row_fits=_longest_row_bytes(memory_estimate, length_stats) <= model.free_memory(),
        backend=model.backend.name,
        can_checkpoint=model.backend.can_checkpoint,
        threads=resolve_threads(None),
        device=str(model.device) if data.processes.count == 1 else model.device.type,  # each process has its own
        dtype=str(model.hf_model.dtype).removeprefix("torch."),
    )


def _resized(scorer: Scorer, at_once: int | None, processes: Processes) -> Scorer:
    """Return a scorer of the same rows, for so many text tokens at once and for some processes."""
    assert at_once
    resized = copy(scorer)
    resized.micro_batch_tokens, resized.processes = at_once, processes
    return resized


def most_steps(prepared: PreparedRun, given: TuneConfig) -> int | None:
    """Return how many steps a run takes at most, whatever its time; None where steps were not asked for."""
    return prepared.config.max_steps if given.max_steps or given.epochs else None


def _require_device(model: FrozenModel, config: TuneConfig) -> None:
    """Make sure that the settings name the device and the precision that the model has."""
    devices = {"auto", model.device.type, str(model.device)}
    precision = str(model.hf_model.dtype).removeprefix("torch.")
    if config.device not in devices or config.dtype not in ("auto", precision):
        raise SettingsError(
            f"device {config.device}, dtype {config.dtype}: the model is loaded on {model.device} in {precision}; "
            "give them to load_model"
        )


def _max_length(model: FrozenModel, wanted: int, virtual: int) -> int:
    """Return how long an example may be to fit after the virtual tokens."""
    positions = model.context_length
    if positions is None:
        return wanted
    if virtual + 2 > positions:
        raise SettingsError(f"{virtual} virtual tokens leave no room for text: the model has {positions} positions")
    return min(wanted, positions - virtual)


def _micro_batch_tokens(model: FrozenModel, memory_estimate: MemoryEstimate, length_stats: LengthStats) -> int:
    """Return how many text tokens of a step fit in memory."""
    shared_text_len = len(length_stats.shared_text_ids)
    targets = length_stats.targets / (length_stats.tokens - length_stats.rows * shared_text_len)
    shortest, longest = length_stats.shortest - shared_text_len, length_stats.longest - shared_text_len
    return micro_batch_tokens(model, memory_estimate, shortest, longest, targets)


def _longest_row_bytes(memory_estimate: MemoryEstimate, length_stats: LengthStats) -> float:
    """Return the memory that a step of the longest row alone takes."""
    longest = length_stats.longest - len(length_stats.shared_text_ids)
    return memory_estimate.step([longest], longest * length_stats.targets / length_stats.tokens)


def _warn(data: PreparedData, split: Split, memory_estimate: MemoryEstimate, length_stats: LengthStats) -> None:
    """Warn, before the first step, of what spoils the run's metrics, or the run."""
    data.warn_of_duplicates(split)
    row_bytes, free = _longest_row_bytes(memory_estimate, length_stats), data.model.free_memory()
    if row_bytes > free:
        data.warn_once(
            "memory",
            f"the longest row alone needs about {row_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: lower "
            "max_length if memory runs out",
        )
