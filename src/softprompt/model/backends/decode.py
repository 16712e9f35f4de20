"""Batches of rows that are continued a token at a time, each after its own prefix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from softprompt.model.backends.cache import filled_cache, position_arguments
from softprompt.model.backends.prefix_batch import PrefixBatch
from softprompt.model.prefix import Prefix
from softprompt.private_interfaces import input_device


class SharedCacheBatch:
    """Rows that take a token at a time, in one cache of the model's own.

    A row is `padding · prefix · text`, so that the real tokens are contiguous.

    Args:
        prefixes: of each row the one that it continues; none is empty.
    """

    def __init__(
        self, hf_model: PreTrainedModel, running: Callable[[], AbstractContextManager[None]], prefixes: Sequence[Prefix]
    ) -> None:
        self._hf_model, self._running, self._device = hf_model, running, input_device(hf_model)
        batch = PrefixBatch(prefixes)
        self._cache: DynamicCache = filled_cache(batch, len(prefixes[0].keys), prefixes[0].keys[0].dtype)
        self._lengths = torch.tensor(batch.lengths, device=self._device)
        slots = torch.arange(batch.longest, device=self._device)
        self._mask = (slots[None, :] >= batch.longest - self._lengths[:, None]).long()

    def select(self, rows: Sequence[int]) -> None:
        """Reduce the batch to some rows, in this order; a row may occur several times."""
        indices = torch.tensor(list(rows), device=self._device)
        self._cache.batch_select_indices(indices)
        self._mask, self._lengths = self._mask[indices], self._lengths[indices]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Add a token to every row and return the logits after it, `[rows, V]`."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        with self._running():
            logits: Tensor = self._hf_model(
                input_ids=torch.tensor(list(tokens), device=self._device).unsqueeze(1),
                past_key_values=self._cache,
                use_cache=True,
                attention_mask=self._mask,
                **position_arguments(self._hf_model, self._lengths.unsqueeze(1)),
            ).logits[:, -1]
        self._lengths = self._lengths + 1
        return logits


class OwnPrefixBatch:
    """The same with a prefix for each row, which every token extends: slower, but a pass of text like any other.

    For models whose cache counts padding as positions, or stores something else than what their attention uses.

    Args:
        prefill: a backend's own.
        prefixes: of each row the one that it continues; none is empty.
    """

    def __init__(
        self,
        prefill: Callable[[Sequence[Prefix], Sequence[Sequence[int]]], tuple[Tensor, list[Prefix]]],
        prefixes: Sequence[Prefix],
    ) -> None:
        self._prefill, self._prefixes = prefill, list(prefixes)

    def select(self, rows: Sequence[int]) -> None:
        self._prefixes = [self._prefixes[row] for row in rows]

    def step(self, tokens: Sequence[int]) -> Tensor:
        logits, self._prefixes = self._prefill(self._prefixes, [[token] for token in tokens])
        return logits


DecodeBatch: TypeAlias = SharedCacheBatch | OwnPrefixBatch
