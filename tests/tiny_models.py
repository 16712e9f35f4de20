"""Tiny random models of several architectures, made on the spot, and random prompts for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from softprompt.data.templates import DEFAULT_TEMPLATE
from softprompt.model.backends.packed import PackedBackend
from softprompt.model.backends.padded import PaddedBackend
from softprompt.model.backends.verify import freeze
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.base_model import BaseModelRecord, base_model_record
from softprompt.prompt.ensemble import AnyPrompt, Ensemble
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import BasePrompt, SoftPrompt
from tiny_tokenizers import tiny_tokenizer

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LIKE_LLAMA = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    **_IDS,
}
_LIKE_GPT2 = {"vocab_size": 400, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, **_IDS}
_LIKE_NEOX = {key: value for key, value in _LIKE_LLAMA.items() if key != "num_key_value_heads"}
_WINDOW = {"sliding_window": 6}  # shorter than the texts of the tests
_EXPERTS = {"num_experts_per_tok": 2}
_LIKE_FALCON = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, **_IDS}

# Each with the backend that it is expected to get.
ARCHITECTURES: dict[str, tuple[str, Callable[[], PretrainedConfig]]] = {
    "llama": ("packed", lambda: transformers.LlamaConfig(**_LIKE_LLAMA)),
    "mistral": ("packed", lambda: transformers.MistralConfig(**_LIKE_LLAMA, **_WINDOW)),
    "qwen2": ("packed", lambda: transformers.Qwen2Config(**_LIKE_LLAMA)),
    "qwen2-window": (
        "packed",
        lambda: transformers.Qwen2Config(**_LIKE_LLAMA, **_WINDOW, use_sliding_window=True, max_window_layers=2),
    ),
    "qwen3": ("packed", lambda: transformers.Qwen3Config(**_LIKE_LLAMA, head_dim=8)),
    "gemma": ("packed", lambda: transformers.GemmaConfig(**_LIKE_LLAMA, head_dim=8)),
    "gemma2": ("packed", lambda: transformers.Gemma2Config(**_LIKE_LLAMA, **_WINDOW, head_dim=8)),
    "gemma3": (
        "packed",
        lambda: transformers.Gemma3TextConfig(**_LIKE_LLAMA, **_WINDOW, head_dim=8, sliding_window_pattern=2),
    ),
    "phi": ("packed", lambda: transformers.PhiConfig(**_LIKE_LLAMA)),
    "phi3": ("packed", lambda: transformers.Phi3Config(**_LIKE_LLAMA, **_WINDOW)),
    "gpt2": ("packed", lambda: transformers.GPT2Config(**_LIKE_GPT2)),
    "opt": (
        "packed",
        lambda: transformers.OPTConfig(**_LIKE_FALCON, ffn_dim=48, max_position_embeddings=256, word_embed_proj_dim=16),
    ),
    "gpt-neox": ("packed", lambda: transformers.GPTNeoXConfig(**_LIKE_NEOX)),
    "olmo2": ("packed", lambda: transformers.Olmo2Config(**_LIKE_LLAMA)),
    "cohere": ("packed", lambda: transformers.CohereConfig(**_LIKE_LLAMA)),
    "granite": (
        "packed",
        lambda: transformers.GraniteConfig(
            **_LIKE_LLAMA,
            logits_scaling=2.0,
            attention_multiplier=0.3,
            embedding_multiplier=3.0,
            residual_multiplier=0.7,
        ),
    ),
    "smollm3": ("packed", lambda: transformers.SmolLM3Config(**_LIKE_LLAMA)),
    "gpt-oss": (
        "packed",
        lambda: transformers.GptOssConfig(**_LIKE_LLAMA, **_WINDOW, **_EXPERTS, head_dim=8, num_local_experts=4),
    ),
    "mixtral": ("packed", lambda: transformers.MixtralConfig(**_LIKE_LLAMA, **_EXPERTS, num_local_experts=4)),
    "qwen3-moe": (
        "packed",
        lambda: transformers.Qwen3MoeConfig(
            **_LIKE_LLAMA, **_EXPERTS, head_dim=8, num_experts=4, moe_intermediate_size=16
        ),
    ),
    "phimoe": (
        "packed",
        lambda: transformers.PhimoeConfig(**_LIKE_LLAMA, **_WINDOW, **_EXPERTS, num_local_experts=4),
    ),
    "bloom": ("packed", lambda: transformers.BloomConfig(vocab_size=400, hidden_size=32, n_layer=3, n_head=4, **_IDS)),
    "falcon-rotary": ("padded", lambda: transformers.FalconConfig(**_LIKE_FALCON, alibi=False)),
    "falcon-alibi": ("padded", lambda: transformers.FalconConfig(**_LIKE_FALCON, alibi=True, multi_query=False)),
    "mpt": (
        "padded",
        lambda: transformers.MptConfig(vocab_size=400, d_model=32, n_heads=4, n_layers=3, max_seq_len=256, **_IDS),
    ),
    "gptj": ("padded", lambda: transformers.GPTJConfig(**_LIKE_GPT2, rotary_dim=4)),
}


def tiny_model(architecture: str, **settings: object) -> PreTrainedModel:
    """A random model, the same each time; some of its configuration's settings may be others."""
    config = ARCHITECTURES[architecture][1]()
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    # Random weights of the usual size give nearly the same logits everywhere; larger ones tell positions apart, and let
    # no token stand between two experts, where rounding decides.
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return made.eval().requires_grad_(False)


def frozen(architecture: str) -> FrozenModel:
    return freeze(tiny_model(architecture), tiny_tokenizer(), f"tiny-{architecture}")


def model_by(architecture: str, backend: type[PackedBackend] | type[PaddedBackend]) -> FrozenModel:
    hf_model = tiny_model(architecture)
    return FrozenModel(hf_model, tiny_tokenizer(), backend(hf_model), architecture)


def with_memory(model: FrozenModel, free: Callable[[], float]) -> FrozenModel:
    """The same model on a device that has so many bytes left."""
    return FrozenModel(
        model.hf_model, model.tokenizer, model.backend, model.source, available_memory=lambda _device: free()
    )


def tiny_prompt(model: FrozenModel, length: int = 7) -> Tensor:
    return torch.randn(length, model.embedding_width, generator=torch.Generator().manual_seed(5)) * 0.3


def as_prompt(*weights: Tensor | None) -> AnyPrompt:
    """Return weights as a prompt: a soft prompt or prefix, the base model for None, an ensemble for several."""
    record = Record(base_model=BaseModelRecord(id="tiny"))
    members = tuple(BasePrompt() if each is None else SoftPrompt(each, record) for each in weights)
    return members[0] if len(members) == 1 else Ensemble(members, record)  # type: ignore[arg-type]


def soft_prompt(model: FrozenModel, labels: list[str]) -> SoftPrompt:
    record = Record(
        base_model=base_model_record(model),
        task="classification",
        template=DEFAULT_TEMPLATE["classification"],
        verbalizers={label: label for label in labels},
    )
    return SoftPrompt(tiny_prompt(model), record)
