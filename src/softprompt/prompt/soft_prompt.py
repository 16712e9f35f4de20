"""The soft prompt and its folder, which PEFT reads as it is."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jinja2 import Environment, PackageLoader
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from softprompt.config import ChatDate, FormatConfig, Method
from softprompt.data.chat import dated
from softprompt.data.labels import clean_label
from softprompt.data.rows import Task
from softprompt.data.templates import DEFAULT_TEMPLATE, Format, make_format
from softprompt.errors import PromptError, SettingsError
from softprompt.model.fingerprint import difference
from softprompt.model.frozen import FrozenModel
from softprompt.model.prefix import is_prefix
from softprompt.prompt.base_model import BaseModelRecord, base_model_record
from softprompt.prompt.registry import ADAPTER, ENSEMBLE, find
from softprompt.storage import strict_json, write_folder

WEIGHTS, RECORD, CARD = "adapter_model.safetensors", "softprompt.json", "README.md"
FORMAT_VERSION = 2
_READ_VERSIONS = (1, 2)  # version 1 has another fingerprint
_KEY = "prompt_embeddings"
_MOST_TOKENS = 10_000
_DTYPES = ("F32", "F16", "BF16")
# These are saved as plain virtual tokens; P-tuning's encoder is gone by then (Liu et al. 2021).
_SHALLOW = ("PROMPT_TUNING", "P_TUNING")
# A cartridge is a deep prefix that was started from a text's keys and values (Eyuboglu et al. 2025).
_DEEP = ("PREFIX_TUNING", "CARTRIDGE")


class Record(BaseModel):
    """What `softprompt.json` says of a prompt.

    Attributes:
        format_version: of the folder.
        base_model: the model it was trained on.
        task, template, chat_template, verbalizers, max_length: how rows become tokens.
        chat_date: the day that the chat template prints, where it prints one; None in prompts of earlier versions.
        label_bias: nats that are added to labels' log-likelihoods where one of them is chosen (prior matching).
        training: settings and how far it went.
        metrics: on the validation rows, with the prompt.
        data: hashes of the training and validation rows.
    """

    model_config = ConfigDict(extra="ignore")

    format_version: int = FORMAT_VERSION
    base_model: BaseModelRecord
    task: Task = "text"
    template: str = DEFAULT_TEMPLATE["text"]
    chat_template: bool = False
    chat_date: ChatDate | None = None
    verbalizers: dict[str, str] = {}
    max_length: int = Field(512, ge=2)
    label_bias: dict[str, FiniteFloat] = {}
    training: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    data: dict[str, str] = {}

    @field_validator("verbalizers", "label_bias")
    @classmethod
    def _as_rows_have_them(cls, by_label: dict[str, Any]) -> dict[str, Any]:
        """Write labels as they are read from rows; older prompts have them as they were in the file."""
        clean: dict[str, Any] = {}
        for label, value in by_label.items():
            clean.setdefault(clean_label(label), value)
        return clean

    @field_validator("metrics", mode="before")
    @classmethod
    def _without_those_beyond_numbers(cls, metrics: object) -> object:
        """Leave out what is written as null: a perplexity beyond all numbers."""
        kept = isinstance(metrics, dict)
        return {name: value for name, value in metrics.items() if value is not None} if kept else metrics  # type: ignore[attr-defined]

    @classmethod
    def of(cls, model: FrozenModel, form: Format, max_length: int, **more: Any) -> Record:
        """Return what is said of a prompt that was made for a model and a format."""
        return cls(
            base_model=base_model_record(model),
            task=form.task,
            template=form.template,
            chat_template=form.chat_template,
            chat_date=form.chat_date,
            verbalizers=dict(form.verbalizers),
            max_length=max_length,
            **more,
        )


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """A learned prompt.

    Attributes:
        weights: float32, on the CPU: the embeddings of a soft prompt, `[P, H]`, or the keys and values of a deep
            prefix, `[L, 2, K, P, D]`.
        record: what it is for and where it comes from.
    """

    weights: Tensor
    record: Record

    @property
    def format(self) -> Format:
        """How rows become text for this prompt."""
        record = self.record
        return Format(
            record.task, record.template, record.verbalizers, record.chat_template, chat_date=record.chat_date
        )

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        return int(self.weights.shape[-2])

    @property
    def members(self) -> tuple[SoftPrompt]:
        """The prompt itself; an ensemble has several members."""
        return (self,)

    @property
    def label_bias(self) -> Mapping[str, float]:
        """Nats that are added to labels' log-likelihoods."""
        return self.record.label_bias

    @property
    def method(self) -> Method:
        """Which kind it is."""
        return "prefix-tuning" if is_prefix(self.weights) else "prompt-tuning"

    def save(self, folder: str | Path) -> Path:
        """Write the folder: PEFT's two files, `softprompt.json` and a model card.

        Raises:
            PromptError: the folder exists and holds something else than a prompt.
            StorageError: it cannot be written.
        """
        path = Path(folder)
        if path.exists() and not (path.is_dir() and _replaceable(path)):
            raise PromptError(f"{path} exists and is not a prompt; give a new folder")
        with write_folder(path) as aside:
            save_file({_KEY: self._peft_tensor()}, aside / WEIGHTS)
            (aside / ADAPTER).write_text(_json(self._adapter_config()), encoding="utf-8")
            (aside / RECORD).write_text(_json(self.record.model_dump()), encoding="utf-8")
            (aside / CARD).write_text(self._card(), encoding="utf-8")
        return path

    def _adapter_config(self) -> dict[str, Any]:
        """Return what PEFT needs to load the prompt, by the names of `PromptTuningConfig` and `PrefixTuningConfig`."""
        base = self.record.base_model
        common = {
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base.path or base.id,
            "revision": base.revision,
            "inference_mode": True,
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_transformer_submodules": 1,
        }
        if self.method == "prefix-tuning":
            layers, _, heads, _, size = self.weights.shape
            return {
                "peft_type": "PREFIX_TUNING",
                **common,
                "token_dim": heads * size,
                "num_attention_heads": heads,
                "num_layers": layers,
                "encoder_hidden_size": heads * size,
                "prefix_projection": False,
            }
        return {
            "peft_type": "PROMPT_TUNING",
            **common,
            "token_dim": int(self.weights.shape[1]),
            "num_attention_heads": base.attention_heads,
            "num_layers": base.layers,
            "prompt_tuning_init": "RANDOM",
        }

    def _peft_tensor(self) -> Tensor:
        """Return the weights as PEFT keeps them: `[P, H]`, or `[P, L·2·K·D]`."""
        flat = self.weights.permute(3, 0, 1, 2, 4).flatten(1) if self.method == "prefix-tuning" else self.weights
        return flat.float().contiguous()

    def _card(self) -> str:
        card = Environment(loader=PackageLoader("softprompt.prompt", "."), trim_blocks=True).get_template("card.md")
        return card.render(prompt=self, record=self.record)


@dataclass(frozen=True, eq=False)
class BasePrompt:
    """No virtual tokens: the base model, with a label bias or without.

    Attributes:
        label_bias: nats that are added to labels' log-likelihoods.
    """

    label_bias: Mapping[str, float] = field(default_factory=dict)
    weights: ClassVar[None] = None
    num_virtual_tokens: ClassVar[int] = 0

    @property
    def members(self) -> tuple[BasePrompt]:
        """The base model itself."""
        return (self,)


def _replaceable(folder: Path) -> bool:
    """Tell whether a folder is empty, or holds a prompt and nothing else; other adapters have files of these names."""
    names = {file.name for file in folder.iterdir()}
    if RECORD not in names and ADAPTER in names:
        try:
            return names <= {WEIGHTS, ADAPTER, CARD} and _kind(folder) in (*_SHALLOW, *_DEEP)
        except PromptError:
            return False
    return not names or (RECORD in names and names <= {WEIGHTS, ADAPTER, RECORD, CARD})


def _kind(folder: Path) -> object:
    """Return PEFT's name for the kind of adapter that a folder holds."""
    return read_json(folder / ADAPTER).get("peft_type")


def _json(value: Any) -> str:
    return json.dumps(strict_json(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def describe_prompt(prompt: SoftPrompt, model: FrozenModel, task: Task, config: FormatConfig) -> SoftPrompt:
    """Say what a prompt is for and which model it belongs to, where its folder came from PEFT and does not.

    Raises:
        PromptError: it does not fit the model.
        SettingsError: the template or the verbalizers do not fit the task.
    """
    require_fit(prompt, model)
    verbalizers = config.verbalizers or {}
    if task == "classification" and len(verbalizers) < 2:
        raise SettingsError('classification needs the labels: --set verbalizers=\'{"LABEL": "text", …}\'')
    form = make_format(task, list(verbalizers), config.template, verbalizers, bool(config.chat_template))
    form = dated(form, model.tokenizer, config.chat_date)
    return SoftPrompt(prompt.weights, Record.of(model, form, config.max_length))


def load_soft_prompt(prompt: str | Path) -> SoftPrompt:
    """Read a prompt's folder; one that PEFT wrote for prompt tuning, P-tuning, prefix tuning or a cartridge will do.

    Args:
        prompt: a folder, or `NAME` or `NAME@VERSION` of a prompt that `softprompt prompts add` keeps.

    Raises:
        PromptError: no such prompt, a missing file, a pickle, a wrong shape, or values that are not finite.
    """
    return read_soft_prompt(find(prompt))


def read_soft_prompt(path: Path) -> SoftPrompt:
    """Read a prompt's folder, see `load_soft_prompt`."""
    for name in (ADAPTER, WEIGHTS):
        if not (path / name).is_file():
            pickles = [p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
            if (path / ENSEMBLE).is_file():
                raise PromptError(f"{path} is an ensemble; give one of its members, such as {path / 'member-1'}")
            hint = f"; {pickles[0]} is a pickle, which can run code and is never read" if pickles else ""
            inside = sorted(p for p in path.iterdir() if any((p / file).is_file() for file in (ADAPTER, ENSEMBLE)))
            if inside:  # of a run, or as PEFT saves an adapter that has a name
                hint = f"; did you mean {' or '.join(map(str, inside[:3]))}?"
            raise PromptError(f"{path} is not a prompt: {name} is missing{hint}")
    adapter = read_json(path / ADAPTER)
    kind, parts = adapter.get("peft_type"), adapter.get("num_transformer_submodules")
    if kind not in (*_SHALLOW, *_DEEP):
        raise PromptError(f"{path} holds a {kind} adapter; softprompt reads {', '.join((*_SHALLOW, *_DEEP))}")
    if parts not in (None, 1):
        raise PromptError(f"{path} is for an encoder-decoder model (num_transformer_submodules {parts}); retrain it")
    weights = _read_weights(path / WEIGHTS)
    return SoftPrompt(_unflattened(path, weights, adapter) if kind in _DEEP else weights, _read_record(path, adapter))


def _unflattened(path: Path, weights: Tensor, adapter: dict[str, Any]) -> Tensor:
    """Return the keys and values `[L, 2, K, P, D]` that PEFT keeps as `[P, L·2·K·D]`."""
    given = [adapter.get(name) for name in ("num_layers", "num_attention_heads", "token_dim")]
    layers, heads, width = (count if isinstance(count, int) and count > 0 else 0 for count in given)
    if not heads or width % heads or weights.shape[1] != 2 * layers * width:
        raise PromptError(
            f"{path}: {weights.shape[1]} numbers a virtual token do not make {given[0]} layers of keys and values with "
            f"{given[1]} heads, {given[2]} numbers together; {ADAPTER} is damaged"
        )
    unflattened: Tensor = weights.unflatten(1, (layers, 2, heads, width // heads)).permute(1, 2, 3, 0, 4).contiguous()
    return unflattened


def read_json(path: Path) -> dict[str, Any]:
    """Read one of a folder's files.

    Raises:
        PromptError: it cannot be read, or holds no object.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PromptError(f"cannot read {path}: {error}; save or export the prompt again") from error
    if not isinstance(loaded, dict):
        raise PromptError(f"{path} must hold a JSON object; save or export the prompt again")
    return loaded


def _read_weights(path: Path) -> Tensor:
    """Read the one tensor, after its shape was checked in the file's header."""
    try:
        with safe_open(path, framework="pt") as file:
            if list(file.keys()) != [_KEY]:
                raise PromptError(f"{path} must hold one tensor {_KEY!r}, it holds {', '.join(file.keys())}")
            shape, dtype = file.get_slice(_KEY).get_shape(), file.get_slice(_KEY).get_dtype()
            if dtype not in _DTYPES:
                raise PromptError(f"{path}: {_KEY} is of type {dtype}; allowed are {', '.join(_DTYPES)}")
            if len(shape) != 2 or not 1 <= shape[0] <= _MOST_TOKENS:
                raise PromptError(f"{path}: {_KEY} has the shape {shape}; it must be [virtual tokens, width]")
            weights: Tensor = file.get_tensor(_KEY).float()
    except (SafetensorError, OSError) as error:
        raise PromptError(f"cannot read {path}: {error}") from error
    if not bool(torch.isfinite(weights).all()):
        raise PromptError(
            f"{path} holds values that are not finite; train the prompt again, with a lower learning_rate"
        )
    return weights


def _read_record(path: Path, adapter: dict[str, Any]) -> Record:
    if not (path / RECORD).is_file():
        warnings.warn(
            f"{path} has no {RECORD}: which model it belongs to cannot be checked, and its text is taken as it is; "
            "softprompt prompts import adds it",
            stacklevel=3,
        )
        base = BaseModelRecord(id=adapter.get("base_model_name_or_path") or "", revision=adapter.get("revision"))
        return Record(base_model=base)
    loaded = read_json(path / RECORD)
    version = loaded.get("format_version")
    if version not in _READ_VERSIONS or isinstance(version, bool):
        raise PromptError(
            f"{path / RECORD} has format version {version}; this softprompt reads "
            f"{' and '.join(map(str, _READ_VERSIONS))}"
        )
    try:
        record = Record(**loaded)
        make_format(record.task, list(record.verbalizers), record.template, record.verbalizers, record.chat_template)
    except ValidationError as error:
        raise PromptError(f"{path / RECORD} is damaged: {error.errors()[0]['msg']}") from error
    except SettingsError as error:
        raise PromptError(f"{path / RECORD} cannot be used: {error}") from error
    if record.task == "classification" and not record.verbalizers:
        raise PromptError(f"{path / RECORD} is damaged: a classification prompt without verbalizers")
    unknown = [label for label in record.label_bias if label not in record.verbalizers]
    if unknown:
        raise PromptError(f"{path / RECORD} is damaged: label_bias names {unknown[0]!r}, which is no label")
    return record


def require_fit(prompt: SoftPrompt, model: FrozenModel) -> None:
    """Make sure that a prompt belongs to a model.

    Raises:
        PromptError: it was trained on another.
    """
    base = prompt.record.base_model
    if prompt.method == "prefix-tuning":
        layers, _, heads, _, size = prompt.weights.shape
        if (layers, heads, size) != model.prefix_shape:
            raise PromptError(
                f"the deep prefix is for {layers} layers with {heads} keys of {size} numbers, {model.source} has "
                "{} with {} of {}: it was trained on ".format(*model.prefix_shape)
                + base.id
            )
    elif prompt.weights.shape[1] != model.embedding_width:
        raise PromptError(
            f"the prompt has width {prompt.weights.shape[1]}, {model.source} has {model.embedding_width}: "
            f"it was trained on {base.id}"
        )
    differs = difference(base.fingerprint, model, prompt.record.chat_template) if base.fingerprint else None
    if differs:
        raise PromptError(
            f"the prompt was trained on {base.id}; {model.source} is another model: {differs}. "
            f"Use --model {base.path or base.id}, or tune a prompt for this one"
        )
