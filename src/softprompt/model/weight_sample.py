"""Some values of each of a model's weights, and whether two such samples are of the same weights.

A merged LoRA changes every value of a matrix by little. Whether a small difference is a change or rounding follows from
the values themselves: those that were rounded to bfloat16 (or float16) are all exact in that precision, and others
hardly ever are. So two samples in the same precision must be equal. Of two in different precisions, the finer one is
rounded as the coarser one was; then they must be equal. There is one exception: weights that were in float16 before
bfloat16 were rounded twice, and one value in 16 is one rounding step off, equally in every matrix. Where such a share
of all values is one step off, and none is further, the weights count as the same.

This detects, in the same precision, nearly every change that survives rounding. A merge that was saved in bfloat16 and
changed the weights by a thousandth of their size changes a fifth of the values: at least one of a matrix's 16 in 98 of
100 cases. Between precisions, it detects a change by more than half a rounding step (0.2 to 0.4 % of a value).
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

_OF_A_MATRIX, _OF_A_VECTOR, _OF_AN_EXPERT = 16, 4, 4
_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_RELATIVE = 1e-6  # float32 that was computed again, as from a GGUF file
_ABSOLUTE = 2.0**-24  # the smallest positive float16
_ROUNDED_TWICE = 1 / 64, 3 / 16  # of all values: 1 in 16 is expected
_HEAD = "head"


@torch.no_grad()
def sample_weights(model: PreTrainedModel) -> tuple[dict[str, str], int]:
    """Return some values of every weight, as base64 of float32, and how many weights could not be read.

    Those are quantized or offloaded. A head that is tied to the embedding is included under its own name too: a model
    with tied weights is the same as its untied copy.
    """
    every = list(model.named_parameters())
    named: list[tuple[str, Tensor]] = [(name, weight) for name, weight in every if _readable(weight)]
    skipped = len(every) - len(named)
    lm_head = getattr(model.get_output_embeddings(), "weight", None)
    if isinstance(lm_head, Tensor) and _readable(lm_head):
        tied = lm_head is getattr(model.get_input_embeddings(), "weight", None)
        named = [(name, weight) for name, weight in named if tied or weight is not lm_head]
        named.append((_HEAD, lm_head))
    values = [_sample(weight) for _, weight in named]
    gathered = _gather(values)
    sampled, first = {}, 0
    for (name, _), part in zip(named, values, strict=True):
        last = first + 4 * part.numel()
        sampled[name] = b64encode(gathered[first:last]).decode()
        first = last
    return sampled, skipped


def different_weights(before: Mapping[str, str], now: Mapping[str, str], complete: bool) -> list[str]:
    """Return the names of weights that are not the same.

    Args:
        before, now: what `sample_weights` gave.
        complete: no weight was left out on either side. Then a weight that one side lacks is a difference, unless both
            sides lack some: then another version of transformers renamed them.
    """
    if before == now:
        return []
    both = [name for name in before if name in now]
    found = [name for name in both if len(before[name]) != len(now[name])]
    alike = [name for name in both if len(before[name]) == len(now[name])]
    if any(before[name] != now[name] for name in alike):
        wrong = _unequal([before[name] for name in alike], [now[name] for name in alike])
        found += [name for name, differs in zip(alike, wrong, strict=True) if differs]
    gone, new = [n for n in before if n not in now], [n for n in now if n not in before]
    if complete and not (gone and new):
        found += gone or new
    return found


def _readable(weight: Tensor) -> bool:
    plain = type(weight) in (Parameter, Tensor) and weight.dtype in _PLAIN
    return plain and not weight.is_meta and bool(weight.numel())


def _sample(weight: Tensor) -> Tensor:
    """Return values spread over a weight, as a view: that takes a microsecond."""
    count, step = _spread(weight.shape)
    if weight.is_contiguous():
        return weight.as_strided((count,), (step,))
    return weight.flatten()[: count * step : step]


@cache
def _spread(shape: torch.Size) -> tuple[int, int]:
    """Return the number of values of a weight's sample, and their distance, such that rows give different columns."""
    wanted = _OF_A_VECTOR if len(shape) < 2 else _OF_A_MATRIX
    if len(shape) > 2:  # several matrices, one an expert
        wanted = max(wanted, _OF_AN_EXPERT * shape[0])
    size = shape.numel()
    # Odd, and no multiple of a row's width.
    return min(wanted, size), max((size * 36 // (37 * wanted) - 1) | 1, 1)


def _gather(values: Sequence[Tensor]) -> bytes:
    """Return values as float32, in one transfer where they are on one device."""
    if not values:
        return b""
    together = [torch.cat(list(values))] if len({part.device for part in values}) == 1 else values
    return b"".join(part.float().cpu().numpy().astype("<f4").tobytes() for part in together)


def _unequal(before: Sequence[str], now: Sequence[str]) -> list[bool]:
    """Tell of each weight whether its values are not the same, whatever precision either side is in."""
    a, counts = _rows(before)
    b, _ = _rows(now)
    bfloat16 = _is_exact(a, torch.bfloat16) | _is_exact(b, torch.bfloat16)
    float16 = (_is_exact(a, torch.float16) | _is_exact(b, torch.float16)) & ~bfloat16
    a, b = (torch.where(bfloat16, v.bfloat16().float(), torch.where(float16, v.half().float(), v)) for v in (a, b))
    difference, largest = (a - b).abs(), torch.maximum(a.abs(), b.abs())
    # A rounding step of bfloat16, which has 8 bits, at this size.
    step = torch.exp2((torch.frexp(largest).exponent - 8).float())
    close = bfloat16 & (difference > _ABSOLUTE) & (difference <= 1.01 * step)
    least, most = _ROUNDED_TWICE
    twice = least <= float(close.sum()) / max(float((bfloat16 * counts).sum()), 1.0) <= most
    few = close.sum(dim=1, keepdim=True) <= counts / 2
    wrong = ~(difference <= _RELATIVE * largest + _ABSOLUTE)  # true of NaN, too
    if twice:
        wrong &= ~(close & (few | (counts < _OF_A_MATRIX)))
    found: list[bool] = wrong.any(dim=1).tolist()
    return found


def _is_exact(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Tell of each row whether all its values are exact in a precision."""
    return (values.to(dtype).float() == values).all(dim=1, keepdim=True)


def _rows(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return samples as rows of one matrix, padded with zeros, and the number of values of each."""
    read = [b64decode(text) for text in texts]
    width = max(len(raw) for raw in read)
    joined = np.frombuffer(b"".join(raw.ljust(width, b"\0") for raw in read), "<f4")
    counts = torch.tensor([[len(raw) // 4] for raw in read])
    return torch.from_numpy(joined.astype("f4")).reshape(len(read), -1), counts
