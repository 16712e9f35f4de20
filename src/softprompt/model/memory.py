"""How much memory a step takes, predicted from what the loaded model keeps of a few tokens, and what is free."""

from __future__ import annotations

import ctypes
import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from softprompt.distributed.launch import local_world_size
from softprompt.model.backends.attention import MAX_LENGTH_RATIO, length_buckets
from softprompt.model.frozen import FrozenModel
from softprompt.model.lm_head import LOGITS_AT_ONCE

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# Matrix products on a CPU reach their full rate at about a thousand rows; a GPU wants more.
_USEFUL_ON_CPU, _USEFUL_ON_GPU = 1024, 8192
_SHARE = 0.5  # of the free memory: other programs want some
_TRIED = 32  # tokens of the longest text that is run to see what it keeps
# What glibc's allocator comes to hold for every byte that is asked of it, but for large tensors, which get pages of
# their own: benchmarks/results/memory.md.
_ALLOCATOR = 1.5
_M_MMAP_THRESHOLD, _LARGE = -3, 2**20


@dataclass(frozen=True)
class MemoryEstimate:
    """What a micro-batch takes in memory, behind one prefix or several.

    While a layer is run, or its gradients are found, it takes about twice what it keeps.

    Of n texts of t tokens whose attention is computed together, what is kept for the backward pass is a sum of terms
    in t·(P + t), t and 1, and n times as much of others; their factors are measured.

    Attributes:
        prefix_length: P, the length of the prefix, the longest where there are several.
        factors: bytes, in the order of the terms.
        prompt: bytes of the prompt's own pass, its prefix and the prefix's gradients: they stay until the step's end.
        layers: how many layers the model has.
        width: bytes of one position between two layers.
        logit: bytes that one logit takes while its gradient is found.
        vocabulary: V.
        pads: whether the way pads a micro-batch's texts to its longest.
        max_length_ratio: how unlike in length texts may be whose attention is computed together, where it does not.
        cached: bytes that a position takes in the cache of all layers, 0 where the way has none.
        activation_checkpointing: whether the layers run again in the backward pass.
        prefixes: how many different ones stand before a micro-batch's texts; measured is one.
    """

    prefix_length: int
    factors: tuple[float, ...]
    prompt: float
    layers: int
    width: int
    logit: float
    vocabulary: int
    pads: bool
    max_length_ratio: float = MAX_LENGTH_RATIO
    cached: float = 0.0
    activation_checkpointing: bool = False
    prefixes: int = 1

    def step(self, lengths: Sequence[int], targets: float) -> float:
        """Predict the bytes of a step's micro-batch.

        Args:
            lengths: tokens of each text behind the prefix, in their order.
            targets: target tokens of all of them.
        """
        stays, layer = self.prefixes * self.prompt + targets * self.width, self.kept(lengths) / self.layers
        if (
            self.activation_checkpointing
        ):  # a layer is there as a whole when its gradients are found; nothing is lost (`trim_allocator`)
            return stays + self._inputs(lengths) + max(3 * layer, self._logits(targets))
        return _ALLOCATOR * stays + self._held(lengths) + max(_ALLOCATOR * 2 * layer, self._logits(targets))

    def scoring(self, lengths: Sequence[int], targets: float) -> float:
        """Predict the bytes that some texts take where nothing is kept for a backward pass."""
        layer = 2 * self.kept(lengths) / self.layers
        stays = self.prefixes * self.prompt + self.cached * len(lengths) * (self.prefix_length + max(lengths))
        return _ALLOCATOR * stays + max(_ALLOCATOR * layer, self._logits(targets))

    def kept(self, lengths: Sequence[int]) -> float:
        """Return the bytes that are kept for the backward pass."""
        sizes = self._groups(lengths)
        return float(sum(np.dot(self.factors, _terms(count, longest, self.prefix_length)) for count, longest in sizes))

    def _held(self, lengths: Sequence[int]) -> float:
        """Return what the process comes to hold for what is kept; masks are large enough for pages of their own."""
        masks = self.factors[0] * sum(longest * (self.prefix_length + longest) for _, longest in self._groups(lengths))
        return masks + _ALLOCATOR * (self.kept(lengths) - masks)

    def _groups(self, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """Return how many texts have their attention computed together, and the length of the longest of them.

        Behind several prefixes a text may have a mask of its own, and stand beside any other that is like it.
        """
        if self.prefixes > 1:
            longest = max(lengths)
            return [
                (1, longest if self.pads else min(longest, int(self.max_length_ratio * length))) for length in lengths
            ]
        groups = (
            [(0, len(lengths))]
            if self.pads
            else length_buckets(lengths, [self.prefix_length] * len(lengths), self.max_length_ratio)
        )
        return [(end - begin, max(lengths[begin:end])) for begin, end in groups]

    def _inputs(self, lengths: Sequence[int]) -> float:
        """Return the bytes of all layers' inputs, and of the masks that the layers share."""
        masks = 4.0 * sum(longest * (self.prefix_length + longest) for _, longest in self._groups(lengths))
        return self.layers * sum(lengths) * self.width + masks

    def _logits(self, rows: float) -> float:
        """Return the bytes of so many rows of logits; a piece is held at a time."""
        return self.logit * min(rows * self.vocabulary, max(LOGITS_AT_ONCE, self.vocabulary))


def _terms(count: int, length: int, prefix_length: int) -> list[int]:
    """Return what memory grows with: scores, tokens and nothing, of all texts together and of each."""
    shared = [length * (prefix_length + length), length, 1]
    return [*shared, *(count * term for term in shared)]


def measure(model: FrozenModel, prefix_length: int) -> MemoryEstimate:
    """Run a few tokens on the loaded model and count the bytes that autograd keeps for the backward pass.

    What is counted are the tensors' storages, the model's own and the prefix's left out, so it is the same on every
    device and not disturbed by other programs.

    Args:
        model: the frozen model.
        prefix_length: P, the positions that stand before the texts.
    """
    longest, most = _TRIED, model.context_length
    if most is not None:  # where the prompt takes nearly all positions, it is measured a little shorter
        longest = min(longest, most // 2)
        prefix_length = min(prefix_length, most - longest)
    tried = [(count, length) for count in (2, 3) for length in (2, max(3, longest // 4), longest)]
    own = [*model.hf_model.parameters(), *model.hf_model.buffers()]
    prompt = model.embed([0] * max(1, prefix_length)).float().requires_grad_()
    with torch.enable_grad():
        with _counted(own) as kept:
            leaves = model.prefix(prompt).leaves()
        # A prefix is there twice, the second time cut off from the graph, and has a gradient.
        prefix = [*leaves.keys, *leaves.values]
        of_prompt = kept.total + 2.0 * sum(tensor.nbytes for tensor in prefix)
        seen = []
        for count, length in tried:
            with _counted([*own, *prefix]) as kept:
                text = torch.zeros(length, dtype=torch.long)
                hidden = model.backend.text_pass(leaves, [text] * count, [torch.tensor([length - 1])] * count).hidden
            seen.append(kept.total)
        with _counted(own) as kept:
            logits = model.backend.lm_head.logits(hidden[:1].detach().requires_grad_())
    terms = [_terms(count, length, leaves.length) for count, length in tried]
    factors = np.linalg.solve(np.array(terms), np.array(seen, dtype=float)).clip(min=0)
    config = model.hf_model.config.get_text_config()
    return MemoryEstimate(
        prefix_length=leaves.length,
        factors=tuple(factors.tolist()),
        prompt=of_prompt,
        layers=int(config.num_hidden_layers),
        width=int(config.hidden_size) * hidden.element_size(),
        # Three copies in float32, and what soft-capping keeps, with its gradient.
        logit=3 * 4 + 2 * kept.total / logits.numel(),
        vocabulary=logits.shape[-1],
        pads=model.backend.pads,
        max_length_ratio=model.backend.max_length_ratio,
        cached=sum(t.numel() for t in prefix) / leaves.length * hidden.element_size() if model.backend.pads else 0.0,
    )


class _Kept:
    """Bytes of the storages that autograd was seen to keep."""

    def __init__(self, own: Sequence[Tensor]) -> None:
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._sizes: dict[int, int] = {}

    def note(self, tensor: Tensor) -> Tensor:
        """Note a tensor; what it is a view of is kept whole.

        Returns:
            What is to be kept instead: an operation's own result would hold the operation, and neither was ever freed.
        """
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    @property
    def total(self) -> int:
        return sum(self._sizes.values())


@contextmanager
def _counted(own: Sequence[Tensor]) -> Iterator[_Kept]:
    """Count what is kept for the backward pass, without what is there anyway."""
    kept = _Kept(own)
    with torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor):
        yield kept


def micro_batch_tokens(
    device: torch.device,
    memory_estimate: MemoryEstimate,
    shortest: int,
    longest: int,
    target_share: float,
    scoring: bool = False,
) -> int:
    """Predict how many text tokens can be run at once in half of the free memory.

    Args:
        device: where the model is.
        memory_estimate: what they take.
        shortest, longest: tokens of a text: many short ones have a prefix each, long ones many scores.
        target_share: target tokens per token; each takes a row of logits for a while.
        scoring: nothing is kept for a backward pass.
    """
    free = available_memory(device) * _SHARE / (local_world_size() if device.type == "cpu" else 1)
    needed = memory_estimate.scoring if scoring else memory_estimate.step

    def fits(tokens: int) -> bool:
        lengths = [[min(each, tokens)] * max(1, tokens // each) for each in (shortest, longest)]
        return max(needed(texts, sum(texts) * target_share) for texts in lengths) <= free

    most = _USEFUL_ON_CPU if device.type == "cpu" else _USEFUL_ON_GPU
    return max(1, bisect_left(range(1, most + 1), True, key=lambda tokens: not fits(tokens)))


def available_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device; a container's and a shell's limits count."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # what PyTorch keeps
    free = psutil.virtual_memory().available
    if resource is not None:
        allowed = resource.getrlimit(resource.RLIMIT_AS)[0]  # ulimit -v
        if allowed != resource.RLIM_INFINITY:
            free = min(free, allowed - psutil.Process().memory_info().vms)
    for folder, limit, used, total in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", ""),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            allowed, held = (int(Path(folder, name).read_text()) for name in (limit, used))
            found = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such control group, or "max": no limit
            continue
        # Files that were read stay in memory until something else needs the room.
        cached = sum(int(found.get(f"{total}{kind}_file", 0)) for kind in ("active", "inactive"))
        free = min(free, allowed - held + cached)
    return max(free, 0)


def trim_allocator() -> None:
    """Have glibc return freed memory to the system, now and from now on, where it keeps holes between tensors.

    With pages of their own, freed large tensors leave none; that their pages are made anew each time costs some time.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):  # other C libraries have none
            library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
            library.malloc_trim(0)
