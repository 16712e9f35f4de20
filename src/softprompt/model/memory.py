"""How many tokens can be run at once, predicted from the memory that is free."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from softprompt.launch import local_count
from softprompt.model.frozen import FrozenModel
from softprompt.model.head import LOGITS_AT_ONCE

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# Matrix products on a CPU reach their full rate at about a thousand rows; a GPU wants more.
_USEFUL_TOKENS = {"cpu": 1024}
_USEFUL_ON_GPU = 8192
_SHARE = 0.5  # of the free memory: the prediction is rough, and other programs want some


def micro_batch_tokens(model: FrozenModel, virtual_tokens: int, longest: int, target_share: float) -> int:
    """Predict how many text tokens of a step can be run at once.

    Args:
        model: the frozen model.
        virtual_tokens: P, for the attention scores.
        longest: tokens of the longest example.
        target_share: target tokens per token; each takes a row of logits for a while.
    """
    free = available_memory(model.device) * _SHARE / (local_count() if model.device.type == "cpu" else 1)
    useful = _USEFUL_TOKENS.get(model.device.type, _USEFUL_ON_GPU)
    each, logits = bytes_per_token(model, virtual_tokens, longest), logits_bytes(model, useful * target_share)
    # Few tokens have few logits; of many tokens only a piece of the logits is held.
    fitting = max(free / (each + logits_bytes(model, 1) * target_share), (free - logits) / each)
    return max(1, min(int(fitting), useful))


def bytes_per_token(model: FrozenModel, virtual_tokens: int, longest: int) -> float:
    """Estimate what one text token keeps in memory until its backward pass is done."""
    config = model.hf_model.config.get_text_config()
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    # Factors measured on SmolLM2-135M, packed, texts of 30 to 500 tokens: they predict 1.0 to 1.3 of the peak.
    scores = config.num_attention_heads * (virtual_tokens + longest)
    per_layer = 6 * width + 4 * inner + scores
    size = torch.finfo(model.hf_model.dtype).bits // 8
    return float(config.num_hidden_layers * per_layer * size)


def logits_bytes(model: FrozenModel, rows: float) -> float:
    """Estimate what the logits of some positions, their softmax and its gradient take at most, all in float32."""
    vocabulary = int(model.hf_model.config.get_text_config().vocab_size)
    return 4.0 * 4 * min(rows * vocabulary, max(LOGITS_AT_ONCE, vocabulary))


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out: on the CPU, PyTorch raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def available_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device; a container's and a shell's limits count."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    free = psutil.virtual_memory().available
    if resource is not None:
        allowed = resource.getrlimit(resource.RLIMIT_AS)[0]  # ulimit -v
        if allowed != resource.RLIM_INFINITY:
            free = min(free, allowed - psutil.Process().memory_info().vms)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such control group, or "max": no limit
            continue
    return max(free, 0)
