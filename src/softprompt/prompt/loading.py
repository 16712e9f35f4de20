"""Loading a prompt: from a folder, PEFT's too, or from a registered name; and checking that it fits a model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from softprompt.config import FormatConfig
from softprompt.data.chat import dated
from softprompt.data.rows import Task
from softprompt.data.templates import make_format
from softprompt.errors import PromptError, SettingsError
from softprompt.model.fingerprint import difference
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.ensemble import Ensemble, Prompt, is_member_name, make_ensemble
from softprompt.prompt.layout import ADAPTER, ENSEMBLE, PEFT_KEY, PEFT_TYPES, WEIGHTS, from_peft, read_json
from softprompt.prompt.record import Record, read_record
from softprompt.prompt.registry import find
from softprompt.prompt.soft_prompt import SoftPrompt

_MAX_VIRTUAL_TOKENS = 10_000
_DTYPES = ("F32", "F16", "BF16")


def load_prompt(prompt: str | Path) -> Prompt:
    """Read a prompt or an ensemble; folders that PEFT wrote for prompts and prefixes are read too.

    Args:
        prompt: a folder, or `NAME` or `NAME@VERSION` of a registered prompt.

    Raises:
        PromptError: no such prompt, a missing file, a pickle, a wrong shape, or values that are not finite.
    """
    path = find(prompt)
    return _read_ensemble(path) if (path / ENSEMBLE).is_file() else _read_soft_prompt(path)


def load_soft_prompt(prompt: str | Path) -> SoftPrompt:
    """Read a prompt that is no ensemble, see `load_prompt`."""
    return _read_soft_prompt(find(prompt))


def _read_ensemble(path: Path) -> Ensemble:
    file = path / ENSEMBLE
    loaded = read_json(file)
    try:
        names = [str(name) for name in loaded["members"]]
        metrics = {str(name): float(value) for name, value in loaded["metrics"].items() if value is not None}
        data = {str(name): str(value) for name, value in loaded.get("data", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PromptError(f"{file} is damaged: {error}; save or export the ensemble again") from error
    known = all(is_member_name(name) and (path / name).is_dir() for name in names)
    if not (known and len(set(names)) == len(names) >= 2):
        raise PromptError(f"{file} is damaged: it must name two or more folders beside it, member-1 and so on")
    members = [_read_soft_prompt(path / name) for name in names]
    try:
        return make_ensemble(members, metrics, data)
    except PromptError as error:
        raise PromptError(f"{path}: {error}") from error


def _read_soft_prompt(path: Path) -> SoftPrompt:
    for name in (ADAPTER, WEIGHTS):
        if not (path / name).is_file():
            raise _no_prompt(path, name)
    adapter = read_json(path / ADAPTER)
    peft_type, submodules = adapter.get("peft_type"), adapter.get("num_transformer_submodules")
    if peft_type not in PEFT_TYPES:
        raise PromptError(f"{path} holds a {peft_type} adapter; softprompt reads {', '.join(PEFT_TYPES)}")
    if submodules not in (None, 1):
        raise PromptError(
            f"{path} is for an encoder-decoder model (num_transformer_submodules {submodules}); retrain it"
        )
    weights = from_peft(path, _read_weights(path / WEIGHTS), adapter)
    return SoftPrompt(weights, read_record(path, adapter))


def _no_prompt(path: Path, missing: str) -> PromptError:
    """Return the error of a folder that lacks a file, with what it may be instead."""
    if (path / ENSEMBLE).is_file():
        return PromptError(f"{path} is an ensemble; give one of its members, such as {path / 'member-1'}")
    pickles = [file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".pkl")]
    hint = f"; {pickles[0]} is a pickle, which can run code and is never read" if pickles else ""
    inside = sorted(p for p in path.iterdir() if any((p / file).is_file() for file in (ADAPTER, ENSEMBLE)))
    if inside:  # of a run, or as PEFT saves an adapter that has a name
        hint = f"; did you mean {' or '.join(map(str, inside[:3]))}?"
    return PromptError(f"{path} is not a prompt: {missing} is missing{hint}")


def _read_weights(path: Path) -> Tensor:
    """Read the one tensor, after its shape was checked in the file's header."""
    try:
        with safe_open(path, framework="pt") as file:
            if list(file.keys()) != [PEFT_KEY]:
                raise PromptError(f"{path} must hold one tensor {PEFT_KEY!r}, it holds {', '.join(file.keys())}")
            shape, dtype = file.get_slice(PEFT_KEY).get_shape(), file.get_slice(PEFT_KEY).get_dtype()
            if dtype not in _DTYPES:
                raise PromptError(f"{path}: {PEFT_KEY} is of type {dtype}; allowed are {', '.join(_DTYPES)}")
            if len(shape) != 2 or not 1 <= shape[0] <= _MAX_VIRTUAL_TOKENS:
                raise PromptError(f"{path}: {PEFT_KEY} has the shape {shape}; it must be [virtual tokens, width]")
            weights: Tensor = file.get_tensor(PEFT_KEY).float()
    except (SafetensorError, OSError) as error:
        raise PromptError(f"cannot read {path}: {error}") from error
    if not bool(torch.isfinite(weights).all()):
        raise PromptError(
            f"{path} holds values that are not finite; train the prompt again, with a lower learning_rate"
        )
    return weights


def describe_prompt(prompt: SoftPrompt, model: FrozenModel, task: Task, config: FormatConfig) -> SoftPrompt:
    """Give a prompt that PEFT wrote a record: which model it belongs to, and how rows become text.

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


def require_fit(prompt: Prompt, model: FrozenModel) -> None:
    """Make sure that a prompt, or every member of an ensemble, was trained on a model."""
    for member in prompt.members:
        _require_shape(member, model)
        base, chat_template = member.record.base_model, member.record.chat_template
        differs = difference(base.fingerprint, model, chat_template) if base.fingerprint else None
        if differs:
            raise PromptError(
                f"the prompt was trained on {base.id}; {model.source} is another model: {differs}. "
                f"Use --model {base.path or base.id}, or tune a prompt for this one"
            )


def _require_shape(prompt: SoftPrompt, model: FrozenModel) -> None:
    shape, base = prompt.weights.shape, prompt.record.base_model.id
    if prompt.method == "prefix-tuning":
        layers, _, heads, _, size = shape
        if (layers, heads, size) != model.prefix_shape:
            own = "{} with {} of {}".format(*model.prefix_shape)
            raise PromptError(
                f"the prefix is for {layers} layers with {heads} key-value heads of size {size}, {model.source} has "
                f"{own}: it was trained on {base}"
            )
    elif shape[1] != model.embedding_width:
        raise PromptError(
            f"the prompt has width {shape[1]}, {model.source} has {model.embedding_width}: it was trained on {base}"
        )
