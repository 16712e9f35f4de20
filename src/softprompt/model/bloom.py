"""Bloom's attention, which transformers does not let us plug into: brought to the packed way.

Bloom (the tutorial's model) has a forward method of its own around its attention. This one does the same with the
packed attention in the middle; like every way, it is tested on the loaded model before it is taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from softprompt.model.attention import attention


def bloom_attention(
    module: Any, hidden_states: Tensor, residual: Tensor, *_args: object, **_kwargs: object
) -> tuple[Tensor, None]:
    """Stand in for `BloomAttention.forward`.

    Args:
        module: the `BloomAttention`.
        hidden_states, residual: `[1, N, H]`.

    Returns:
        `[1, N, H]`, and None for the weights.
    """
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    ones = torch.ones(1, 2, device=hidden_states.device)
    slopes = build_alibi_tensor(ones, module.num_heads, torch.float32)[:, 0, 1]  # the bias of position 1
    out, _ = attention(module, query, key, value, None, scaling=module.inv_norm_factor, alibi_slopes=slopes)
    return residual + module.dense(out.flatten(2)), None
