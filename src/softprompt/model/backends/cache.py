"""transformers' key-value cache, filled with prefixes."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from softprompt.model.backends.prefix_batch import PrefixBatch


def filled_cache(prefix_batch: PrefixBatch, layers: int, dtype: torch.dtype) -> DynamicCache:
    """Return a cache whose rows hold their prefixes."""
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(prefix_batch.states("keys", layer, dtype), prefix_batch.states("values", layer, dtype), layer)
    return cache


def cached_tensors(cache: DynamicCache) -> tuple[list[Tensor], list[Tensor]]:
    """Return a cache's keys and values, each per layer `[B, K, T, D]`."""
    tensors = [(keys, values) for keys, values, _ in cache]
    return [keys for keys, _ in tensors], [values for _, values in tensors]


def position_arguments(hf_model: PreTrainedModel, positions: Tensor) -> dict[str, Tensor]:
    """Return `position_ids` as a keyword argument for models that take it; ALiBi models do not."""
    takes = "position_ids" in inspect.signature(hf_model.forward).parameters
    return {"position_ids": positions} if takes else {}
