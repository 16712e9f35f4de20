"""Attention of texts that lie in one row, without padding, behind one prefix or each behind its own.

It notes keys and values on the prompt's own pass; on the text's pass it puts a prefix before every text and keeps
the texts apart. There is no cache object and no mask tensor of the size of the whole row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from softprompt.errors import ModelError
from softprompt.model.backends.prefix_batch import PrefixBatch
from softprompt.model.prefix import Prefix

# A text longer than this many times the shortest of its group begins another one: on a CPU what is padded costs most,
# on a GPU the groups do, each of which starts some twenty kernels a layer.
MAX_LENGTH_RATIO, MAX_LENGTH_RATIO_ON_GPU = 1.5, 8.0


class PackedBatch:
    """One row of texts behind their prefixes, as the attention function needs it.

    Args:
        prefixes: one for each text.
        lengths: tokens of each text.
        parents: per text, for each token the position of the token before it; None where all texts are chains.
        note: keep the keys and values of every layer in `noted`.
        num_prompt_positions: tokens at the row's beginning that all texts stand behind; the prefixes give their
            number alone.
        max_length_ratio: how unlike in length texts may be whose attention is computed together.
    """

    def __init__(
        self,
        prefixes: Sequence[Prefix],
        lengths: Sequence[int],
        parents: Sequence[Tensor] | None = None,
        note: bool = False,
        num_prompt_positions: int = 0,
        max_length_ratio: float = MAX_LENGTH_RATIO,
    ) -> None:
        self.note, self.num_prompt_positions = note, num_prompt_positions
        self.noted: dict[int, tuple[Tensor, Tensor]] = {}
        self.buckets = [
            LengthBucket(prefixes[begin:end], lengths[begin:end], None if parents is None else parents[begin:end])
            for begin, end in length_buckets(lengths, [prefix.length for prefix in prefixes], max_length_ratio)
        ]
        if num_prompt_positions:
            self.buckets.insert(0, LengthBucket([Prefix()], [num_prompt_positions], None))
        self.sizes = [sum(bucket.lengths) for bucket in self.buckets]

    def positions(self) -> Tensor:
        """Return each token's position, `[1, N]`; the prefix's come first."""
        return torch.cat([bucket.positions() for bucket in self.buckets]).unsqueeze(0)


def length_buckets(
    lengths: Sequence[int], prefix_lengths: Sequence[int], max_length_ratio: float = MAX_LENGTH_RATIO
) -> list[tuple[int, int]]:
    """Cut texts into runs of like length, alone and with their prefixes, so that little of their attention is padding.

    Args:
        lengths: tokens of each text.
        prefix_lengths: positions of each text's prefix.
        max_length_ratio: how many times as long as another one's a length may be.
    """
    cuts = [0]
    shortest = longest = lengths[0]
    prefix, whole = prefix_lengths[0], prefix_lengths[0] + lengths[0]
    for i in range(1, len(lengths)):
        shortest, longest = min(shortest, lengths[i]), max(longest, lengths[i])
        prefix, whole = max(prefix, prefix_lengths[i]), min(whole, prefix_lengths[i] + lengths[i])
        if longest > max_length_ratio * shortest or prefix + longest > max_length_ratio * whole:
            cuts.append(i)
            shortest = longest = lengths[i]
            prefix, whole = prefix_lengths[i], prefix_lengths[i] + lengths[i]
    return list(zip(cuts, [*cuts[1:], len(lengths)], strict=True))


class LengthBucket:
    """Neighbouring texts of a row whose attention is computed together, as if all had the length of the longest.

    In the shapes, P is the length of the longest prefix, t that of the longest text.

    Args:
        prefixes, lengths, parents: as for a row.

    Attributes:
        prefix_batch: the texts' prefixes.
        key_positions: `[n or 1, P + t]`, the position of everything that can be seen; negative for padding before it.
    """

    def __init__(self, prefixes: Sequence[Prefix], lengths: Sequence[int], parents: Sequence[Tensor] | None) -> None:
        self.prefix_batch, self.lengths = PrefixBatch(prefixes), list(lengths)
        self.longest = max(lengths)
        self._even = min(lengths) == self.longest
        if not self._even:
            starts = torch.tensor([0, *self.lengths[:-1]]).cumsum(0)
            ends = torch.tensor(self.lengths)[:, None]
            column = torch.arange(self.longest)[None, :]
            # Padding repeats a text's last token: no real token sees it, and its own output is dropped.
            self._spread = (starts[:, None] + column.minimum(ends - 1)).flatten()
            self._gather = (column < ends).flatten().nonzero().squeeze(1)
        if parents is None:
            depths = torch.arange(self.longest)[None, :]
            self._behind = torch.ones(1, self.longest, self.longest).tril().bool()
        else:
            reach = [_ancestors(each) for each in parents]
            depths = pad_sequence([each.sum(1) - 1 for each in reach], batch_first=True)
            short = [self.longest - len(each) for each in reach]
            self._behind = torch.stack([pad(r, (0, n, 0, n)) for r, n in zip(reach, short, strict=True)])
        self.key_positions = self._key_positions(depths)
        self._masks: dict[tuple[int | None, torch.dtype, torch.device], Tensor] = {}
        self._places: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _key_positions(self, depths: Tensor) -> Tensor:
        """Return `key_positions`: a token's is its prefix's length and its depth `[n or 1, t]` in the text."""
        same = len(set(self.prefix_batch.lengths)) == 1
        starts = torch.tensor(self.prefix_batch.lengths[:1] if same else self.prefix_batch.lengths)[:, None]
        own = starts + depths
        prefix_batch = starts - self.prefix_batch.longest + torch.arange(self.prefix_batch.longest)
        return torch.cat([prefix_batch.expand(len(own), -1), own], dim=1)

    def positions(self) -> Tensor:
        """Return the position of each token, text by text."""
        own = self.key_positions[:, self.prefix_batch.longest :].expand(len(self.lengths), -1)
        return torch.cat([row[:length] for row, length in zip(own, self.lengths, strict=True)])

    def mask(self, window: int | None, like: Tensor) -> Tensor:
        """Return what is added to the scores, `[n or 1, 1, t, P + t]`: zero where a token may look."""
        key = (window, like.dtype, like.device)
        if key not in self._masks:
            keys = self.key_positions
            seen = pad(self._behind, (self.prefix_batch.longest, 0), value=True) & (keys >= 0)[:, None, :]
            if window is not None:
                queries = keys[:, self.prefix_batch.longest :]
                seen = seen & (queries[:, :, None] - keys[:, None, :] < window)
            added = torch.zeros(seen.shape, dtype=like.dtype).masked_fill(~seen, torch.finfo(like.dtype).min)
            self._masks[key] = added.unsqueeze(1).to(like.device)
        return self._masks[key]

    def to_block(self, row: Tensor) -> Tensor:
        """`[heads, N, D]` to `[n, heads, t, D]`: every text takes the length of the longest."""
        tokens = row.transpose(0, 1)
        if not self._even:
            tokens = _Spread.apply(tokens, *self._on(row.device))  # type: ignore[no-untyped-call]
        return tokens.view(len(self.lengths), self.longest, row.shape[0], -1).transpose(1, 2)

    def to_row(self, block: Tensor) -> Tensor:
        """`[n, heads, t, D]` back to `[N, heads, D]`."""
        tokens = block.transpose(1, 2).flatten(0, 1)
        return tokens if self._even else tokens.index_select(0, self._on(block.device)[1])

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return where tokens go and where they come from; copied once, not at every layer."""
        if device not in self._places:
            self._places[device] = (self._spread.to(device), self._gather.to(device))
        return self._places[device]


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


current: ContextVar[PackedBatch] = ContextVar("softprompt_row")


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
    """Attend from every text to its prefix and, causally, to itself.

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
    row = current.get()
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if row.note:
        row.noted[layer] = (key, value)
    split = [states.squeeze(0).split(row.sizes, dim=1) for states in (query, key, value)]
    made, prompt_states = list[Tensor](), list[Tensor]()
    for bucket, *parts in zip(row.buckets, *split, strict=True):
        queries, keys, values = (bucket.to_block(part) for part in parts)
        if row.num_prompt_positions and not made:
            # As views they would keep the whole row's queries, keys and values for the backward pass.
            queries, keys, values = queries.clone(), keys.clone(), values.clone()
            prompt_states = [keys.float(), values.float()]  # so that their gradients are summed up in float32
        else:
            keys, values = _behind(bucket, prompt_states, layer, keys, values)
        mask = bucket.mask(sliding_window, queries)
        if alibi_slopes is not None:
            places = bucket.key_positions.to(mask)[:, None, None, :]
            mask = mask + alibi_slopes.to(mask)[None, :, None, None] * places
        if softcap is None and s_aux is None:
            out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling, enable_gqa=True)
        else:
            out = _plain(queries, keys, values, mask, scaling, softcap, s_aux)
        made.append(bucket.to_row(out))
    return torch.cat(made).unsqueeze(0), None


def _behind(
    bucket: LengthBucket, prompt_states: Sequence[Tensor], layer: int, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Put before a group's keys and values, `[n, K, t, D]`, those of what its texts stand behind.

    Args:
        prompt_states: keys and values `[1, K, P, D]` of the row's beginning; empty where the bucket has prefixes, or
            nothing.
    """
    if prompt_states:
        prefix_batch = [states.to(keys.dtype).expand(len(keys), -1, -1, -1) for states in prompt_states]
    elif bucket.prefix_batch.longest:
        prefix_batch = [bucket.prefix_batch.keys(layer, keys.dtype), bucket.prefix_batch.values(layer, values.dtype)]
    else:
        return keys, values
    return torch.cat([prefix_batch[0], keys], dim=2), torch.cat([prefix_batch[1], values], dim=2)


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend step by step, for what PyTorch's fused attention cannot do: soft-capped scores, sinks.

    Args:
        query: `[n, A, t, D]`.
        key, value: `[n, K, P + t, D]`.
        mask: added to the scores.
    """
    heads, size = query.shape[1], query.shape[3]
    shared = heads // key.shape[1]
    # In float32, as the fused kernels do inside: scores rounded to bfloat16 gave a gradient that was 60 % off.
    key, value = (states.float().repeat_interleave(shared, dim=1) for states in (key, value))
    scores = query.float() @ key.transpose(-1, -2) * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = scores + mask.float()
    if sinks is not None:
        sink = sinks.float().view(1, heads, 1, 1).expand(*seen.shape[:3], 1)
        seen = torch.cat([seen, sink], dim=-1)
    weights = torch.softmax(seen, dim=-1)[..., : key.shape[2]]
    return (weights @ value).to(query.dtype)
