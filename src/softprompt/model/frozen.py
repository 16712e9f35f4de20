"""The frozen model: a base model that is never changed, its tokenizer, and its backend."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.data.example import common_start
from softprompt.model.backends.base import Backend
from softprompt.model.free_memory import available_memory
from softprompt.model.prefix import Prefix
from softprompt.model.tokenizer_facts import tokenizer_facts
from softprompt.private_interfaces import input_device

MAX_CACHED = 8  # prefixes; one of 100 virtual tokens of a model of 7 billion parameters takes 50 MB in half precision
_MIN_TOKENS_SAVED = 64  # a pass of a few tokens takes as long as so many more tokens in a larger pass


class FrozenModel:
    """A causal language model in eval mode, whose weights take no gradients.

    Attributes:
        hf_model: the transformers model itself.
        source: what it was loaded from: a hub id, a path or a bundled name.
        revision: the hub revision, None for local models.
        backend: runs text against a prefix.
        available_memory: returns the bytes that can still be allocated on a device.
    """

    def __init__(
        self,
        hf_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        backend: Backend,
        source: str,
        revision: str | None = None,
        available_memory: Callable[[torch.device], float] = available_memory,
    ) -> None:
        self.hf_model, self.tokenizer, self.backend = hf_model, tokenizer, backend
        self.source, self.revision = source, revision
        self.available_memory = available_memory
        self._cached: OrderedDict[int, tuple[ReferenceType[Tensor], int, Prefix]] = OrderedDict()

    @property
    def device(self) -> torch.device:
        return input_device(self.hf_model)

    def free_memory(self) -> float:
        """Return the bytes that can still be allocated on the model's device."""
        return self.available_memory(self.device)

    @property
    def embedding_width(self) -> int:
        """H, the width of the input embedding; not the hidden size in every model."""
        return int(self.embed([0]).shape[1])

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens that have an embedding; V, or a little more where the table is padded."""
        return int(self.hf_model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]

    @property
    def context_length(self) -> int | None:
        """The most positions at which a prefix and a text run exactly, None where there is no limit.

        Chunked attention restarts at every chunk, and `longrope` changes all positions beyond its original length: up
        to there the prefix is the same for all texts.
        """
        config = self.hf_model.config.get_text_config()
        limits = [getattr(config, name, None) for name in ("max_position_embeddings", "attention_chunk_size")]
        rope = getattr(config, "rope_parameters", None) or {}
        if "longrope" in (rope.get("rope_type"), rope.get("type")):
            limits.append(rope.get("original_max_position_embeddings"))
            limits.append(getattr(config, "original_max_position_embeddings", None))
        return min((int(limit) for limit in limits if limit), default=None)

    @cached_property
    def tokenizer_facts(self) -> dict[str, Any]:
        """What identifies the tokenizer; hashing a vocabulary takes some tenths of a second."""
        return tokenizer_facts(self.tokenizer)

    @cached_property
    def prefix_shape(self) -> tuple[int, int, int]:
        """L, K and D: the layers, and each one's key-value heads and their size.

        Raises:
            ModelError: the layers differ in K or D.
        """
        with torch.no_grad():
            layers, _, heads, _, size = self.prefix(self.embed([0])).stacked().shape
        return layers, heads, size

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Return the input embeddings of token ids, `[T, H]`."""
        return self.backend.embed(ids)

    def prefix(self, weights: Tensor | None, text_ids: Sequence[int] = ()) -> Prefix:
        """Return a prompt's prefix; see `Backend.prefix`."""
        return self.backend.prefix(weights, text_ids)

    @torch.no_grad()
    def cached_prefix(self, weights: Tensor | None) -> Prefix:
        """Return the prefix of a prompt without gradients; those of the last few prompts are cached.

        The cache finds a prompt by its tensor, if that was not changed in place: hashing a learned prefix takes longer
        than a pass of a short text.
        """
        if weights is None:
            return Prefix()
        with self.backend.lock:
            cached = self._cached.get(id(weights))
            if cached is None or cached[0]() is not weights or cached[1] != _version(weights):
                cached = self._cached[id(weights)] = ref(weights), _version(weights), self.prefix(weights)
            self._cached.move_to_end(id(weights))
            if len(self._cached) > MAX_CACHED:
                self._cached.popitem(last=False)
            return cached[2]

    @torch.no_grad()
    def shared_prefixes(self, weights: Sequence[Tensor | None], texts: Sequence[Sequence[int]]) -> list[Prefix]:
        """Return each prompt's prefix without gradients, extended by what all texts begin with.

        It is extended only where that saves time, and never by the last token of a text.
        """
        prefixes = [self.cached_prefix(each) for each in weights]
        shortest = min((len(ids) for ids in texts), default=0)
        shared_text_ids = common_start(texts)[: max(shortest - 1, 0)]
        if (len(texts) - 1) * len(shared_text_ids) < _MIN_TOKENS_SAVED:
            return prefixes
        return self.backend.extend(prefixes, shared_text_ids)


def _version(weights: Tensor) -> int:
    """Return how often a tensor was changed in place; a tensor made in inference mode does not count that."""
    return 0 if weights.is_inference() else weights._version
