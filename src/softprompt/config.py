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
PROMPT = "prompt:"  # what an `init` that names another prompt begins with
Budget = Literal["quick", "normal", "thorough"]
Calibration = Literal["none", "contextual"]
Mode = Literal["choose", "write"]  # what a prompt of labels does: take one of them, or continue the text


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
        "none", description="split the model over several devices, by transformers' own rules"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; one a core")


class FormatConfig(ModelConfig):
    """How rows become text, for a model without a prompt; a prompt brings its own."""

    template: str | None = Field(None, description="Jinja template of a row's input, such as '{{ text }}\\nLabel:'")
    chat_template: bool | None = Field(None, description="put the input through the model's chat template; not done")
    chat_date: ChatDate | None = Field(
        None, description="the day that the chat template prints, where it prints one, such as 2024-07-26, which it is"
    )
    verbalizers: dict[str, str] | None = Field(None, description="label to the text that stands for it")
    max_length: int = Field(512, ge=2, description="the most real tokens of an example; longer inputs are cut")


class EvaluateConfig(FormatConfig):
    """How rows become text and are scored."""

    calibration: Calibration = Field(
        "none",
        description="contextual: of each label's log-likelihood, subtract the mean of those behind inputs without "
        "content, such as N/A",
    )


class TuneConfig(FormatConfig):
    """Settings of a run. Those that are None are chosen from the data and the model; `tune` prints what it chose."""

    method: Method = Field(
        "prompt-tuning",
        description="prompt-tuning: virtual tokens; prefix-tuning: their keys and values at every layer",
    )
    num_virtual_tokens: int | None = Field(
        None, ge=1, le=MAX_VIRTUAL_TOKENS, description="P; the length of the initial text or examples, 20 at least"
    )
    init: Annotated[str, AfterValidator(_known_init)] = Field(
        "auto",
        description="where the virtual tokens start: random, vocabulary, text, labels, examples, or prompt:NAME to go "
        "on from another prompt (a folder or a kept name); auto: examples, text where they are too long or a deep "
        "prefix learns labels or it is plain text, or labels where there are hundreds",
    )
    init_text: str | None = Field(None, description="the text that init=text starts from; written from the task")
    loss: Literal["target", "labels", "all"] | None = Field(
        None,
        description="what is learned: the target's tokens; labels: the same, half of it among the tokens that some "
        "label goes on with, of soft prompts of more than ten labels; all tokens, of plain text",
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=1e6,  # float32 would overflow at some point, with an error that says nothing
        description="peak of the schedule; 0.03, of a soft prompt of P > 20 tokens 0.03·√(20/P)",
    )
    warmup_ratio: float = Field(0.06, ge=0, le=1, description="share of the steps over which the rate rises")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="how the rate falls afterwards")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    max_grad_norm: float = Field(1.0, gt=0, description="longer gradients are scaled down to this norm")
    batch_size: int | None = Field(None, ge=1, description="examples a step; never changed to save memory")
    micro_batch_tokens: int | None = Field(None, ge=1, description="text tokens run at once; from the free memory")
    gradient_checkpointing: bool | None = Field(
        None,
        description="run each layer again in the backward pass, to keep less in memory; where the longest row needs it",
    )
    epochs: float | None = Field(None, gt=0, description="times that every row is seen; or max_steps, if sooner")
    max_steps: int | None = Field(None, ge=1, description="optimizer updates; from the budget")
    max_minutes: float | None = Field(
        None,
        gt=0,
        description="as many steps as fit in about so much time, instead of the budget's; or max_steps, if fewer",
    )
    eval_every: int | None = Field(None, ge=1, description="steps between evaluations; eight of them a run")
    save_every: int = Field(10, ge=1, description="steps between saved states")
    patience: int | None = Field(None, ge=1, description="stop after so many evaluations without a lower loss; never")
    train_rows: int | None = Field(None, ge=1, description="use at most so many training rows")
    eval_rows: int = Field(
        200,
        ge=0,
        description="most validation rows to choose the best prompt on; fewer if max_minutes is short; 0: the last one",
    )
    budget: Budget = Field(
        "normal", description="how long to train where no other setting says it; thorough also tries rates and starts"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the order of the rows, the split and random initializations")
    tensorboard: bool = Field(False, description="also log to RUN/tensorboard; needs softprompt[tensorboard]")

    @model_validator(mode="before")
    @classmethod
    def _by_todays_names(cls, values: Any) -> Any:
        return current_settings(values) if isinstance(values, Mapping) else values


class GenerateConfig(BaseModel):
    """Decoding rules, the same with a prompt and without."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_new_tokens: int | None = Field(None, ge=1, description="64, unless max_length says it")
    max_length: int | None = Field(None, ge=1, description="the most real tokens, the given text's included")
    repetition_penalty: float = Field(1.0, gt=0, description="above 1: tokens of the text so far become less likely")
    no_repeat_ngram_size: int = Field(0, ge=0, description="runs of so many tokens occur once; 0: off")
    stop: tuple[str, ...] = Field((), description="strings that end the text; they are cut off")
    num_beams: int = Field(1, ge=1, description="beam search with so many beams; 1: none")
    length_penalty: float = Field(1.0, description="of beam search: the higher, the longer")
    do_sample: bool = Field(False, description="draw tokens instead of taking the most probable")
    temperature: float = Field(1.0, gt=0, description="below 1: likelier tokens get likelier")
    top_k: int | None = Field(None, ge=1, description="draw among the k most probable")
    top_p: float = Field(1.0, gt=0, le=1, description="draw among the most probable that make up this share")
    seed: int = Field(0, ge=0, lt=2**63, description="of the draws")
    batch_size: int = Field(16, ge=1, description="texts continued at once; it changes nothing but speed and memory")

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, stop: object) -> object:
        return (stop,) if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _beams_are_not_drawn(self) -> GenerateConfig:
        if self.num_beams > 1 and self.do_sample:
            raise ValueError("beam search draws nothing; leave num_beams or do_sample out")
        if not all(self.stop):
            raise ValueError("a stop string must not be empty")
        return self


ConfigType = TypeVar("ConfigType", bound=BaseModel)


def read_settings(
    kind: type[ConfigType], file: Path | None = None, assignments: Sequence[str] = (), **given: Any
) -> tuple[ConfigType, dict[str, str]]:
    """Put settings together; the later of these wins: defaults, a YAML file, the command, `NAME=VALUE` assignments.

    Args:
        kind: which settings.
        file: a YAML file of settings.
        assignments: as given to `--set`.
        given: settings that the command itself was given, None where it was not.

    Returns:
        The settings, and for each that was set where it came from.

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
    """Check values and return them as settings."""
    values = current_settings(values)
    for name in values:
        if name not in kind.model_fields:
            known = kind.model_fields
            raise SettingsError(f"unknown setting {name!r}{nearest(name, known)}; known are {', '.join(known)}")
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")  # pydantic's word for what our own checks say
        if not first["loc"]:  # it is about several settings
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
    """Return labels and their texts as they are written, where YAML takes them for numbers."""
    if not isinstance(verbalizers, dict):
        return verbalizers
    if any(isinstance(text, bool) for text in chain(verbalizers, verbalizers.values())):
        raise SettingsError(f"{file}: verbalizers: YAML reads yes, no, on and off as truth values; put them in quotes")
    return {str(label): str(text) for label, text in verbalizers.items()}


def _parse(kind: type[BaseModel], name: str, text: str) -> Any:
    """Read a value given on the command line; texts are kept as they were typed, but for line breaks and tabs."""
    field = kind.model_fields.get(name)
    if name == "verbalizers" or (name == "stop" and text.startswith("[")):
        example = '{"1": "bad", "5": "good"}' if name == "verbalizers" else '["\\n", "END"]'
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise SettingsError(f"{name}: write JSON, as in {example}, not {text!r}") from error
    if field is None or field.annotation in (str, str | None, tuple[str, ...]):
        return text.replace("\\n", "\n").replace("\\t", "\t")  # a shell's quotes leave them as two characters
    nothing = text in ("", "none", "None", "null") and type(None) in get_args(field.annotation)
    return None if nothing else text  # pydantic reads numbers and truth values


def to_yaml(config: TuneConfig) -> str:
    """Return settings as the text of a `config.yaml`."""
    settings = config.model_dump()
    text: str = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(text) != settings:  # of a text with one of Unicode's own line breaks
        text = yaml.safe_dump(settings, sort_keys=False)
    return text
