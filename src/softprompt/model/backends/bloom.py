"""Bloom's attention for the packed backend: transformers does not make it pluggable.

Bloom (the tutorial's model) has a forward method of its own around its attention. This one does the same with the
packed attention in the middle; like every backend, it is tested on the loaded model before it is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt.model.backends.attention import attention


def bloom_attention(
    module: Any, hidden_states: Tensor, residual: Tensor, *_args: object, **_kwargs: object
) -> tuple[Tensor, None]:
    """Replace `BloomAttention.forward`.

    Args:
        hidden_states, residual: `[1, N, H]`.

    Returns:
        `[1, N, H]`, and None for the weights.
    """
    joined = module.query_key_value(hidden_states).unflatten(-1, (module.num_heads, 3, -1)).transpose(1, 2)
    query, key, value = joined.unbind(3)  # from `[1, A, N, 3, D]`
    slopes = alibi_slopes(module.num_heads).to(hidden_states.device)
    out, _ = attention(module, query, key, value, None, scaling=module.inv_norm_factor, alibi_slopes=slopes)
    return residual + module.dense(out.flatten(2)), None


def alibi_slopes(heads: int) -> Tensor:
    """Return what is added to each head's scores per position of the key, `[A]` (Press et al. 2022).

    They fall geometrically over the first 2^k heads; the other heads' slopes lie between them.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes)
