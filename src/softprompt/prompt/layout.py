"""A prompt's folder: the names of its files, and PEFT's names and tensor layout inside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from softprompt.errors import PromptError
from softprompt.model.prefix import is_prefix
from softprompt.prompt.base_model import BaseModelRecord
from softprompt.storage import read_json_object

ADAPTER, WEIGHTS, RECORD, CARD = "adapter_config.json", "adapter_model.safetensors", "softprompt.json", "README.md"
ENSEMBLE = "ensemble.json"  # in an ensemble's folder, beside `member-1`, `member-2`, …
PEFT_KEY = "prompt_embeddings"  # the one tensor in WEIGHTS
# PEFT saves both as plain virtual tokens: P-tuning's encoder (Liu et al. 2021) is not in the folder.
PROMPT_TYPES = ("PROMPT_TUNING", "P_TUNING")
# A cartridge is a prefix that was started from a text's keys and values (Eyuboglu et al. 2025).
PEFT_TYPES = (*PROMPT_TYPES, "PREFIX_TUNING", "CARTRIDGE")


def member_name(number: int) -> str:
    """Return the folder of an ensemble's member, counted from 1."""
    return f"member-{number}"


def read_json(path: Path) -> dict[str, Any]:
    """Read one of a folder's JSON files, which holds an object."""
    return read_json_object(path, "save or export the prompt again", PromptError)


def peft_config(weights: Tensor, base: BaseModelRecord) -> dict[str, Any]:
    """Return what PEFT needs to load a prompt, by the names of `PromptTuningConfig` and `PrefixTuningConfig`."""
    common = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.path or base.id,
        "revision": base.revision,
        "inference_mode": True,
        "num_virtual_tokens": int(weights.shape[-2]),
        "num_transformer_submodules": 1,
    }
    if is_prefix(weights):
        layers, _, heads, _, size = weights.shape
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
        "token_dim": int(weights.shape[1]),
        "num_attention_heads": base.attention_heads,
        "num_layers": base.layers,
        "prompt_tuning_init": "RANDOM",
    }


def to_peft(weights: Tensor) -> Tensor:
    """Return weights in PEFT's layout: `[P, H]`, or `[P, L·2·K·D]` for a prefix `[L, 2, K, P, D]`."""
    flat = weights.permute(3, 0, 1, 2, 4).flatten(1) if is_prefix(weights) else weights
    return flat.float().contiguous()


def from_peft(path: Path, weights: Tensor, adapter: Mapping[str, Any]) -> Tensor:
    """Undo `to_peft`, with the shape that the adapter's configuration gives.

    Args:
        weights: `[P, H]` or `[P, L·2·K·D]`.

    Raises:
        PromptError: configuration and weights do not agree.
    """
    if adapter.get("peft_type") in PROMPT_TYPES:
        return weights
    given = [adapter.get(name) for name in ("num_layers", "num_attention_heads", "token_dim")]
    layers, heads, width = (count if isinstance(count, int) and count > 0 else 0 for count in given)
    if not heads or width % heads or weights.shape[1] != 2 * layers * width:
        raise PromptError(
            f"{path}: {weights.shape[1]} numbers a virtual token do not make {given[0]} layers of keys and values with "
            f"{given[1]} heads, {given[2]} numbers together; {ADAPTER} is damaged"
        )
    prefix: Tensor = weights.unflatten(1, (layers, 2, heads, width // heads)).permute(1, 2, 3, 0, 4).contiguous()
    return prefix
