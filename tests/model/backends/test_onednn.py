"""Products in oneDNN, on every processor that has it: the same results, and only where they are exact."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from softprompt.data.example import Example
from softprompt.model.backends import onednn
from softprompt.model.gradient import prompt_gradient
from tiny_models import ARCHITECTURES, frozen

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
EXAMPLES = [Example((5, 6, 7, 8, 9, 10, 11), 5), Example((12, 13, 14), 2)]


class Called(TorchDispatchMode):
    """Counts the products of two matrices, by library."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_onednn_gives_the_gradient_that_pytorchs_own_choice_gives(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = frozen(architecture)
    prompt = model.embed(range(20, 24)).float()
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: False)
    with Called() as plain:
        loss, gradient = prompt_gradient(model, prompt, (), [EXAMPLES[:1], EXAMPLES[1:]])
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: True)
    with Called() as fast:
        other, found = prompt_gradient(model, prompt, (), [EXAMPLES[:1], EXAMPLES[1:]])
    assert other == pytest.approx(loss, rel=1e-5)
    assert float((found - gradient).norm() / gradient.norm()) < 1e-4
    assert plain.counts["_linear_pointwise"] == 0
    assert fast.counts["_linear_pointwise"] > 0
    # What is left are products of two activations (attention), and of experts.
    assert fast.counts["addmm"] == fast.counts["linear"] == 0


def test_weights_that_are_trained_or_in_half_precision_stay_with_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: True)
    inputs, trained = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    with onednn.faster_matmuls(), Called() as called:
        linear(inputs, trained).sum().backward()
        linear(inputs.bfloat16(), trained.detach().bfloat16())
    assert called.counts["_linear_pointwise"] == 0
    assert trained.grad is not None


@pytest.mark.parametrize("bias", [True, False])
def test_inputs_of_any_shape_and_stride_give_what_linear_gives(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: True)
    weight, offset = torch.randn(6, 4), torch.randn(6) if bias else None
    for inputs in (torch.randn(4), torch.randn(0, 4), torch.randn(2, 3, 4), torch.randn(4, 7).t()):
        grads = []
        for context in (onednn.faster_matmuls(), torch.enable_grad()):
            given = inputs.clone().requires_grad_()
            with context:
                out = linear(given, weight, offset)
            out.pow(2).sum().backward()
            grads.append((out.detach(), given.grad))
        torch.testing.assert_close(grads[0], grads[1])
