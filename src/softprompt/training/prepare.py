"""The plan of a run: every setting that was left open, chosen from the data and the model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from softprompt.config import TuneConfig, make_config
from softprompt.data.batching import indices_seen
from softprompt.data.chat import dated
from softprompt.data.encoder import Encoder, Example
from softprompt.data.lazy_examples import LazyExamples, LengthStats
from softprompt.data.rows import Rows
from softprompt.data.split import count_duplicates, sample, split_rows
from softprompt.data.templates import Format, default_template, make_format, require_unseen_answer
from softprompt.distributed.launch import count
from softprompt.errors import DataError, SettingsError
from softprompt.evaluation.scores import LabelScorer, Scorer, TextScorer, make_scorer
from softprompt.model.frozen import FrozenModel
from softprompt.model.load import resolve_threads
from softprompt.model.memory import MemoryEstimate, available_memory, measure, micro_batch_tokens, trim_allocator
from softprompt.model.prefix import is_prefix
from softprompt.prompt.initialization import MANY_LABELS, USUAL_TOKENS
from softprompt.prompt.start import Decide, first_prompt, source_prompt

# A label is one target token or a few; of plain text nearly every token is one, and half as many steps do.
STEPS = {"quick": 60, "normal": 200, "thorough": 600}
TEXT_STEPS = {budget: steps // 2 for budget, steps in STEPS.items()}
_LEARNING_RATE = 0.03
EVALUATIONS = 8


@dataclass(frozen=True)
class PreparedRun:
    """All that a run needs.

    Attributes:
        config: settings, every one of them decided.
        reasons: for each setting that was left open, why it got its value.
        encoder: rows to token ids; `truncated` counts the rows that are taken and the validation rows, once each.
        train, validation: the rows; validation is None where the last prompt is to be kept.
        examples: of the training rows.
        indices_seen: the training rows that the run's steps take, in ascending order.
        length_stats: of the examples that are taken.
        start: the prompt before the first step: `[P, H]`, or of a deep prefix `[L, 2, K, P, D]`.
        scorer: of the validation rows, as the best prompt is chosen by them.
        memory_estimate: what a step takes in memory.
    """

    config: TuneConfig
    reasons: dict[str, str]
    encoder: Encoder
    train: Rows
    validation: Rows | None
    examples: Sequence[Example]
    indices_seen: NDArray[np.int64]
    length_stats: LengthStats
    start: Tensor
    scorer: Scorer | None
    memory_estimate: MemoryEstimate

    def label_scorer(self, most: int | None = None) -> LabelScorer | None:
        """Return a scorer of all labels where the best prompt is chosen without it, or None; of `most` rows."""
        if not isinstance(self.scorer, TextScorer) or not self.encoder.format.verbalizers:
            return None
        rows = self.scorer.rows if most is None else sample(self.scorer.rows, most, self.config.seed)
        scorer = LabelScorer(copy(self.encoder), rows, self.scorer.at_once)
        scorer.processes = self.scorer.processes
        return scorer

    def step_bytes(self, part: Sequence[Example]) -> float:
        """Predict the memory that a step takes whose largest micro-batch this is."""
        shared_text_len = len(self.shared_text_ids)
        return self.memory_estimate.step(
            [max(len(e.ids) - shared_text_len - 1, 1) for e in part], sum(e.targets for e in part)
        )

    @property
    def shared_text_ids(self) -> tuple[int, ...]:
        """The ids that all examples begin with, as far as they are run."""
        return self.length_stats.shared_text_ids


def prepare_run(model: FrozenModel, data: Rows, config: TuneConfig, eval_data: Rows | None = None) -> PreparedRun:
    """Choose what the settings leave open, and turn rows into examples.

    Args:
        model: the frozen model.
        data: the training rows; some are held back for validation where `eval_data` is None.
        config: settings.
        eval_data: the validation rows.

    Raises:
        DataError, SettingsError: what the user gave does not fit together.
    """
    reasons: dict[str, str] = {}
    chosen = config.model_dump()

    def decide(name: str, value: object, reason: str) -> None:
        if chosen[name] is None or chosen[name] == "auto":
            chosen[name], reasons[name] = value, reason

    _require_place(model, config)
    train, validation = split_rows(data, eval_data, config.eval_rows, config.seed)
    train = sample(train, config.train_rows, config.seed)
    first = train[0]
    if data.task == "classification" and all(row["label"] == first["label"] for row in train):
        raise DataError(f"{data.name}: the training rows have one label only ({first['label']}); two are needed")
    source = source_prompt(model, config)
    labels = data.labels
    if source is not None and source.format.task == data.task and set(labels) <= set(source.record.verbalizers):
        labels = list(source.record.verbalizers) or labels
        for name in ("template", "chat_template", "chat_date", "verbalizers"):
            decide(name, getattr(source.record, name) or None, config.init)
    decide("chat_template", False, "default")
    texts = chosen["template"], chosen["verbalizers"], chosen["chat_template"]
    form = make_format(data.task, labels, *texts, default_template(data))
    form = dated(form, model.tokenizer, chosen["chat_date"])
    for rows_read in (train, *([] if validation is None else [validation])):
        require_unseen_answer(form, rows_read)
    _describe(form, decide)
    decide("loss", *_loss(config, form))
    decide("batch_size", 16 if form.task == "classification" else 8, f"default of {form.task}")
    if config.epochs is not None:
        passes = math.ceil(config.epochs * len(train) / chosen["batch_size"])
        if config.max_steps is None or passes < config.max_steps:
            chosen["max_steps"], reasons["max_steps"] = passes, f"{config.epochs:g} epochs"
    steps = STEPS if form.task == "classification" else TEXT_STEPS
    decide("max_steps", steps[config.budget], f"budget {config.budget}")
    decide("eval_every", math.ceil(chosen["max_steps"] / EVALUATIONS), f"{EVALUATIONS} evaluations a run")
    rows = indices_seen(len(train), chosen["batch_size"], chosen["max_steps"], config.seed)
    start = first_prompt(model, config, source, form, train.pick(rows), decide)
    decide("num_virtual_tokens", virtual := start.shape[-2], "length of the initial text, 20 at least")
    decide("learning_rate", *_learning_rate(config, virtual))
    encoder = Encoder(model.tokenizer, form, _max_length(model, config.max_length, virtual), model.vocabulary_size)
    # The steps encode with a copy: what they cut has been counted here.
    counted = LazyExamples(encoder, train, chosen["loss"] == "all", int(is_prefix(start)))
    examples = replace(counted, encoder=copy(encoder), candidate_ids=chosen["loss"] == "labels")
    length_stats = LengthStats.of(counted[i] for i in rows)
    memory_estimate = _memory_estimate(model, config, length_stats, virtual, decide)
    at_once = _at_once(model, memory_estimate, length_stats)
    decide("micro_batch_tokens", at_once, "free memory, at most what makes full use of the processor")
    _warn(model, train, validation if eval_data is not None else None, memory_estimate, length_stats)
    decide("threads", resolve_threads(None), "cores")
    device = str(model.device) if count() == 1 else model.device.type  # each process has its own
    decide("device", device, "fastest there is")
    decide("dtype", str(model.hf_model.dtype).removeprefix("torch."), f"default on {model.device.type}")
    scorer = _scorer(encoder, validation, chosen["micro_batch_tokens"]) if validation is not None else None
    final = make_config(TuneConfig, chosen)
    return PreparedRun(
        final, reasons, encoder, train, validation, examples, rows, length_stats, start, scorer, memory_estimate
    )


def _describe(form: Format, decide: Decide) -> None:
    """Decide what the settings leave open of how rows become text."""
    decide("template", form.template, f"default of {form.task}")
    if form.chat_date is not None:
        decide("chat_date", form.chat_date, "the chat template prints a date, the same on every day")
    if form.task == "classification":
        decide("verbalizers", dict(form.verbalizers), "labels stand for themselves")


def most_steps(prepared: PreparedRun, given: TuneConfig) -> int | None:
    """Return how many steps a run takes at most, whatever its time; None where steps were not asked for."""
    return prepared.config.max_steps if given.max_steps or given.epochs else None


def _scorer(encoder: Encoder, validation: Rows, at_once: int) -> Scorer:
    """Return the scorer that the best prompt is chosen by.

    The tokens of many labels would cost more than all steps: there the loss of the right one alone is found.
    """
    kind = TextScorer if len(encoder.format.verbalizers) > MANY_LABELS else make_scorer
    return kind(encoder, validation, at_once)


def _loss(config: TuneConfig, form: Format) -> tuple[str, str]:
    """Return what is learned where nobody says so, and why.

    Raises:
        SettingsError: labels are to be told apart where there are none.
    """
    if form.task != "classification":
        if config.loss == "labels":
            raise SettingsError(f"loss=labels is for classification, and {form.task} has none; leave it out")
        return "all" if form.task == "text" else "target", f"default of {form.task}"
    many = len(form.verbalizers) > MANY_LABELS and config.method == "prompt-tuning"
    return ("labels", "prompt-tuning of more than ten labels") if many else ("target", "default of classification")


def _learning_rate(config: TuneConfig, virtual: int) -> tuple[float, str]:
    """Return the usual rate, and why.

    Every number of a prompt changes by about the rate (Adam), so a long soft prompt as a whole by more than a short
    one: its rate is lower by the root of its length. Deep prefixes did not gain from that.
    """
    rate, why = _LEARNING_RATE, f"default of {config.method}"
    if config.method == "prompt-tuning" and virtual > USUAL_TOKENS:
        rate, why = rate * math.sqrt(USUAL_TOKENS / virtual), f"prompt-tuning of {virtual} virtual tokens"
    return float(f"{rate:.1g}"), why


def _require_place(model: FrozenModel, config: TuneConfig) -> None:
    """Make sure that settings say what is the case: the model is where it was loaded."""
    places = {"auto", model.device.type, str(model.device)}
    precision = str(model.hf_model.dtype).removeprefix("torch.")
    if config.device not in places or config.dtype not in ("auto", precision):
        raise SettingsError(
            f"device {config.device}, dtype {config.dtype}: the model is loaded on {model.device} in {precision}; "
            "give them to load_model"
        )


def _max_length(model: FrozenModel, wanted: int, virtual: int) -> int:
    """Return how long an example may be, so that it fits behind the virtual tokens."""
    positions = model.context_length
    if positions is None:
        return wanted
    if virtual + 2 > positions:
        raise SettingsError(f"{virtual} virtual tokens leave no room for text: the model has {positions} positions")
    return min(wanted, positions - virtual)


def _at_once(model: FrozenModel, memory_estimate: MemoryEstimate, length_stats: LengthStats) -> int:
    """Return how many text tokens of a step are run at once."""
    shared_text_len = len(length_stats.shared_text_ids)
    targets = length_stats.targets / (length_stats.tokens - length_stats.rows * shared_text_len)
    return micro_batch_tokens(
        model.device,
        memory_estimate,
        length_stats.shortest - shared_text_len,
        length_stats.longest - shared_text_len,
        targets,
    )


def _memory_estimate(
    model: FrozenModel, config: TuneConfig, length_stats: LengthStats, virtual: int, decide: Decide
) -> MemoryEstimate:
    """Return what a step takes in memory, and decide whether the layers run again in the backward pass."""
    activation_checkpointing, measured = (
        config.gradient_checkpointing,
        measure(model, virtual + len(length_stats.shared_text_ids)),
    )
    if activation_checkpointing and not model.backend.can_checkpoint:
        raise SettingsError(
            f"gradient_checkpointing: the layers of {type(model.hf_model).__name__} cannot run again on its way "
            f"({model.backend.name}); leave it out, and lower max_length if memory runs out"
        )
    if activation_checkpointing is None:
        fits = _alone(measured, length_stats) <= available_memory(model.device)
        activation_checkpointing = model.backend.can_checkpoint and not fits
        why = (
            "the longest row does not fit in memory otherwise"
            if activation_checkpointing
            else "the longest row fits in memory"
        )
        decide(
            "gradient_checkpointing",
            activation_checkpointing,
            why if fits or activation_checkpointing else f"not on the {model.backend.name} way",
        )
    if activation_checkpointing:
        trim_allocator()  # glibc would keep several times what is needed, in holes between what the layers keep
    return replace(measured, activation_checkpointing=activation_checkpointing)


def _alone(memory_estimate: MemoryEstimate, length_stats: LengthStats) -> float:
    """Return the bytes that the longest row takes."""
    longest = length_stats.longest - len(length_stats.shared_text_ids)
    return memory_estimate.step([longest], longest * length_stats.targets / length_stats.tokens)


def _warn(
    model: FrozenModel, train: Rows, given: Rows | None, memory_estimate: MemoryEstimate, length_stats: LengthStats
) -> None:
    """Say before the first step what will spoil the run's figures, or the run.

    Only `given` validation rows can ask what a training row asks: those that are held back do not.
    """
    seen = count_duplicates(train, given) if given is not None else 0
    if seen:
        warnings.warn(
            f"{seen} of {len(given or ())} validation rows ask what a training row asks too; on those a prompt "
            "looks better than it is. Give other rows as validation data",
            stacklevel=3,
        )
    row_bytes, free = _alone(memory_estimate, length_stats), available_memory(model.device)
    if row_bytes > free:
        warnings.warn(
            f"the longest row alone needs about {row_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: lower "
            "max_length if memory runs out",
            stacklevel=3,
        )
