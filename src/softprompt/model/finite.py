"""Numbers that are not finite: which weight has them, and what to do."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

_DAMAGED = "the checkpoint is damaged; fetch it again, or take another one"
_CURE = "try --set dtype=bfloat16 or dtype=float32"


def describe_non_finite(hf_model: PreTrainedModel) -> str:
    """Say why a model gives numbers that are not finite, and what helps. Reads all weights, which takes a while."""
    kind = str(hf_model.dtype).removeprefix("torch.")
    half = hf_model.dtype in (torch.float16, torch.bfloat16)
    for name, weight in hf_model.named_parameters():
        if not weight.is_floating_point() or weight.device.type == "meta":
            continue
        if bool(weight.isnan().any()):
            return f"its weight {name} holds NaN: {_DAMAGED}"
        if bool(weight.isinf().any()):
            return f"its weight {name} holds infinite values in {kind}: {_CURE if half else _DAMAGED}"
    cure = _CURE if half else "take another checkpoint, or another prompt"
    return f"its weights are finite, but what it computes goes beyond {kind}: {cure}"
