"""Run settings: flat names, the same in YAML, `--set`, `TuneConfig` and a run's `config.yaml`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from softprompt.errors import SettingsError, nearest
from softprompt.old_names import current_settings

Init = Literal["auto", "random", "vocabulary", "text", "labels", "examples"]
Method = Literal["prompt-tuning", "prefix-tuning"]
MAX_VIRTUAL_TOKENS = 1000
MIN_VIRTUAL_TOKENS = 20  # of a prompt whose length is not given
MANY_LABELS = 10  # more than these are trained and initialized in another way
PROMPT = "prompt:"  # the start of an `init` that names a prompt
Budget = Literal["quick", "normal", "thorough"]
Calibration = Literal["none", "contextual"]
Mode = Literal["choose", "write"]  # a label prompt chooses a label, or continues the text


def _known_init(init: str) -> str:
    allowed = get_args(Init)
    if init not in allowed and not (init.startswith(PROMPT) and init != PROMPT):
        raise ValueError(f"unknown{nearest(init, allowed)}; allowed are {', '.join(allowed)} and {PROMPT}NAME")
    return init


def _known_day(day: str) -> str:
    try:
        return date.fromisoformat(day).isoformat()
    except ValueError as error:
        raise ValueError("not a day; write year, month and day, as in 2024-07-26") from error


ChatDate = Annotated[str, AfterValidator(_known_day)]


class ModelConfig(BaseModel):
    """Where the base model runs and in which precision."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the base model")
    device: str = Field("auto", description="cpu, cuda, cuda:1, mps")
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none", description="load the weights in fewer bits (4 on a GPU only); needs softprompt[quantization]"
    )
    device_map: Literal["none", "auto", "balanced", "sequential"] = Field(
        "none", description="split the model over several devices, as transformers does"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; default: one a core")


class FormatConfig(ModelConfig):
    """How rows become text, for a model without a prompt; a prompt brings its own."""

    template: str | None = Field(None, description="Jinja template of a row's input, such as '{{ text }}\\nLabel:'")
    chat_template: bool | None = Field(None, description="apply the model's chat template to the input; default: no")
    chat_date: ChatDate | None = Field(
        None, description="the date that the chat template prints, if it prints one; default: 2024-07-26"
    )
    verbalizers: dict[str, str] | None = Field(None, description="for each label the text that stands for it")
    max_length: int = Field(
        512, ge=2, description="the most tokens of an example, virtual tokens not counted; longer inputs are cut"
    )


class EvaluateConfig(FormatConfig):
    """How rows become text and are scored."""

    calibration: Calibration = Field(
        "none",
        description="contextual: subtract from each label's log-likelihood its mean for inputs without content, such "
        "as N/A",
    )


class TuneConfig(FormatConfig):
    """Settings of a run. Those that are None are resolved from the data and the model; `tune` prints their values."""

    method: Method = Field(
        "prompt-tuning",
        description="prompt-tuning: learn input embeddings; prefix-tuning: learn keys and values at every layer",
    )
    num_virtual_tokens: int | None = Field(
        None,
        ge=1,
        le=MAX_VIRTUAL_TOKENS,
        description="P; default: the length of the initial text or examples, at least 20",
    )
    init: Annotated[str, AfterValidator(_known_init)] = Field(
        "auto",
        description="initial value: random, vocabulary, text, labels, examples, or prompt:NAME for another prompt (a "
        "folder or a registered name). auto: examples; text if they are too long, for plain text, and for "
        "classification with prefix-tuning; labels if there are hundreds of them",
    )
    init_text: str | None = Field(None, description="the text of init=text; default: a description of the task")
    loss: Literal["target", "labels", "all"] | None = Field(
        None,
        description="target: the target's tokens; labels: the same, but half of the loss is restricted to tokens that "
        "can continue some label (default of prompt-tuning with more than ten labels); all: all tokens",
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=1e6,  # more would overflow float32, with an unclear error
        description="peak of the schedule; default: 0.03, for prompt-tuning with P > 20 tokens 0.03·√(20/P)",
    )
    warmup_ratio: float = Field(0.06, ge=0, le=1, description="share of the steps in which the learning rate rises")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how the learning rate falls afterwards"
    )
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients with a larger norm are scaled down to it")
    batch_size: int | None = Field(None, ge=1, description="examples in a step; never reduced to save memory")
    micro_batch_tokens: int | None = Field(
        None, ge=1, description="text tokens run at once; default: what fits in memory"
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="run each layer again in the backward pass to save memory; default: if the longest row needs it",
    )
    epochs: float | None = Field(
        None, gt=0, description="times that every row is seen; max_steps if that is fewer steps"
    )
    max_steps: int | None = Field(None, ge=1, description="optimizer updates; default: from the budget")
    max_minutes: float | None = Field(
        None,
        gt=0,
        description="training time; as many steps as fit, or max_steps if that is fewer",
    )
    eval_every: int | None = Field(
        None, ge=1, description="steps between evaluations; default: eight evaluations a run"
    )
    save_every: int = Field(10, ge=1, description="steps between checkpoints")
    patience: int | None = Field(
        None, ge=1, description="stop after this many evaluations without a lower loss; default: never"
    )
    train_rows: int | None = Field(None, ge=1, description="the most training rows")
    eval_rows: int = Field(
        200,
        ge=0,
        description="the most validation rows; fewer if max_minutes is short; 0: keep the last prompt, not the best",
    )
    budget: Budget = Field(
        "normal",
        description="number of steps, if no other setting gives it; thorough also searches learning rates and init",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the order of the rows, the split and the initialization")
    tensorboard: bool = Field(False, description="also log to RUN/tensorboard; needs softprompt[tensorboard]")

    @model_validator(mode="before")
    @classmethod
    def _translate_old_names(cls, values: Any) -> Any:
        return current_settings(values) if isinstance(values, Mapping) else values


class GenerateConfig(BaseModel):
    """Decoding settings, the same with a prompt and without."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_new_tokens: int | None = Field(None, ge=1, description="default: 64, or what max_length leaves")
    max_length: int | None = Field(
        None, ge=1, description="the most tokens, input included, virtual tokens not counted"
    )
    repetition_penalty: float = Field(1.0, gt=0, description="above 1: tokens of the text so far become less likely")
    no_repeat_ngram_size: int = Field(0, ge=0, description="no n-gram of this length occurs twice; 0: off")
    stop: tuple[str, ...] = Field((), description="strings that end the text; they are left out of it")
    num_beams: int = Field(1, ge=1, description="number of beams; 1: no beam search")
    length_penalty: float = Field(1.0, description="of beam search; higher values prefer longer texts")
    do_sample: bool = Field(False, description="sample tokens instead of taking the most probable")
    temperature: float = Field(1.0, gt=0, description="below 1: probable tokens become more probable")
    top_k: int | None = Field(None, ge=1, description="sample from the k most probable tokens")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the most probable tokens that have this probability together"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of sampling")
    batch_size: int = Field(16, ge=1, description="texts continued at once; affects only speed and memory")

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, stop: object) -> object:
        return (stop,) if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _require_no_sampling_with_beams(self) -> GenerateConfig:
        if self.num_beams > 1 and self.do_sample:
            raise ValueError("beam search does not sample; leave num_beams or do_sample out")
        if not all(self.stop):
            raise ValueError("a stop string must not be empty")
        return self


ConfigType = TypeVar("ConfigType", bound=BaseModel)


def read_settings(
    kind: type[ConfigType], file: Path | None = None, assignments: Sequence[str] = (), **given: Any
) -> tuple[ConfigType, dict[str, str]]:
    """Merge settings; later ones override earlier ones: defaults, a YAML file, the command, `NAME=VALUE` assignments.

    Args:
        kind: which settings.
        file: a YAML file of settings.
        assignments: as given to `--set`.
        given: settings given as options of the command; None for those not given.

    Returns:
        The settings, and for each that was set its origin.

    Raises:
        SettingsError: an unknown name (with the nearest one), or a value that is not allowed.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key, value in _read_file(file).items():
        name = str(key)
        values[name], origins[name] = _as_texts(value, file) if name == "verbalizers" else value, str(file)
    for name, value in given.items():
        if value is not None:
            values[name], origins[name] = value, "command"
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise SettingsError(f"--set {assignment}: write NAME=VALUE, as in --set learning_rate=0.01")
        values[name.strip()], origins[name.strip()] = _parse(kind, name.strip(), text), "--set"
    return make_config(kind, values), origins


def make_config(kind: type[ConfigType], values: Mapping[str, Any]) -> ConfigType:
    """Validate values and return them as settings."""
    values = current_settings(values)
    for name in values:
        if name not in kind.model_fields:
            known = kind.model_fields
            raise SettingsError(f"unknown setting {name!r}{nearest(name, known)}; known are {', '.join(known)}")
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")  # added by pydantic to the messages of our validators
        if not first["loc"]:  # of a model validator: about several settings
            raise SettingsError(reason) from error
        name = ".".join(str(part) for part in first["loc"])
        raise SettingsError(f"setting {name} = {first['input']}: {reason}") from error


def _read_file(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SettingsError(f"no such settings file: {file}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the settings file {file}: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"{file} is not YAML: {error}") from error
    if not isinstance(loaded, dict | None):
        raise SettingsError(f"{file} must hold NAME: VALUE lines")
    return loaded or {}


def _as_texts(verbalizers: Any, file: Path | None) -> Any:
    """Return labels and their texts as strings, also those that YAML reads as numbers."""
    if not isinstance(verbalizers, dict):
        return verbalizers
    if any(isinstance(text, bool) for text in chain(verbalizers, verbalizers.values())):
        raise SettingsError(f"{file}: verbalizers: YAML reads yes, no, on and off as truth values; put them in quotes")
    return {str(label): str(text) for label, text in verbalizers.items()}


def _parse(kind: type[BaseModel], name: str, text: str) -> Any:
    """Parse a value from the command line; in texts, only escaped line breaks and tabs are replaced."""
    field = kind.model_fields.get(name)
    if name == "verbalizers" or (name == "stop" and text.startswith("[")):
        example = '{"1": "bad", "5": "good"}' if name == "verbalizers" else '["\\n", "END"]'
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise SettingsError(f"{name}: write JSON, as in {example}, not {text!r}") from error
    if field is None or field.annotation in (str, str | None, tuple[str, ...]):
        return text.replace("\\n", "\n").replace("\\t", "\t")  # shells pass them as two characters
    nothing = text in ("", "none", "None", "null") and type(None) in get_args(field.annotation)
    return None if nothing else text  # pydantic parses numbers and booleans


def to_yaml(config: TuneConfig) -> str:
    """Return settings as the text of a `config.yaml`."""
    settings = config.model_dump()
    text: str = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(text) != settings:  # a text contains one of Unicode's line breaks
        text = yaml.safe_dump(settings, sort_keys=False)
    return text
