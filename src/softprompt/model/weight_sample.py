"""Some values of each of a model's weights, and whether two such samples are of the same weights.

A merged LoRA changes every value of a matrix, by little. Whether a small difference is a change or rounding follows
from the values themselves: those that were rounded to bfloat16 (or float16) are all numbers that it holds, and others
hardly ever are. So two samples in the same precision have to be equal, and of two in different ones the finer is
rounded as the coarser was, and then they have to be equal. There is one exception. Weights that have been through
float16 before bfloat16 were rounded twice: one value in 16 then ends one step beside, in every matrix alike. Where such
a share of all values is one step off, and none is further, that is what happened.

What is noticed: in the same precision, nearly any change that rounding leaves. A merge that was kept in bfloat16 and
changed the weights by a thousandth of their size still changes a fifth of the values: one or more of the 16 of a single
matrix in 98 cases of 100. Between precisions, a change by more than half a step (0.2 to 0.4 % of a value).
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
_RELATIVE = 1e-6  # float32 that was computed anew, as from a GGUF file
_ABSOLUTE = 2.0**-24  # float16 holds nothing smaller
_ROUNDED_TWICE = 1 / 64, 3 / 16  # of all values: 1 in 16 is expected
_HEAD = "head"


@torch.no_grad()
def sample_weights(model: PreTrainedModel) -> tuple[dict[str, str], int]:
    """Return values of every weight, as base64 of float32, and how many weights could not be read.

    Those are quantized, or kept away from the device (offloaded). A head that is the embedding is there by its own name
    too: a model with tied weights is the same as its untied copy.
    """
    every = list(model.named_parameters())
    named: list[tuple[str, Tensor]] = [(name, weight) for name, weight in every if _readable(weight)]
    skipped = len(every) - len(named)
    lm_head = getattr(model.get_output_embeddings(), "weight", None)
    if isinstance(lm_head, Tensor) and _readable(lm_head):
        tied = lm_head is getattr(model.get_input_embeddings(), "weight", None)
        named = [(name, weight) for name, weight in named if tied or weight is not lm_head]
        named.append((_HEAD, lm_head))
    values = [_some(weight) for _, weight in named]
    taken = _gathered(values)
    sampled, first = {}, 0
    for (name, _), part in zip(named, values, strict=True):
        last = first + 4 * part.numel()
        sampled[name] = b64encode(taken[first:last]).decode()
        first = last
    return sampled, skipped


def different_weights(before: Mapping[str, str], now: Mapping[str, str], complete: bool) -> list[str]:
    """Return the names of weights that are not the same.

    Args:
        before, now: what `sample_weights` gave.
        complete: no weight was left out on either side. Then one that only one side has is a difference, unless both
            have some: then a newer transformers calls them otherwise.
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


def require_readable(sampled: Mapping[str, str]) -> None:
    """Make sure that a sample from a file is base64 of float32.

    Raises:
        ValueError: it is not.
    """
    for name, text in sampled.items():
        if len(b64decode(text, validate=True)) % 4:
            raise ValueError(f"the values of {name} are damaged")


def _readable(weight: Tensor) -> bool:
    plain = type(weight) in (Parameter, Tensor) and weight.dtype in _PLAIN
    return plain and not weight.is_meta and bool(weight.numel())


def _some(weight: Tensor) -> Tensor:
    """Return values all over a weight: a view, which costs a microsecond."""
    count, step = _spread(weight.shape)
    if weight.is_contiguous():
        return weight.as_strided((count,), (step,))
    return weight.flatten()[: count * step : step]


@cache
def _spread(shape: torch.Size) -> tuple[int, int]:
    """Return how many values are taken from a weight, and how far apart: from other columns in each row."""
    wanted = _OF_A_VECTOR if len(shape) < 2 else _OF_A_MATRIX
    if len(shape) > 2:  # several matrices, one an expert
        wanted = max(wanted, _OF_AN_EXPERT * shape[0])
    size = shape.numel()
    # Odd, and no multiple of a row's width.
    return min(wanted, size), max((size * 36 // (37 * wanted) - 1) | 1, 1)


def _gathered(values: Sequence[Tensor]) -> bytes:
    """Return values as float32, in one transfer where they are on one device."""
    if not values:
        return b""
    together = [torch.cat(list(values))] if len({part.device for part in values}) == 1 else values
    return b"".join(part.float().cpu().numpy().astype("<f4").tobytes() for part in together)


def _unequal(before: Sequence[str], now: Sequence[str]) -> list[bool]:
    """Tell of each weight whether its values are not the same, whatever precision either side is in."""
    a, counts = _rows(before)
    b, _ = _rows(now)
    a_brief, b_brief = _held(a, torch.bfloat16), _held(b, torch.bfloat16)
    brief = a_brief | b_brief
    halves = (_held(a, torch.float16) | _held(b, torch.float16)) & ~brief
    a, b = (torch.where(brief, v.bfloat16().float(), torch.where(halves, v.half().float(), v)) for v in (a, b))
    apart, largest = (a - b).abs(), torch.maximum(a.abs(), b.abs())
    # A step of bfloat16, which holds 8 bits, at this size.
    step = torch.exp2((torch.frexp(largest).exponent - 8).float())
    close = brief & (apart > _ABSOLUTE) & (apart <= 1.01 * step)
    least, most = _ROUNDED_TWICE
    twice = least <= float(close.sum()) / max(float((brief * counts).sum()), 1.0) <= most
    few = close.sum(dim=1, keepdim=True) <= counts / 2
    wrong = ~(apart <= _RELATIVE * largest + _ABSOLUTE)  # true of what is no number, too
    if twice:
        wrong &= ~(close & (few | (counts < _OF_A_MATRIX)))
    found: list[bool] = wrong.any(dim=1).tolist()
    return found


def _held(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Tell of each row whether a precision holds all its values as they are."""
    return (values.to(dtype).float() == values).all(dim=1, keepdim=True)


def _rows(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return samples as rows of one matrix, filled up with zeros, and how many values each has."""
    read = [b64decode(text) for text in texts]
    width = max(len(raw) for raw in read)
    joined = np.frombuffer(b"".join(raw.ljust(width, b"\0") for raw in read), "<f4")
    counts = torch.tensor([[len(raw) // 4] for raw in read])
    return torch.from_numpy(joined.astype("f4")).reshape(len(read), -1), counts
