"""Parameterizations: what the optimizer changes in place of the prompt itself; folded into it when it is saved."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import GELU, LayerNorm, Linear, Module, Parameter, Sequential

from softprompt.config import Parameterization

_BOTTLENECK = 256


class Direct(Module):
    """The prompt as it is.

    Args:
        start: `[P, H]`, or of a deep prefix `[L, 2, K, P, D]`.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.prompt = Parameter(start.clone())

    def forward(self) -> Tensor:
        """Return the prompt, of the start's shape."""
        return self.prompt


class Residual(Module):
    """A bottleneck network shared by all virtual tokens, added to them (Razdaibiedina et al. 2023).

    Its last layer is zero at first, so that the prompt starts where it would start without.

    Args:
        start: `[P, H]`.
        seed: of the first layer.
    """

    def __init__(self, start: Tensor, seed: int) -> None:
        super().__init__()
        width = start.shape[-1]
        self.prompt = Parameter(start.clone())
        down, up = Linear(width, _BOTTLENECK), Linear(_BOTTLENECK, width)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            down.weight.copy_(torch.randn(down.weight.shape, generator=generator) / width**0.5)
            for tensor in (down.bias, up.weight, up.bias):
                tensor.zero_()
        self.network = Sequential(LayerNorm(width), down, GELU(), up)

    def forward(self) -> Tensor:
        """Return the prompt, `[P, H]`."""
        added: Tensor = self.network(self.prompt)
        return self.prompt + added


def parameterize(start: Tensor, parameterization: Parameterization, seed: int) -> Direct | Residual:
    """Return what is learned in place of a prompt that starts at `start`."""
    return Direct(start) if parameterization == "direct" else Residual(start, seed)
