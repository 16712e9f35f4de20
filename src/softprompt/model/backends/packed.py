"""The packed backend: the tokens of a micro-batch lie in one row, without padding.

transformers lets a caller plug in the attention of nearly all of today's models (`AttentionInterface`); ours keeps
the texts apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, GradientCheckpointingLayer, PreTrainedModel

from softprompt.model.backends.attention import (
    MAX_LENGTH_RATIO,
    MAX_LENGTH_RATIO_ON_GPU,
    PackedBatch,
    attention,
    current_batch,
)
from softprompt.model.backends.base import Backend, TextPass, gather_hidden
from softprompt.model.backends.bloom import bloom_attention
from softprompt.model.backends.prefix_batch import broadcast_prefix
from softprompt.model.lm_head import replaced
from softprompt.model.prefix import Prefix
from softprompt.private_interfaces import input_device

ATTENTION = "softprompt_packed"
# Attention modules that are not pluggable, and what replaces their forward methods.
REPLACEMENTS = {"BloomAttention": bloom_attention}


def _no_mask(*_args: Any, local_size: int | None = None, **_kwargs: Any) -> Tensor | None:
    """Build no mask: the attention function has the positions and the texts' boundaries.

    Some models give their window to the mask function alone; it is passed on as the mask.
    """
    return None if local_size is None else torch.tensor(local_size)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


class PackedBackend(Backend):
    """For models on transformers' pluggable attention."""

    name = "packed"
    pads = False
    can_fuse = True

    def __init__(self, hf_model: PreTrainedModel, shares_cache: bool = True) -> None:
        super().__init__(hf_model, shares_cache)
        self._replacements = [
            (module, partial(REPLACEMENTS[type(module).__name__], module))
            for module in hf_model.modules()
            if type(module).__name__ in REPLACEMENTS
        ]
        self._layers = [module for module in hf_model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.can_checkpoint = bool(self._layers)
        self.max_length_ratio = MAX_LENGTH_RATIO if input_device(hf_model).type == "cpu" else MAX_LENGTH_RATIO_ON_GPU

    @contextmanager
    def _running(self, batch: PackedBatch) -> Iterator[None]:
        config = self.hf_model.config
        with self.running(), ExitStack() as stack:
            for module, forward in self._replacements:
                stack.enter_context(replaced(module, forward))
            before = config._attn_implementation
            token = current_batch.set(batch)
            config._attn_implementation = ATTENTION
            try:
                yield
            finally:
                config._attn_implementation = before
                current_batch.reset(token)

    @contextmanager
    def _checkpointed(self, batch: PackedBatch) -> Iterator[None]:
        """Keep each layer's inputs alone, and run it again in the backward pass (Chen et al. 2016).

        transformers' own checkpointing acts in training mode only. The second run is outside of the text's pass, on a
        GPU in another thread: it takes the lock and switches the attention itself.
        """

        def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with self._running(batch):
                return forward(*args, **kwargs)

        with ExitStack() as stack:
            for layer in self._layers:
                # In eval mode nothing is random, so there is no random state to preserve.
                forward = partial(run, layer.forward)
                twice = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
                stack.enter_context(replaced(layer, twice))
            yield

    def _hidden(self, batch: PackedBatch, activation_checkpointing: bool = False, **inputs: Tensor) -> Tensor:
        """Run a packed row and return the output head's input at all positions, `[1, N, H]`."""
        captured: list[Tensor] = []
        positions = batch.positions().to(input_device(self.hf_model))
        checkpointed = self._checkpointed(batch) if activation_checkpointing else nullcontext()
        with self._running(batch), self.lm_head.skipped(captured.append), checkpointed:
            self.hf_model(**inputs, position_ids=positions, use_cache=False)
        return captured[0]

    def prompt_pass(self, embeddings: Tensor) -> Prefix:
        length = embeddings.shape[1]
        batch = PackedBatch([Prefix()], [length], record_states=True)
        hidden = self._hidden(batch, inputs_embeds=embeddings)
        return Prefix(keys=batch.recorded(0), values=batch.recorded(1), last=hidden[0, -1:], length=length)

    def text_pass(
        self,
        prefix: Prefix | Sequence[Prefix],
        texts: Sequence[Tensor],
        output_positions: Sequence[Tensor],
        parents: Sequence[Tensor] | None = None,
        extend: bool = False,
        activation_checkpointing: bool = False,
    ) -> TextPass:
        lengths, starts = _lengths_and_starts(texts)
        prefixes = broadcast_prefix(prefix, len(texts))
        batch = PackedBatch(prefixes, lengths, parents, record_states=extend, max_length_ratio=self.max_length_ratio)
        ids = torch.cat(list(texts)).unsqueeze(0).to(input_device(self.hf_model))
        hidden = self._hidden(batch, activation_checkpointing, input_ids=ids)
        gathered = gather_hidden(hidden, starts, output_positions, prefixes)
        if not extend:
            return TextPass(gathered)
        extended = [
            _extended(own, batch, slice(s, s + t), hidden[0, s + t - 1 : s + t], text)
            for own, s, t, text in zip(prefixes, starts, lengths, texts, strict=True)
        ]
        return TextPass(gathered, extended)

    def fused_pass(
        self,
        embeddings: Tensor,
        texts: Sequence[Tensor],
        output_positions: Sequence[Tensor],
        activation_checkpointing: bool = False,
    ) -> Tensor:
        num_prompt_positions = embeddings.shape[1]
        lengths, starts = _lengths_and_starts(texts, num_prompt_positions)
        batch = PackedBatch(
            [Prefix(length=num_prompt_positions)] * len(texts),
            lengths,
            num_prompt_positions=num_prompt_positions,
            max_length_ratio=self.max_length_ratio,
        )
        ids = torch.cat(list(texts)).to(embeddings.device)
        embedded = torch.cat([embeddings, self.hf_model.get_input_embeddings()(ids).unsqueeze(0)], dim=1)
        hidden = self._hidden(batch, activation_checkpointing, inputs_embeds=embedded)
        prefix = Prefix(last=hidden[0, num_prompt_positions - 1 : num_prompt_positions])
        return gather_hidden(hidden, starts, output_positions, [prefix] * len(texts))


def _lengths_and_starts(texts: Sequence[Tensor], first: int = 0) -> tuple[list[int], list[int]]:
    """Return the length of each text, and the index of its first token in the row."""
    lengths = [len(text) for text in texts]
    return lengths, [first + sum(lengths[:i]) for i in range(len(lengths))]


def _extended(prefix: Prefix, batch: PackedBatch, where: slice, last: Tensor, text: Tensor) -> Prefix:
    def extend(before: list[Tensor], recorded: list[Tensor]) -> list[Tensor]:
        own = [states[:, :, where] for states in recorded]
        return [torch.cat([a.to(o.dtype), o], dim=2) for a, o in zip(before, own, strict=True)] if before else own

    keys, values = extend(prefix.keys, batch.recorded(0)), extend(prefix.values, batch.recorded(1))
    return prefix.extended(keys, values, last, text)
