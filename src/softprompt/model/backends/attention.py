"""Attention of texts that are packed in one row, without padding, after one shared prefix or each after its own.

On the prompt's own pass it records keys and values; on the texts' pass it puts a prefix before every text and separates
the texts. There is no cache object and no mask tensor of the size of the whole row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from softprompt.errors import ModelError
from softprompt.model.backends.prefix_batch import PrefixBatch
from softprompt.model.prefix import Prefix

# A text longer than this many times the shortest of its bucket begins another one. On a CPU padding costs most; on a
# GPU buckets do, each of which launches some twenty kernels a layer.
MAX_LENGTH_RATIO, MAX_LENGTH_RATIO_ON_GPU = 1.5, 8.0


class PackedBatch:
    """Texts packed in one row, after their prefixes, as the attention function needs them.

    Args:
        parents: per text, for each token the position of the token before it; None where all texts are chains.
        record_states: record the keys and values of every layer in `recorded_states`.
        num_prompt_positions: positions of a prompt at the row's beginning, which all texts follow; the prefixes have
            this length and no tensors.
        max_length_ratio: the largest ratio of lengths of texts whose attention is computed together.

    Attributes:
        buckets: runs of texts whose attention is computed together.
        sizes: tokens of each bucket.
        recorded_states: per layer, keys and values of the row, `[1, K, N, D]` each.
    """

    def __init__(
        self,
        prefixes: Sequence[Prefix],
        lengths: Sequence[int],
        parents: Sequence[Tensor] | None = None,
        record_states: bool = False,
        num_prompt_positions: int = 0,
        max_length_ratio: float = MAX_LENGTH_RATIO,
    ) -> None:
        self.record_states, self.num_prompt_positions = record_states, num_prompt_positions
        self.recorded_states: dict[int, tuple[Tensor, Tensor]] = {}
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

    def recorded(self, kind: Literal[0, 1]) -> list[Tensor]:
        """Return the recorded keys (0) or values (1), per layer."""
        return [self.recorded_states[layer][kind] for layer in range(len(self.recorded_states))]


def length_buckets(
    lengths: Sequence[int], prefix_lengths: Sequence[int], max_length_ratio: float = MAX_LENGTH_RATIO
) -> list[tuple[int, int]]:
    """Cut texts into runs of similar length, alone and with their prefixes, to pad little in their attention.

    Args:
        prefix_lengths: positions of each text's prefix.
        max_length_ratio: the largest ratio of lengths within a run.

    Returns:
        For each run, the index of its first text and the one after its last.
    """
    cuts = [0]
    shortest = longest = lengths[0]
    longest_prefix, shortest_row = prefix_lengths[0], prefix_lengths[0] + lengths[0]
    for i in range(1, len(lengths)):
        shortest, longest = min(shortest, lengths[i]), max(longest, lengths[i])
        longest_prefix = max(longest_prefix, prefix_lengths[i])
        shortest_row = min(shortest_row, prefix_lengths[i] + lengths[i])
        if longest > max_length_ratio * shortest or longest_prefix + longest > max_length_ratio * shortest_row:
            cuts.append(i)
            shortest = longest = lengths[i]
            longest_prefix, shortest_row = prefix_lengths[i], prefix_lengths[i] + lengths[i]
    return list(zip(cuts, [*cuts[1:], len(lengths)], strict=True))


class LengthBucket:
    """Neighbouring texts of a row whose attention is computed together, padded to the length of the longest.

    In the shapes, P is the length of the longest prefix, t that of the longest text.

    Args:
        prefixes, lengths, parents: as of `PackedBatch`.

    Attributes:
        key_positions: `[n or 1, P + t]`, the position of each key; negative for padding before a prefix.
    """

    def __init__(self, prefixes: Sequence[Prefix], lengths: Sequence[int], parents: Sequence[Tensor] | None) -> None:
        self.prefix_batch, self.lengths = PrefixBatch(prefixes), list(lengths)
        self.longest = max(lengths)
        self._equal_lengths = min(lengths) == self.longest
        if not self._equal_lengths:
            starts = torch.tensor([0, *self.lengths[:-1]]).cumsum(0)
            ends = torch.tensor(self.lengths)[:, None]
            column = torch.arange(self.longest)[None, :]
            # Padding repeats a text's last token: no real token attends to it, and its own output is dropped.
            self._pad_indices = (starts[:, None] + column.minimum(ends - 1)).flatten()
            self._unpad_indices = (column < ends).flatten().nonzero().squeeze(1)
        if parents is None:
            depths = torch.arange(self.longest)[None, :]
            self._visible = torch.ones(1, self.longest, self.longest).tril().bool()
        else:
            ancestors = [_ancestors(each) for each in parents]
            depths = pad_sequence([each.sum(1) - 1 for each in ancestors], batch_first=True)
            padding = [self.longest - len(each) for each in ancestors]
            self._visible = torch.stack([pad(a, (0, n, 0, n)) for a, n in zip(ancestors, padding, strict=True)])
        self.key_positions = self._key_positions(depths)
        self._masks: dict[tuple[int | None, torch.dtype, torch.device], Tensor] = {}
        self._indices: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _key_positions(self, depths: Tensor) -> Tensor:
        """Return `key_positions`: a token's is its prefix's length plus its depth `[n or 1, t]` in the text."""
        same = len(set(self.prefix_batch.lengths)) == 1
        starts = torch.tensor(self.prefix_batch.lengths[:1] if same else self.prefix_batch.lengths)[:, None]
        of_texts = starts + depths
        of_prefixes = starts - self.prefix_batch.longest + torch.arange(self.prefix_batch.longest)
        return torch.cat([of_prefixes.expand(len(of_texts), -1), of_texts], dim=1)

    def positions(self) -> Tensor:
        """Return the position of each token, text by text."""
        of_texts = self.key_positions[:, self.prefix_batch.longest :].expand(len(self.lengths), -1)
        return torch.cat([row[:length] for row, length in zip(of_texts, self.lengths, strict=True)])

    def mask(self, window: int | None, like: Tensor) -> Tensor:
        """Return what is added to the scores, `[n or 1, 1, t, P + t]`: zero where a token attends."""
        key = (window, like.dtype, like.device)
        if key not in self._masks:
            keys = self.key_positions
            visible = pad(self._visible, (self.prefix_batch.longest, 0), value=True) & (keys >= 0)[:, None, :]
            if window is not None:
                queries = keys[:, self.prefix_batch.longest :]
                visible = visible & (queries[:, :, None] - keys[:, None, :] < window)
            added = torch.zeros(visible.shape, dtype=like.dtype).masked_fill(~visible, torch.finfo(like.dtype).min)
            self._masks[key] = added.unsqueeze(1).to(like.device)
        return self._masks[key]

    def to_padded(self, row: Tensor) -> Tensor:
        """Bring `[heads, N, D]` to `[n, heads, t, D]`: every text is padded to the longest."""
        tokens = row.transpose(0, 1)
        if not self._equal_lengths:
            tokens = _PadTexts.apply(tokens, *self._indices_on(row.device))  # type: ignore[no-untyped-call]
        return tokens.view(len(self.lengths), self.longest, row.shape[0], -1).transpose(1, 2)

    def to_packed(self, padded: Tensor) -> Tensor:
        """Bring `[n, heads, t, D]` back to `[N, heads, D]`."""
        tokens = padded.transpose(1, 2).flatten(0, 1)
        return tokens if self._equal_lengths else tokens.index_select(0, self._indices_on(padded.device)[1])

    def _indices_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the indices that pad and unpad texts; copied to a device once, not at every layer."""
        if device not in self._indices:
            self._indices[device] = (self._pad_indices.to(device), self._unpad_indices.to(device))
        return self._indices[device]


def _ancestors(parents: Tensor) -> Tensor:
    """Return which tokens each of a text's tokens follows, itself included, `[t, t]`."""
    ancestors = torch.eye(len(parents), dtype=torch.bool)
    for token, parent in enumerate(parents.tolist()):
        if parent >= 0:
            ancestors[token] |= ancestors[parent]
    return ancestors


class _PadTexts(torch.autograd.Function):
    """A gather whose padding gets no gradient, so that its backward pass is a gather too, not a scatter."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, pad_indices: Tensor, unpad_indices: Tensor) -> Tensor:
        ctx.unpad_indices = unpad_indices
        return row.index_select(0, pad_indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.unpad_indices), None, None


current_batch: ContextVar[PackedBatch] = ContextVar("softprompt_packed_batch")


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
        attention_mask: what `packed._no_mask` returned: a window, or None.
        scaling: factor on the scores; `D ** -0.5` where the model gives none.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        sliding_window: a token attends to the last `sliding_window` positions, its own included.
        s_aux: `[A]`, attention sinks: one more score a head, with a share of the weights and no value (GPT-OSS).
        alibi_slopes: `[A]`, what is added to a head's scores per position of the key (Press et al. 2022).

    Returns:
        `[1, N, A, D]`, and None for the weights.
    """
    if attention_mask is not None and sliding_window is None:
        sliding_window = int(attention_mask)
    if position_bias is not None:
        raise ModelError("the packed backend does not support this model's attention position bias")
    batch = current_batch.get()
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if batch.record_states:
        batch.recorded_states[layer] = (key, value)
    split = [states.squeeze(0).split(batch.sizes, dim=1) for states in (query, key, value)]
    outputs, prompt_states = list[Tensor](), list[Tensor]()
    for bucket, *parts in zip(batch.buckets, *split, strict=True):
        queries, keys, values = (bucket.to_padded(part) for part in parts)
        if batch.num_prompt_positions and not outputs:
            # As views they would keep the whole row's queries, keys and values for the backward pass.
            queries, keys, values = queries.clone(), keys.clone(), values.clone()
            prompt_states = [keys.float(), values.float()]  # so that their gradients are summed in float32
        else:
            keys, values = _with_prefixes(bucket, prompt_states, layer, keys, values)
        mask = bucket.mask(sliding_window, queries)
        if alibi_slopes is not None:
            positions = bucket.key_positions.to(mask)[:, None, None, :]
            mask = mask + alibi_slopes.to(mask)[None, :, None, None] * positions
        if softcap is None and s_aux is None:
            out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling, enable_gqa=True)
        else:
            out = _explicit_attention(queries, keys, values, mask, scaling, softcap, s_aux)
        outputs.append(bucket.to_packed(out))
    return torch.cat(outputs).unsqueeze(0), None


def _with_prefixes(
    bucket: LengthBucket, prompt_states: Sequence[Tensor], layer: int, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Put the prefixes' keys and values before those of a bucket's texts, `[n, K, t, D]`.

    Args:
        prompt_states: keys and values `[1, K, P, D]` of a prompt in the same row; empty where there is none.
    """
    if prompt_states:
        before = [states.to(keys.dtype).expand(len(keys), -1, -1, -1) for states in prompt_states]
    elif bucket.prefix_batch.longest:
        before = [bucket.prefix_batch.states(kind, layer, keys.dtype) for kind in ("keys", "values")]
    else:
        return keys, values
    return torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)


def _explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend operation by operation, for what PyTorch's fused attention cannot do: soft-capped scores, sinks.

    Args:
        query: `[n, A, t, D]`.
        key, value: `[n, K, P + t, D]`.
        mask: added to the scores.
    """
    heads, size = query.shape[1], query.shape[3]
    queries_per_key = heads // key.shape[1]
    # In float32, as inside the fused kernels: with scores rounded to bfloat16 a gradient was 60 % off.
    key, value = (states.float().repeat_interleave(queries_per_key, dim=1) for states in (key, value))
    scores = query.float() @ key.transpose(-1, -2) * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    masked = scores + mask.float()
    if sinks is not None:
        sink = sinks.float().view(1, heads, 1, 1).expand(*masked.shape[:3], 1)
        masked = torch.cat([masked, sink], dim=-1)
    weights = torch.softmax(masked, dim=-1)[..., : key.shape[2]]
    return (weights @ value).to(query.dtype)
