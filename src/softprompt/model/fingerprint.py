"""Fingerprints: whether a prompt belongs to a base model, whatever precision that is loaded in."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from base64 import b64decode
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator
from transformers import PretrainedConfig

from softprompt.model.fingerprint_v1 import FirstFingerprint, first_fingerprint
from softprompt.model.frozen import FrozenModel
from softprompt.model.tokenizer_facts import different_tokenizer
from softprompt.model.weight_sample import different_weights, sample_weights

# Settings of a configuration that change no answer: where a model comes from, how it is trained, what else it returns,
# and which tokens it was trained with; texts are encoded by the tokenizer alone.
_NO_ANSWER = re.compile(
    r"_.*|architectures|auto_map|transformers_version|(torch_)?dtype|use_bfloat16|name_or_path|tokenizer_class|prefix"
    r"|.*dropout.*|.*pdrop|.*drop_path.*|.*layerdrop.*|.*initializer.*|.*init_std|.*init_method_std|.*jitter_noise"
    r"|.*aux_loss.*|output_(attentions|hidden_states|router_logits|past)|return_dict|use_return_dict|use_cache"
    r"|cache_implementation|torchscript|gradient_checkpointing|chunk_size_feed_forward|pretraining_tp"
    r"|tie_word_embeddings|quantization_config|id2label|label2id|num_labels|problem_type|finetuning_task"
    r"|task_specific_params|summary_.*|pruned_heads|.*(bos|eos|pad|sep|cls|mask|unk|decoder_start)_token_id"
)
# These scale positions by the configured maximum length; for others it is only a limit.
_SCALED_BY_LENGTH = ("dynamic", "longrope", "yarn")
# Settings that differ between architectures and sizes.
_SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_NAMED = 3  # differences in a message


class Fingerprint(BaseModel):
    """What identifies a base model: everything that changes its answers.

    Attributes:
        configuration: all settings except those that are known to change no answer.
        tokenizer: what determines the token ids of a text.
        chat_template: its hash, None without one.
        weights: some values of each weight, see `weight_sample`.
        skipped: how many weights are left out, because they are quantized or not on the device.
    """

    model_config = ConfigDict(extra="forbid")

    version: Literal[2]
    configuration: dict[str, Any]
    tokenizer: dict[str, Any]
    chat_template: str | None
    weights: dict[str, str]
    skipped: int = Field(ge=0)

    @field_validator("weights")
    @classmethod
    def _readable(cls, weights: dict[str, str]) -> dict[str, str]:
        for name, text in weights.items():
            if len(b64decode(text, validate=True)) % 4:  # of float32
                raise ValueError(f"the values of {name} are damaged")
        return weights

    def differences(self, other: Fingerprint, chat_template: bool = False) -> dict[str, list[str]]:
        """Return what differs in `other`, with the details of each difference; nothing where both are the same model.

        Settings that one side lacks are not compared: a newer transformers has more of them.

        Args:
            other: of the model that is loaded now.
            chat_template: whether the prompt uses it.
        """
        settings, shape = list[str](), list[str]()
        for name, before, now in _differing(self.configuration, other.configuration):
            (shape if name in _SHAPE else settings).append(f"{name} was {before!r} and is {now!r}")
        found = {
            "its architecture or size": shape,
            "its configuration": settings,
            "its tokenizer": different_tokenizer(self.tokenizer, other.tokenizer),
            "its chat template": ["its text"] if chat_template and self.chat_template != other.chat_template else [],
            "its weights": different_weights(self.weights, other.weights, not (self.skipped or other.skipped)),
        }
        return {what: names for what, names in found.items() if names}


AnyFingerprint: TypeAlias = Fingerprint | FirstFingerprint


def fingerprint(model: FrozenModel) -> Fingerprint:
    """Compute the fingerprint of a loaded model, as it is now: its weights may have been changed since loading."""
    weights, skipped = sample_weights(model.hf_model)
    template = model.tokenizer.chat_template
    return Fingerprint(
        version=2,
        configuration=_settings(model.hf_model.config.get_text_config()),
        tokenizer=model.tokenizer_facts,
        chat_template=hashlib.sha256(json.dumps(template).encode()).hexdigest() if template else None,
        weights=weights,
        skipped=skipped,
    )


def difference(before: AnyFingerprint, model: FrozenModel, chat_template: bool = False) -> str | None:
    """Say how a loaded model differs from the one that a fingerprint is of; None where it is the same.

    Warns of what could not be compared.

    Args:
        before: the fingerprint, of either version.
        chat_template: whether the prompt uses it.
    """
    if isinstance(before, FirstFingerprint):
        changed = before.mismatch(first_fingerprint(model))
        if changed is None:
            warnings.warn(
                f"the record of the base model is of format version 1: whether {model.source} is the same model in its "
                "layers, its head, its RoPE settings and how it splits text could not be checked",
                stacklevel=2,
            )
        return f"{changed} differs" if changed else None
    now = fingerprint(model)
    found = before.differences(now, chat_template)
    unchecked = max(before.skipped, now.skipped)
    if not found and unchecked:
        warnings.warn(
            f"{unchecked} of the weights of {model.source} are quantized or not on the device: whether "
            "they are the same could not be checked",
            stacklevel=2,
        )
    return "; ".join(f"{what} differs ({_listed(names)})" for what, names in found.items()) or None


def _settings(config: PretrainedConfig) -> dict[str, Any]:
    """Return the settings that may change answers, as JSON values."""
    settings = {name: value for name, value in config.to_dict().items() if not _NO_ANSWER.fullmatch(name)}
    positions = json.dumps(settings.get("rope_parameters"), default=str)
    if not any(kind in positions for kind in _SCALED_BY_LENGTH):
        settings.pop("max_position_embeddings", None)
    loaded: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return loaded


def _differing(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the names and both values of settings that both sides have and that differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() & now.keys() if before != now else ():
            yield from _differing(before[key], now[key], f"{name}.{key}" if name else key)
    elif before != now:
        yield name, before, now


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
