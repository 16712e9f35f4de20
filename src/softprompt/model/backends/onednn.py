"""Matrix products with frozen weights, in the faster of the two libraries that PyTorch brings for CPUs.

PyTorch multiplies float32 matrices with Intel's MKL. On AMD's processors MKL leaves AVX-512 unused; oneDNN, which
PyTorch takes for half precision, does not: 500 instead of 220 GFLOP/s on two cores of a Zen 5. The results differ by
rounding only.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from softprompt.private_interfaces import onednn_product


def faster_matmuls() -> AbstractContextManager[object]:
    """Return a context in which a model's matrix products run in oneDNN where that is the faster library."""
    return _OneDNN() if mkl_is_slow() and onednn_product() is not None else nullcontext()


class _OneDNN(TorchFunctionMode):
    """Replaces `linear`, and the `addmm` that GPT-2's layers call."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is linear and not kwargs and _is_replaceable(args[0], args[1]):
            return _Linear.apply(*args)  # type: ignore[no-untyped-call]
        if func is torch.addmm and not kwargs and _is_replaceable(args[1], args[2]):
            return _Linear.apply(args[1], args[2].t(), args[0])  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


def _is_replaceable(inputs: Tensor, weight: Tensor) -> bool:
    """Tell whether a product is in float32 on a CPU, with a weight that takes no gradient."""
    frozen = weight.dtype == inputs.dtype == torch.float32 and weight.device.type == "cpu" and not weight.requires_grad
    return frozen and weight.layout == torch.strided


@cache
def mkl_is_slow() -> bool:
    """Tell whether this is an AMD processor with AVX-512, and both libraries are there."""
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not libraries or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        processor = platform.processor()
    return "AuthenticAMD" in processor


class _Linear(torch.autograd.Function):
    """A product with a frozen weight `[out, in]`: only the inputs take a gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.weight = weight
        return _product(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _product(grad, ctx.weight.t()), None, None


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = onednn_product()
    assert product is not None
    return product(inputs.contiguous(), weight, bias)
