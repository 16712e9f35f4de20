"""Resolves the settings that `TuneConfig` leaves None, each with its reason; fixed defaults are in config.py.

Pure functions of the settings that were given and of `Facts`: no model, no rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from softprompt.config import MANY_LABELS, MIN_VIRTUAL_TOKENS, TuneConfig, make_config
from softprompt.data.columns import Task
from softprompt.errors import SettingsError

PROMPT_TUNING_LEARNING_RATE = 0.03  # of 20 virtual tokens or fewer
PREFIX_TUNING_LEARNING_RATE = 0.03
CLASSIFICATION_BATCH_SIZE, BATCH_SIZE = 16, 8
# A step of plain text takes longer: nearly all of its tokens are targets, a label is one token or a few.
CLASSIFICATION_STEPS = {"quick": 60, "normal": 200, "thorough": 600}
STEPS = {"quick": 30, "normal": 100, "thorough": 300}
EVALUATIONS = 8  # of the validation rows, in a run
T = TypeVar("T")
# A value, and the reason for it; the reason is empty where the value was given.
Decision: TypeAlias = tuple[T, str]


@dataclass(frozen=True)
class Facts:
    """What settings are resolved from.

    Attributes:
        task: what the rows are for.
        num_train_rows: how many training rows there are.
        template, chat_template, chat_date, verbalizers: how rows become text.
        inherited_settings: format settings taken from the prompt that `init` names.
        start: value and reason of `init` and `init_text`, where they were unset.
        num_virtual_tokens: P, the length of the initial prompt.
        micro_batch_tokens: how many text tokens fit in memory.
        longest_row_fits: whether the longest row fits in memory without activation checkpointing.
        backend: the name of the backend.
        can_checkpoint: whether the backend can do activation checkpointing.
        threads: CPU threads.
        device, dtype: where the model is, and in which precision.
    """

    task: Task
    num_train_rows: int
    template: str
    num_virtual_tokens: int
    micro_batch_tokens: int
    threads: int
    device: str
    dtype: str
    chat_template: bool = False
    chat_date: str | None = None
    verbalizers: Mapping[str, str] = field(default_factory=dict)
    inherited_settings: frozenset[str] = frozenset()
    start: Mapping[str, Decision[str]] = field(default_factory=dict)
    longest_row_fits: bool = True
    backend: str = "packed"
    can_checkpoint: bool = True


@dataclass(frozen=True)
class Settings:
    """Settings that are all resolved.

    Attributes:
        config: the settings.
        reasons: for each setting that was unset, why it has its value.
    """

    config: TuneConfig
    reasons: dict[str, str]


def resolve_settings(config: TuneConfig, facts: Facts) -> Settings:
    """Resolve every setting that is unset.

    Args:
        config: the settings as given.
        facts: what is known of the data, the model and the machine.

    Raises:
        SettingsError: settings do not fit together.
    """
    steps = resolve_max_steps(config, facts.task, facts.num_train_rows)
    virtual, device_type = facts.num_virtual_tokens, facts.device.partition(":")[0]
    memory = "free memory, at most what makes full use of the processor"
    decisions: dict[str, Decision[Any]] = {
        **_resolve_format(config, facts),
        "loss": resolve_loss(config, facts.task, len(facts.verbalizers)),
        "batch_size": resolve_batch_size(config, facts.task),
        "max_steps": steps,
        "eval_every": _or_default(
            config.eval_every, math.ceil(steps[0] / EVALUATIONS), f"{EVALUATIONS} evaluations a run"
        ),
        **facts.start,
        "num_virtual_tokens": _or_default(
            config.num_virtual_tokens, virtual, f"length of the initial text, {MIN_VIRTUAL_TOKENS} at least"
        ),
        "learning_rate": resolve_learning_rate(config, virtual),
        "gradient_checkpointing": resolve_checkpointing(config, facts),
        "micro_batch_tokens": _or_default(config.micro_batch_tokens, facts.micro_batch_tokens, memory),
        "threads": _or_default(config.threads, facts.threads, "cores"),
        "device": _or_default(config.device, facts.device, "fastest there is"),
        "dtype": _or_default(config.dtype, facts.dtype, f"default on {device_type}"),
    }
    values = {name: value for name, (value, _) in decisions.items()}
    reasons = {name: reason for name, (_, reason) in decisions.items() if reason}
    return Settings(make_config(TuneConfig, {**config.model_dump(), **values}), reasons)


def resolve_loss(config: TuneConfig, task: Task, num_labels: int) -> Decision[str]:
    """Return which tokens are learned.

    Raises:
        SettingsError: loss=labels for a task without labels.
    """
    if task != "classification" and config.loss == "labels":
        raise SettingsError(f"loss=labels is for classification, and {task} has none; leave it out")
    if config.loss is not None:
        return config.loss, ""
    if task == "text":
        return "all", "default of text"
    if num_labels > MANY_LABELS and config.method == "prompt-tuning":
        return "labels", "prompt-tuning of more than ten labels"
    return "target", f"default of {task}"


def resolve_batch_size(config: TuneConfig, task: Task) -> Decision[int]:
    """Return how many examples a step takes."""
    default = CLASSIFICATION_BATCH_SIZE if task == "classification" else BATCH_SIZE
    return _or_default(config.batch_size, default, f"default of {task}")


def resolve_max_steps(config: TuneConfig, task: Task, num_train_rows: int) -> Decision[int]:
    """Return how many steps a run takes; of `max_steps` and `epochs`, the fewer count."""
    steps = CLASSIFICATION_STEPS if task == "classification" else STEPS
    if config.epochs is not None:
        batch_size, _ = resolve_batch_size(config, task)
        in_epochs = math.ceil(config.epochs * num_train_rows / batch_size)
        if config.max_steps is None or in_epochs < config.max_steps:
            return in_epochs, f"{config.epochs:g} epochs"
    return _or_default(config.max_steps, steps[config.budget], f"budget {config.budget}")


def resolve_learning_rate(config: TuneConfig, num_virtual_tokens: int) -> Decision[float]:
    """Return the learning rate.

    Adam changes every parameter by about the rate. A long soft prompt as a whole therefore moves further than a short
    one, and its rate is divided by the root of its length. Prefixes do not gain from that.
    """
    if config.learning_rate is not None:
        return config.learning_rate, ""
    if config.method == "prefix-tuning":
        return PREFIX_TUNING_LEARNING_RATE, f"default of {config.method}"
    if num_virtual_tokens <= MIN_VIRTUAL_TOKENS:
        return PROMPT_TUNING_LEARNING_RATE, f"default of {config.method}"
    rate = PROMPT_TUNING_LEARNING_RATE * math.sqrt(MIN_VIRTUAL_TOKENS / num_virtual_tokens)
    return float(f"{rate:.1g}"), f"{config.method} of {num_virtual_tokens} virtual tokens"


def resolve_checkpointing(config: TuneConfig, facts: Facts) -> Decision[bool]:
    """Return whether activation checkpointing is used: only where the longest row needs it.

    Raises:
        SettingsError: the backend cannot, and it was asked for.
    """
    if config.gradient_checkpointing and not facts.can_checkpoint:
        raise SettingsError(
            f"gradient_checkpointing: the {facts.backend} backend cannot run this model's layers again; leave it out, "
            "and lower max_length if memory runs out"
        )
    if facts.longest_row_fits:
        return _or_default(config.gradient_checkpointing, False, "the longest row fits in memory")
    if facts.can_checkpoint:
        return _or_default(config.gradient_checkpointing, True, "the longest row does not fit in memory otherwise")
    return _or_default(config.gradient_checkpointing, False, f"not supported by the {facts.backend} backend")


def _resolve_format(config: TuneConfig, facts: Facts) -> dict[str, Decision[Any]]:
    """Return how rows become text."""
    defaults: dict[str, Decision[Any]] = {
        "template": (facts.template, f"default of {facts.task}"),
        "chat_template": (facts.chat_template, "default"),
        "chat_date": (facts.chat_date, "the chat template prints a date, the same on every day"),
        "verbalizers": (dict(facts.verbalizers) or None, "labels stand for themselves"),
    }
    return {
        name: _or_default(getattr(config, name), value, config.init if name in facts.inherited_settings else reason)
        for name, (value, reason) in defaults.items()
    }


def _or_default(given: T | None, default: T, reason: str) -> Decision[T]:
    """Return what was given, or else the default and the reason for it."""
    if given is None or given == "auto":
        return default, reason if default is not None else ""
    return given, ""
