"""Rows of text that are continued a token at a time, each behind a prefix that is computed already."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from softprompt.model.backends.base import Backend, input_device
from softprompt.model.backends.padded import filled_cache, positions
from softprompt.model.backends.prefix_batch import PrefixBatch
from softprompt.model.prefix import Prefix


class ContinuedRows(ABC):
    """Some rows, all of which take one more token at a time."""

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Keep some rows, in this order; one may be taken several times."""

    @abstractmethod
    def read(self, tokens: Sequence[int]) -> Tensor:
        """Add a token to every row and return the logits after it, `[rows, V]`."""


class SharedCache(ContinuedRows):
    """Rows in the model's own cache: `padding · prefix · text`, so that what is real is contiguous.

    Args:
        hf_model: the frozen model.
        backend: how it is run.
        prefixes: of each row what it goes on from; none is empty.
    """

    def __init__(self, hf_model: PreTrainedModel, backend: Backend, prefixes: Sequence[Prefix]) -> None:
        self._hf_model, self._way, self._device = hf_model, backend, input_device(hf_model)
        prefix_batch = PrefixBatch(prefixes)
        self._cache: DynamicCache = filled_cache(prefix_batch, len(prefixes[0].keys), prefixes[0].keys[0].dtype)
        self._at = torch.tensor(prefix_batch.lengths, device=self._device)
        places = torch.arange(prefix_batch.longest, device=self._device)
        self._mask = (places[None, :] >= prefix_batch.longest - self._at[:, None]).long()

    def select(self, rows: Sequence[int]) -> None:
        kept = torch.tensor(list(rows), device=self._device)
        self._cache.batch_select_indices(kept)
        self._mask, self._at = self._mask[kept], self._at[kept]

    def read(self, tokens: Sequence[int]) -> Tensor:
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        with self._way.running():
            logits: Tensor = self._hf_model(
                input_ids=torch.tensor(list(tokens), device=self._device).unsqueeze(1),
                past_key_values=self._cache,
                use_cache=True,
                attention_mask=self._mask,
                **positions(self._hf_model, self._at.unsqueeze(1)),
            ).logits[:, -1]
        self._at = self._at + 1
        return logits


class OwnPrefixes(ContinuedRows):
    """Rows with a prefix each, which every token makes longer: slower, but a pass of text like any other.

    For models whose cache counts padding as positions, or holds something else than what their attention sees.

    Args:
        backend: how the model is run.
        prefixes: of each row what it goes on from; none is empty.
    """

    def __init__(self, backend: Backend, prefixes: Sequence[Prefix]) -> None:
        self._way, self._prefixes = backend, list(prefixes)

    def select(self, rows: Sequence[int]) -> None:
        self._prefixes = [self._prefixes[row] for row in rows]

    def read(self, tokens: Sequence[int]) -> Tensor:
        texts = [torch.tensor([token]) for token in tokens]
        done = self._way.text_pass(self._prefixes, texts, [torch.tensor([0])] * len(texts), extend=True)
        self._prefixes = done.extended
        return self._way.lm_head.logits(done.hidden)
