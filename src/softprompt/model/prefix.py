"""The prefix: what a prompt becomes before the model reads text.

A prefix is computed by `FrozenModel.prefix` (model/frozen.py) through `Backend.prefix` (model/backends/base.py).
Scoring and generation take it from `FrozenModel.shared_prefixes`, which caches it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from softprompt.errors import ModelError


def is_prefix(weights: Tensor) -> bool:
    """Tell a learned prefix `[L, 2, K, P, D]` from a soft prompt `[P, H]`; in both, P is the last axis but one."""
    return weights.dim() == 5


@dataclass(frozen=True)
class Prefix:
    """Keys and values, at every layer, of the positions before the text.

    Attributes:
        keys: per layer `[1, K, P, D]`, after any rotary embedding.
        values: per layer `[1, K, P, D]`.
        last: `[1, H]`, the output head's input at the last position; it predicts the first text token.
            None where the prefix is empty.
        length: P, the number of positions: virtual tokens, then `shared_text_ids`.
        shared_text_ids: token ids of the text that is part of the prefix.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    last: Tensor | None = None
    length: int = 0
    shared_text_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, weights: Tensor) -> Prefix:
        """Return the prefix whose keys and values are the weights `[L, 2, K, P, D]` (Li and Liang 2021).

        There is no output at its positions, so nothing predicts the first text token after it.
        """
        keys, values = weights.unsqueeze(2).unbind(1)
        return cls(keys=list(keys), values=list(values), length=weights.shape[-2])

    def stacked(self) -> Tensor:
        """Return all keys and values in one tensor, `[L, 2, K, P, D]`, float32, on the CPU.

        Raises:
            ModelError: the layers differ in the number or the size of their keys and values.
        """
        tensors = [tensor[0].float().cpu() for pair in zip(self.keys, self.values, strict=True) for tensor in pair]
        if len({tensor.shape for tensor in tensors}) != 1:
            raise ModelError(
                "prefix tuning needs layers with equally many keys and values of one size, which this model's are "
                "not: use method=prompt-tuning"
            )
        stacked: Tensor = torch.stack(tensors).unflatten(0, (-1, 2))
        return stacked

    def extended(self, keys: list[Tensor], values: list[Tensor], last: Tensor, text_ids: Tensor) -> Prefix:
        """Return this prefix with a text added, from the keys and values of both."""
        ids = (*self.shared_text_ids, *text_ids.tolist())
        return Prefix(keys, values, last, self.length + len(text_ids), ids)

    def _tensors(self) -> list[Tensor]:
        last = [] if self.last is None else [self.last]
        return [*self.keys, *self.values, *last]

    def leaves(self) -> Prefix:
        """Return a detached copy in float32, whose tensors accumulate gradients of their own."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().float().requires_grad_()

        last = None if self.last is None else leaf(self.last)
        return replace(self, keys=[leaf(k) for k in self.keys], values=[leaf(v) for v in self.values], last=last)

    def backward(self, leaves: Prefix) -> None:
        """Continue the backward pass from the gradients of `leaves` to what this prefix was computed from."""
        pairs = [
            (tensor, leaf.grad.to(tensor.dtype))
            for tensor, leaf in zip(self._tensors(), leaves._tensors(), strict=True)
            if leaf.grad is not None and tensor.requires_grad
        ]
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
