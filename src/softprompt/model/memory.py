"""The prediction of memory: what a training step or an evaluation takes.

`measure` runs a few tokens on the loaded model and gives a `MemoryEstimate`; `micro_batch_tokens` chooses from it how
many text tokens run at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from softprompt.distributed.launch import local_world_size
from softprompt.model.backends.attention import MAX_LENGTH_RATIO, length_buckets
from softprompt.model.frozen import FrozenModel
from softprompt.model.lm_head import MAX_LOGITS

# Matrix products on a CPU reach their full rate at about a thousand rows; a GPU wants more.
_USEFUL_ON_CPU, _USEFUL_ON_GPU = 1024, 8192
_SHARE = 0.5  # of the available memory: other programs need some
_LONGEST_MEASURED = 32  # tokens
# Bytes that glibc's allocator holds per byte requested, except for large tensors, which get pages of their own:
# benchmarks/results/memory.md.
ALLOCATOR = 1.5


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of a micro-batch, after one prefix or several.

    A layer takes about twice the bytes that it saves, while it runs and while its gradients are computed.

    For n texts of t tokens whose attention is computed together, the bytes saved for the backward pass are a sum of
    terms in t·(P + t), t and 1, plus n times another such sum; the factors are measured.

    Attributes:
        prefix_length: P, the length of the prefix, the longest where there are several.
        factors: bytes, in the order of the terms.
        prompt: bytes of the prompt's own pass, its prefix and the prefix's gradients, until the step's end.
        width: bytes of one position's hidden state.
        logit: bytes of one logit while its gradient is computed.
        max_length_ratio: the largest ratio of lengths of texts whose attention is computed together.
        cached: bytes of a position in the cache of all layers, 0 where the backend has none.
        activation_checkpointing: whether the layers run again in the backward pass.
        prefixes: how many different prefixes the micro-batch has; one is measured.
    """

    prefix_length: int
    factors: tuple[float, ...]
    prompt: float
    layers: int
    width: int
    logit: float
    vocabulary: int
    max_length_ratio: float = MAX_LENGTH_RATIO
    cached: float = 0.0
    activation_checkpointing: bool = False
    prefixes: int = 1

    def step(self, lengths: Sequence[int], targets: float) -> float:
        """Predict the bytes of a step's micro-batch.

        Args:
            lengths: tokens of each text after the prefix, in their order.
            targets: target tokens of all of them.
        """
        constant = self.prefixes * self.prompt + targets * self.width
        layer = self.saved(lengths) / self.layers
        if self.activation_checkpointing:  # a whole layer at a time; the allocator has no holes (`trim_allocator`)
            return constant + self._inputs(lengths) + max(3 * layer, self._logits(targets))
        return ALLOCATOR * constant + self._allocated(lengths) + max(ALLOCATOR * 2 * layer, self._logits(targets))

    def scoring(self, lengths: Sequence[int], targets: float) -> float:
        """Predict the bytes of some texts where nothing is saved for a backward pass."""
        layer = 2 * self.saved(lengths) / self.layers
        constant = self.prefixes * self.prompt + self.cached * len(lengths) * (self.prefix_length + max(lengths))
        return ALLOCATOR * constant + max(ALLOCATOR * layer, self._logits(targets))

    def saved(self, lengths: Sequence[int]) -> float:
        """Return the bytes that are saved for the backward pass."""
        sizes = self._buckets(lengths)
        return float(sum(np.dot(self.factors, _terms(count, longest, self.prefix_length)) for count, longest in sizes))

    def _allocated(self, lengths: Sequence[int]) -> float:
        """Return the bytes that the process holds for what is saved; masks are large: they get pages of their own."""
        masks = self.factors[0] * sum(longest * (self.prefix_length + longest) for _, longest in self._buckets(lengths))
        return masks + ALLOCATOR * (self.saved(lengths) - masks)

    def _buckets(self, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """Return, for texts whose attention is computed together, their number and the length of the longest.

        Behind several prefixes, each text may have a mask of its own, as long as a similar text's.
        """
        if self.prefixes > 1:
            longest = max(lengths)
            return [(1, int(min(longest, self.max_length_ratio * length))) for length in lengths]
        buckets = length_buckets(lengths, [self.prefix_length] * len(lengths), self.max_length_ratio)
        return [(end - begin, max(lengths[begin:end])) for begin, end in buckets]

    def _inputs(self, lengths: Sequence[int]) -> float:
        """Return the bytes of all layers' inputs, and of the masks that the layers share."""
        masks = 4.0 * sum(longest * (self.prefix_length + longest) for _, longest in self._buckets(lengths))
        return self.layers * sum(lengths) * self.width + masks

    def _logits(self, rows: float) -> float:
        """Return the bytes of so many rows of logits, which are computed in chunks."""
        return self.logit * min(rows * self.vocabulary, max(MAX_LOGITS, self.vocabulary))


def _terms(count: int, length: int, prefix_length: int) -> list[int]:
    """Return the terms that memory is linear in: scores, tokens and 1, of all texts together and of each."""
    shared = [length * (prefix_length + length), length, 1]
    return [*shared, *(count * term for term in shared)]


def measure(model: FrozenModel, prefix_length: int) -> MemoryEstimate:
    """Run a few tokens on the loaded model and count the bytes that autograd saves for the backward pass.

    It counts the tensors' storages without the model's own and the prefix's: the same on every device, and independent
    of other programs.
    """
    longest, most = _LONGEST_MEASURED, model.context_length
    if most is not None:  # a prompt that takes nearly all positions is measured a little shorter
        longest = min(longest, most // 2)
        prefix_length = min(prefix_length, most - longest)
    measured = [(count, length) for count in (2, 3) for length in (2, max(3, longest // 4), longest)]
    own = [*model.hf_model.parameters(), *model.hf_model.buffers()]
    prompt = model.embed([0] * max(1, prefix_length)).float().requires_grad_()
    with torch.enable_grad():
        with _count_saved(own) as saved:
            leaves = model.prefix(prompt).leaves()
        # A prefix is in memory twice, once detached from the graph, and has a gradient.
        prefix = [*leaves.keys, *leaves.values]
        prompt_bytes = sum(saved.values()) + 2.0 * sum(tensor.nbytes for tensor in prefix)
        totals = []
        for count, length in measured:
            with _count_saved([*own, *prefix]) as saved:
                text = torch.zeros(length, dtype=torch.long)
                hidden = model.backend.text_pass(
                    leaves, [text] * count, output_positions=[torch.tensor([length - 1])] * count
                ).hidden
            totals.append(sum(saved.values()))
        with _count_saved(own) as saved:
            logits = model.backend.lm_head.logits(hidden[:1].detach().requires_grad_())
    terms = [_terms(count, length, leaves.length) for count, length in measured]
    factors = np.linalg.solve(np.array(terms), np.array(totals, dtype=float)).clip(min=0)
    config = model.hf_model.config.get_text_config()
    return MemoryEstimate(
        prefix_length=leaves.length,
        factors=tuple(factors.tolist()),
        prompt=prompt_bytes,
        layers=int(config.num_hidden_layers),
        width=int(config.hidden_size) * hidden.element_size(),
        # Three copies in float32, and what soft-capping saves, with its gradient.
        logit=3 * 4 + 2 * sum(saved.values()) / logits.numel(),
        vocabulary=logits.shape[-1],
        max_length_ratio=model.backend.max_length_ratio,
        cached=sum(t.numel() for t in prefix) / leaves.length * hidden.element_size() if model.backend.pads else 0.0,
    )


@contextmanager
def _count_saved(own: Sequence[Tensor]) -> Iterator[dict[int, int]]:
    """Give the bytes of each storage that is saved for the backward pass, without tensors that exist anyway."""
    existing = {tensor.untyped_storage().data_ptr() for tensor in own}
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in existing:
            saved[storage.data_ptr()] = storage.nbytes()  # all of it for a view
        return tensor.detach()  # an operation's own result would refer to the operation, and neither would be freed

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        yield saved


def micro_batch_tokens(
    model: FrozenModel,
    memory_estimate: MemoryEstimate,
    shortest: int,
    longest: int,
    target_share: float,
    scoring: bool = False,
) -> int:
    """Predict how many text tokens fit at once in half of the available memory.

    Args:
        shortest, longest: tokens of a text; many short texts take memory for their prefixes, long ones for scores.
        target_share: target tokens per token; each takes a row of logits for a while.
        scoring: nothing is saved for a backward pass.
    """
    on_cpu = model.device.type == "cpu"
    free = model.free_memory() * _SHARE / (local_world_size() if on_cpu else 1)
    needed = memory_estimate.scoring if scoring else memory_estimate.step

    def fits(tokens: int) -> bool:
        lengths = [[min(each, tokens)] * max(1, tokens // each) for each in (shortest, longest)]
        return max(needed(texts, sum(texts) * target_share) for texts in lengths) <= free

    most = _USEFUL_ON_CPU if on_cpu else _USEFUL_ON_GPU
    return max(1, bisect_left(range(1, most + 1), True, key=lambda tokens: not fits(tokens)))
