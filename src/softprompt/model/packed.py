"""The packed way: the true tokens of a micro-batch lie in one row, without padding.

transformers lets a caller plug in the attention of nearly all of today's models (`AttentionInterface`). Ours
notes keys and values on the prompt's own pass; on the text's pass it puts the prefix before every text and
keeps the texts apart. There is no cache object and no mask tensor of the size of the whole row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from softprompt.errors import ModelError
from softprompt.model.prefix import Prefix
from softprompt.model.way import TextPass, Way, head_input, input_device, rows_of

ATTENTION = "softprompt_packed"


@dataclass
class _Pass:
    """One row of texts behind a prefix, as the attention function needs it."""

    prefix: Prefix
    lengths: list[int]
    note: bool
    noted: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.longest = max(self.lengths)
        self.even = min(self.lengths) == self.longest
        if not self.even:
            starts = torch.tensor([0, *self.lengths[:-1]]).cumsum(0)
            lengths = torch.tensor(self.lengths)
            column = torch.arange(self.longest)
            real = column[None, :] < lengths[:, None]
            # Padding repeats a text's last token: no real token sees it, and its own output is dropped.
            self.spread = (starts[:, None] + column[None, :].minimum(lengths[:, None] - 1)).flatten()
            self.gather = real.flatten().nonzero().squeeze(1)

    def to_block(self, row: Tensor) -> Tensor:
        """`[N, ...]` to `[n·t, ...]`: every text takes the length of the longest."""
        if self.even:
            return row
        spread: Tensor = _Spread.apply(  # type: ignore[no-untyped-call]
            row, self.spread.to(row.device), self.gather.to(row.device)
        )
        return spread

    def to_row(self, block: Tensor) -> Tensor:
        """`[n·t, ...]` back to `[N, ...]`."""
        return block if self.even else block.index_select(0, self.gather.to(block.device))


class _Spread(torch.autograd.Function):
    """A gather whose padding gets no gradient, so that its backward pass is a gather too, not a scatter."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, spread: Tensor, gather: Tensor) -> Tensor:
        ctx.gather = gather
        return row.index_select(0, spread)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.gather), None, None


_current: ContextVar[_Pass] = ContextVar("softprompt_pass")


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from every text to the prefix and, causally, to itself.

    Args:
        query: `[1, A, N, D]` with A query heads, N tokens of all texts.
        key, value: `[1, K, N, D]`.
        attention_mask: what our mask function returned: a window, or None.
        scaling: factor on the scores; `D ** -0.5` where the model gives none.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        sliding_window: a token sees the last `sliding_window` positions, itself included.
        s_aux: `[A]`, attention sinks: one more score a head that takes weight and gives no value (GPT-OSS).

    Returns:
        `[1, N, A, D]`, and None for the weights.
    """
    if attention_mask is not None and sliding_window is None:
        sliding_window = int(attention_mask)
    if position_bias is not None:
        raise ModelError("the packed way does not know this model's attention position bias")
    call = _current.get()
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if call.note:
        call.noted[layer] = (key, value)
    heads, size = query.shape[1], query.shape[3]
    groups, shared = key.shape[1], heads // key.shape[1]
    count, longest, length = len(call.lengths), call.longest, call.prefix.length
    scale = size**-0.5 if scaling is None else scaling

    # In float32, as the fused kernels do inside: scores rounded to bfloat16 gave a gradient that was 60 % off.
    def block(states: Tensor) -> Tensor:  # [1, K·g, N, D] -> [K, n, g, t, D]
        states = states.float()
        spread = call.to_block(states[0].transpose(0, 1)).view(count, longest, groups, -1, states.shape[3])
        return spread.permute(2, 0, 3, 1, 4)

    queries = (block(query) * scale).reshape(groups, count, shared * longest, size)
    keys, values = block(key).squeeze(2), block(value).squeeze(2)
    scores = (queries @ keys.transpose(-1, -2)).view(groups, count, shared, longest, longest)
    if length:
        prefix_keys = call.prefix.keys[layer][0].float()  # [K, P, D]
        prefix_values = call.prefix.values[layer][0].float()
        ahead = queries.view(groups, -1, size) @ prefix_keys.transpose(-1, -2)
        scores = torch.cat([ahead.view(groups, count, shared, longest, length), scores], dim=-1)
    weights = _weights(scores, length, softcap, sliding_window, s_aux)
    own = weights[..., length:].reshape(groups, count, shared * longest, longest)
    out = own @ values
    if length:
        out = out + (weights[..., :length].reshape(groups, -1, length) @ prefix_values).view_as(out)
    out = out.view(groups, count, shared, longest, -1).permute(1, 3, 0, 2, 4)
    return call.to_row(out.reshape(count * longest, heads, -1)).unsqueeze(0).to(query.dtype), None


def _weights(scores: Tensor, length: int, softcap: float | None, window: int | None, sinks: Tensor | None) -> Tensor:
    """Return attention weights from scores, both `[K, n, g, t, P + t]` with g query heads to a key head."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = scores + _mask(length, scores.shape[3], window, scores)
    if sinks is None:
        return torch.softmax(seen, dim=-1)
    groups, _, shared = scores.shape[:3]
    sink = sinks.to(scores.dtype).view(groups, 1, shared, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([seen, sink], dim=-1), dim=-1)[..., :-1]


def _mask(length: int, longest: int, window: int | None, like: Tensor) -> Tensor:
    """Return what is added to the scores, `[t, P + t]`: zero where a token may look, the least number elsewhere."""
    query = torch.arange(length, length + longest, device=like.device)[:, None]
    key = torch.arange(length + longest, device=like.device)[None, :]
    seen = key <= query
    if window is not None:
        seen = seen & (query - key < window)
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, torch.finfo(like.dtype).min)


def _no_mask(*_args: Any, local_size: int | None = None, **_kwargs: Any) -> Tensor | None:
    """Build no mask: positions and borders are known to the attention function itself.

    Some models tell their window to the mask alone; it is handed on in the mask's place.
    """
    return None if local_size is None else torch.tensor(local_size)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


class Packed(Way):
    """For models on transformers' pluggable attention."""

    name = "packed"

    @contextmanager
    def _running(self, call: _Pass) -> Iterator[None]:
        config = self.hf_model.config
        with self.lock:
            before = config._attn_implementation
            token = _current.set(call)
            config._attn_implementation = ATTENTION
            try:
                yield
            finally:
                config._attn_implementation = before
                _current.reset(token)

    def prompt_pass(self, embeddings: Tensor) -> Prefix:
        length = embeddings.shape[1]
        call = _Pass(Prefix(), [length], note=True)
        last: list[Tensor] = []

        def keep_last(hidden: Tensor) -> Tensor:
            last.append(hidden[0, -1:])
            return hidden[:, -1:]

        positions = torch.arange(length, device=embeddings.device).unsqueeze(0)
        with self._running(call), head_input(self.hf_model, keep_last):
            self.hf_model(inputs_embeds=embeddings, position_ids=positions, use_cache=False)
        return Prefix(
            keys=[call.noted[i][0] for i in range(len(call.noted))],
            values=[call.noted[i][1] for i in range(len(call.noted))],
            last=last[0],
            length=length,
        )

    def text_pass(
        self, prefix: Prefix, texts: Sequence[Tensor], wanted: Sequence[Tensor], extend: bool = False
    ) -> TextPass:
        lengths = [len(text) for text in texts]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        device = input_device(self.hf_model)
        call = _Pass(prefix, lengths, note=extend)
        last: list[Tensor] = []

        def keep_wanted(hidden: Tensor) -> Tensor:
            if extend:
                last.extend(hidden[0, s + t - 1].unsqueeze(0) for s, t in zip(starts, lengths, strict=True))
            return rows_of(hidden, starts, wanted, prefix)

        ids = torch.cat(list(texts)).unsqueeze(0).to(device)
        positions = torch.cat([torch.arange(prefix.length, prefix.length + t) for t in lengths]).unsqueeze(0)
        with self._running(call), head_input(self.hf_model, keep_wanted):
            logits = self.hf_model(input_ids=ids, position_ids=positions.to(device), use_cache=False).logits[0]
        if not extend:
            return TextPass(logits)
        extended = [
            _extended(prefix, call.noted, slice(s, s + t), final, text)
            for s, t, final, text in zip(starts, lengths, last, texts, strict=True)
        ]
        return TextPass(logits, extended)


def _extended(
    prefix: Prefix, noted: dict[int, tuple[Tensor, Tensor]], where: slice, last: Tensor, text: Tensor
) -> Prefix:
    def joined(ahead: list[Tensor], which: int) -> list[Tensor]:
        own = [noted[i][which][:, :, where] for i in range(len(noted))]
        return [torch.cat([a.to(o.dtype), o], dim=2) for a, o in zip(ahead, own, strict=True)] if ahead else own

    return Prefix(
        keys=joined(prefix.keys, 0),
        values=joined(prefix.values, 1),
        last=last,
        length=prefix.length + len(text),
        text=prefix.text + tuple(text.tolist()),
    )
