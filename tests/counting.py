"""What a pass through a model costs: positions, logits, tensors and bytes, counted while it runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from softprompt.model.frozen import FrozenModel


class Work:
    """What went through a model: the positions of each pass through its layers, and rows of logits."""

    def __init__(self) -> None:
        self.passes: list[int] = []
        self.logits = 0


@contextmanager
def counted(model: FrozenModel) -> Iterator[Work]:
    work = Work()
    layers = [module for module in model.hf_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    each: list[list[int]] = [[] for _ in layers]

    def ran(index: int) -> Any:
        return lambda _module, args: each[index].append(args[0].shape[0] * args[0].shape[1])

    def projected(_module: object, _args: object, out: torch.Tensor) -> None:
        work.logits += out.numel() // out.shape[-1]

    handles = [layer.register_forward_pre_hook(ran(i)) for i, layer in enumerate(layers)]
    handles.append(model.hf_model.get_output_embeddings().register_forward_hook(projected))
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()
    assert len(each) == model.hf_model.config.num_hidden_layers
    assert all(passes == each[0] for passes in each)
    work.passes = each[0]


class LargestTensor(TorchDispatchMode):
    """Notes the most numbers that a tensor made while it is on holds; the model's own tensors are not made."""

    def __init__(self, model: FrozenModel) -> None:
        super().__init__()
        own = [*model.hf_model.parameters(), *model.hf_model.buffers()]
        self.own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in self.own:
                self.most = max(self.most, each.numel())
        return out


def saved_bytes(
    model: FrozenModel, prefix_length: int, lengths: list[int], activation_checkpointing: bool = False
) -> int:
    """Count the bytes that autograd saves of a pass of some texts."""
    prefix = model.prefix(torch.randn(prefix_length, model.embedding_width)).leaves()
    there = [*model.hf_model.parameters(), *model.hf_model.buffers(), *prefix.keys, *prefix.values]
    known = {tensor.untyped_storage().data_ptr() for tensor in there}
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    texts = [torch.arange(length) + 5 for length in lengths]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        wanted = [torch.tensor([length - 1]) for length in lengths]
        done = model.backend.text_pass(prefix, texts, wanted, activation_checkpointing=activation_checkpointing)
    assert done.hidden.requires_grad
    return sum(size for place, size in sizes.items() if place not in known)


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors that are made while it is on, and notes the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given | self.sizes.keys():
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.gone, storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
        return out

    def gone(self, place: int) -> None:
        self.now -= self.sizes.pop(place)
