"""Attention of texts that lie in one row, without padding, behind a prefix that is the same for all of them.

It notes keys and values on the prompt's own pass; on the text's pass it puts the prefix before every text and keeps
the texts apart. There is no cache object and no mask tensor of the size of the whole row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from softprompt.errors import ModelError
from softprompt.model.prefix import Prefix


class Row:
    """One row of texts behind a prefix, as the attention function needs it.

    Args:
        prefix: the prefix.
        lengths: tokens of each text.
        parents: per text, for each token the position of the token before it; None where all texts are chains.
        note: keep the keys and values of every layer in `noted`.
    """

    def __init__(
        self, prefix: Prefix, lengths: Sequence[int], parents: Sequence[Tensor] | None = None, note: bool = False
    ) -> None:
        self.prefix, self.lengths, self.note = prefix, list(lengths), note
        self.noted: dict[int, tuple[Tensor, Tensor]] = {}
        self.longest = max(lengths)
        self.even = min(lengths) == self.longest
        if not self.even:
            starts = torch.tensor([0, *self.lengths[:-1]]).cumsum(0)
            ends = torch.tensor(self.lengths)[:, None]
            column = torch.arange(self.longest)[None, :]
            # Padding repeats a text's last token: no real token sees it, and its own output is dropped.
            self._spread = (starts[:, None] + column.minimum(ends - 1)).flatten()
            self._gather = (column < ends).flatten().nonzero().squeeze(1)
        if parents is None:
            self._depths = torch.arange(self.longest)[None, :]
            self._behind = torch.ones(1, self.longest, self.longest).tril().bool()
        else:
            reach = [_ancestors(each) for each in parents]
            self._depths = pad_sequence([each.sum(1) - 1 for each in reach], batch_first=True)
            short = [self.longest - len(each) for each in reach]
            padded = [torch.nn.functional.pad(r, (0, n, 0, n)) for r, n in zip(reach, short, strict=True)]
            self._behind = torch.stack(padded)
        self._masks: dict[tuple[int | None, torch.device], Tensor] = {}

    def positions(self) -> Tensor:
        """Return each token's position, `[1, N]`; the prefix's come first."""
        depths = self._depths.expand(len(self.lengths), -1)
        real = [row[:length] for row, length in zip(depths, self.lengths, strict=True)]
        return self.prefix.length + torch.cat(real).unsqueeze(0)

    def key_positions(self) -> Tensor:
        """Return the position of everything that can be seen, `[n or 1, P + t]`."""
        ahead = torch.arange(self.prefix.length).expand(len(self._depths), -1)
        return torch.cat([ahead, self.prefix.length + self._depths], dim=1)

    def mask(self, window: int | None, device: torch.device) -> Tensor:
        """Return what is added to the scores, `[n or 1, 1, t, P + t]`: zero where a token may look."""
        key = (window, device)
        if key not in self._masks:
            seen = torch.nn.functional.pad(self._behind, (self.prefix.length, 0), value=True)
            if window is not None:
                queries = self.prefix.length + self._depths
                seen = seen & (queries[:, :, None] - self.key_positions()[:, None, :] < window)
            added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
            self._masks[key] = added.unsqueeze(1).to(device)
        return self._masks[key]

    def to_block(self, row: Tensor) -> Tensor:
        """`[N, ...]` to `[n·t, ...]`: every text takes the length of the longest."""
        if self.even:
            return row
        spread: Tensor = _Spread.apply(  # type: ignore[no-untyped-call]
            row, self._spread.to(row.device), self._gather.to(row.device)
        )
        return spread

    def to_row(self, block: Tensor) -> Tensor:
        """`[n·t, ...]` back to `[N, ...]`."""
        return block if self.even else block.index_select(0, self._gather.to(block.device))


def _ancestors(parents: Tensor) -> Tensor:
    """Return which tokens a text's tokens stand behind, themselves included, `[t, t]`."""
    reach = torch.eye(len(parents), dtype=torch.bool)
    for token, parent in enumerate(parents.tolist()):
        if parent >= 0:
            reach[token] |= reach[parent]
    return reach


class _Spread(torch.autograd.Function):
    """A gather whose padding gets no gradient, so that its backward pass is a gather too, not a scatter."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, spread: Tensor, gather: Tensor) -> Tensor:
        ctx.gather = gather
        return row.index_select(0, spread)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.gather), None, None


current: ContextVar[Row] = ContextVar("softprompt_row")


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
    alibi_slopes: Tensor | None = None,
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
        alibi_slopes: `[A]`, what is added to a head's scores per position of the key (Press et al. 2022).

    Returns:
        `[1, N, A, D]`, and None for the weights.
    """
    if attention_mask is not None and sliding_window is None:
        sliding_window = int(attention_mask)
    if position_bias is not None:
        raise ModelError("the packed way does not know this model's attention position bias")
    call = current.get()
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
    if alibi_slopes is not None:
        places = call.key_positions().to(scores.device)[None, :, None, None, :]
        scores = scores + alibi_slopes.view(groups, 1, shared, 1, 1) * places
    weights = _weights(scores, call.mask(sliding_window, scores.device), softcap, s_aux)
    own = weights[..., length:].reshape(groups, count, shared * longest, longest)
    out = own @ values
    if length:
        out = out + (weights[..., :length].reshape(groups, -1, length) @ prefix_values).view_as(out)
    out = out.view(groups, count, shared, longest, -1).permute(1, 3, 0, 2, 4)
    return call.to_row(out.reshape(count * longest, heads, -1)).unsqueeze(0).to(query.dtype), None


def _weights(scores: Tensor, mask: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Return attention weights from scores, both `[K, n, g, t, P + t]` with g query heads to a key head."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = scores + mask
    if sinks is None:
        return torch.softmax(seen, dim=-1)
    groups, _, shared = scores.shape[:3]
    sink = sinks.to(scores.dtype).view(groups, 1, shared, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([seen, sink], dim=-1), dim=-1)[..., :-1]
