"""Tiny copies: tiny random models of a loaded model's kind, to check on them what the model itself cannot show."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

WINDOW = 5  # shorter than the reference's texts
_HEADS, _SIZE = 4, 16
_SMALL = {
    "vocab_size": 128,
    "hidden_size": _HEADS * _SIZE,
    "num_attention_heads": _HEADS,
    "head_dim": _SIZE,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "ffn_dim": 64,
    "ffn_hidden_size": 64,
    # What the decoders of encoder-decoder models call it:
    "decoder_layers": 2,
    "decoder_attention_heads": _HEADS,
    "decoder_ffn_dim": 64,
    "max_target_positions": 256,
}
_WINDOWS = ("sliding_window", "window_size", "local_attention")
_SOFTCAPS = ("attn_logit_softcapping",)  # on attention scores, which are seldom so large in a tiny model
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def sliding_window(config: PretrainedConfig) -> int | None:
    """Return the shortest sliding window of any layer, None where all layers attend to everything."""
    text = config.get_text_config()
    if getattr(text, "use_sliding_window", True) is False:
        return None
    windows = [getattr(text, name, None) for name in _WINDOWS]
    return min((window for window in windows if isinstance(window, int) and window > 0), default=None)


def shows_all_attention(config: PretrainedConfig) -> bool:
    """Tell whether a few short texts, on the model itself, show everything that its attention does."""
    window = sliding_window(config)
    capped = any(getattr(config.get_text_config(), name, None) for name in _SOFTCAPS)
    return (window is None or window <= WINDOW) and not capped


def tiny_copy(hf_model: PreTrainedModel) -> PreTrainedModel:
    """Return a tiny random model, in float32, with one layer of each kind that a model has and a short window.

    Errors of a foreign configuration that cannot be shrunk are not caught.
    """
    config = copy.deepcopy(hf_model.config.get_text_config())
    same_class = type(hf_model) if config.__class__ is hf_model.config.__class__ else None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    _cut_layers(config)
    for name, size in _SMALL.items():
        derived = isinstance(getattr(type(config), name, None), property)
        if isinstance(getattr(config, name, None), int) and not derived:
            setattr(config, name, size)
    groups = getattr(config, "num_key_value_heads", None)
    if groups is not None:
        config.num_key_value_heads = _HEADS if groups == hf_model.config.get_text_config().num_attention_heads else 2
    for name in _WINDOWS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, WINDOW)
    for name in _SOFTCAPS:
        if getattr(config, name, None):
            setattr(config, name, 1.0)
    for name in _TOKENS:
        setattr(config, name, None)
    if "flash" in str(config._attn_implementation):
        config._attn_implementation = "eager"  # flash kernels run in half precision only
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small: Any = same_class(config) if same_class is not None else AutoModelForCausalLM.from_config(config)
        for parameter in small.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(3)  # with weights of the usual size, attention is nearly uniform
    frozen: PreTrainedModel = small.float().eval().requires_grad_(False)
    return frozen


def _cut_layers(config: PretrainedConfig) -> None:
    """Keep the first layer of each kind, at least two; lists with an entry per layer are cut to the same layers."""
    count = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["full"] * count
    layers = sorted({kinds.index(kind) for kind in kinds} | {min(1, count - 1)} | {0})
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == count and name != "architectures":
            setattr(config, name, [value[i] for i in layers])
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = 1
    config.num_hidden_layers = len(layers)
