"""The padded backend: the prefix of every row as its key-value cache, over padded rows.

For causal models with an attention of their own (Bloom, Falcon, MPT, GPT-J). Padding is only before the prefix or
after the text, so that the two are contiguous in every row: sliding windows and ALiBi count cache slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from softprompt.model.backends.base import Backend, TextPass, gather_hidden
from softprompt.model.backends.cache import cached_tensors, filled_cache, position_arguments
from softprompt.model.backends.prefix_batch import PrefixBatch, broadcast_prefix
from softprompt.model.prefix import Prefix
from softprompt.private_interfaces import input_device


class PaddedBackend(Backend):
    """For models whose attention cannot be replaced, but which keep keys and values in a cache."""

    name = "padded"
    pads = True
    max_length_ratio = math.inf
    mixes_prefix_lengths = True  # whether prefixes of unlike lengths can be padded to one and run in one pass

    def prompt_pass(self, embeddings: Tensor) -> Prefix:
        length = embeddings.shape[1]
        # An explicit cache: the model's default one drops what lies outside a sliding window.
        cache = DynamicCache()
        mask = torch.ones(1, length, dtype=torch.long, device=embeddings.device)
        positions = torch.arange(length, device=embeddings.device).unsqueeze(0)
        hidden = self._hidden(cache, mask, positions, inputs_embeds=embeddings)
        keys, values = cached_tensors(cache)
        return Prefix(keys=keys, values=values, last=hidden[0, -1:], length=length)

    def _hidden(self, cache: DynamicCache, mask: Tensor, positions: Tensor, **inputs: Tensor) -> Tensor:
        """Run padded rows after a cache, which is extended, and return the output head's input, `[B, T, H]`."""
        captured: list[Tensor] = []
        with self.running(), self.lm_head.skipped(captured.append):
            self.hf_model(
                **inputs,
                past_key_values=cache,
                use_cache=True,
                attention_mask=mask,
                **position_arguments(self.hf_model, positions),
            )
        return captured[0]

    def text_pass(
        self,
        prefix: Prefix | Sequence[Prefix],
        texts: Sequence[Tensor],
        output_positions: Sequence[Tensor],
        parents: Sequence[Tensor] | None = None,
        extend: bool = False,
        activation_checkpointing: bool = False,
    ) -> TextPass:
        # A layer that runs again would find its keys and values in the cache already.
        assert not activation_checkpointing
        prefixes = broadcast_prefix(prefix, len(texts))
        if parents is not None:
            trees = zip(prefixes, texts, output_positions, parents, strict=True)
            return TextPass(torch.cat([self._tree(*tree) for tree in trees]))
        if not self.mixes_prefix_lengths and len({each.length for each in prefixes}) > 1:
            return self._passes_by_length(prefixes, texts, output_positions, extend)
        device, batch = input_device(self.hf_model), PrefixBatch(prefixes)
        prefix_lengths = torch.tensor(batch.lengths)[:, None]
        text_lengths = torch.tensor([len(text) for text in texts])[:, None]
        ids = pad_sequence(list(texts), batch_first=True).to(device)
        count, longest = ids.shape
        column = torch.arange(longest)
        in_prefix = torch.arange(batch.longest)[None, :] >= batch.longest - prefix_lengths
        mask = torch.cat([in_prefix, column[None, :] < text_lengths], dim=1).long().to(device)
        cache = filled_cache(batch, max(len(each.keys) for each in prefixes), self.hf_model.dtype)
        hidden = self._hidden(cache, mask, (prefix_lengths + column).to(device), input_ids=ids)
        gathered = gather_hidden(hidden, [i * longest for i in range(count)], output_positions, prefixes)
        if not extend:
            return TextPass(gathered)
        keys, values = cached_tensors(cache)
        extended = []
        for i, (own, text) in enumerate(zip(prefixes, texts, strict=True)):
            begin, end = batch.longest - own.length, batch.longest + len(text)
            own_keys, own_values = ([s[i : i + 1, :, begin:end] for s in states] for states in (keys, values))
            extended.append(own.extended(own_keys, own_values, hidden[i, len(text) - 1].unsqueeze(0), text))
        return TextPass(gathered, extended)

    def _passes_by_length(
        self, prefixes: Sequence[Prefix], texts: Sequence[Tensor], output_positions: Sequence[Tensor], extend: bool
    ) -> TextPass:
        """Run a pass for each length of prefix."""
        hidden: list[Tensor] = [torch.empty(0)] * len(texts)
        extended: list[Prefix] = [Prefix()] * len(texts)
        for length in sorted({each.length for each in prefixes}):
            rows = [i for i, each in enumerate(prefixes) if each.length == length]
            positions = [output_positions[i] for i in rows]
            done = self.text_pass(
                [prefixes[i] for i in rows], [texts[i] for i in rows], output_positions=positions, extend=extend
            )
            for i, part in zip(rows, done.hidden.split([len(each) for each in positions]), strict=True):
                hidden[i] = part
            for i, longer in zip(rows, done.extended, strict=False):  # empty unless asked for
                extended[i] = longer
        return TextPass(torch.cat(hidden), extended if extend else [])

    def _tree(self, prefix: Prefix, text: Tensor, output_positions: Tensor, parents: Tensor) -> Tensor:
        """Return the head's input at a tree's output positions: its trunk is run once, then every path from there."""
        before = parents.tolist()
        trunk = min((parent + 1 for i, parent in enumerate(before) if parent != i - 1), default=len(text))
        done = self.text_pass(prefix, [text[:trunk]], output_positions=[torch.arange(trunk)], extend=True)
        paths = []
        for leaf in sorted(set(range(trunk, len(text))) - set(before)):
            path = [leaf]
            while before[path[-1]] >= trunk:
                path.append(before[path[-1]])
            paths.append(torch.tensor(path[::-1]))
        hidden = [done.hidden]
        if paths:
            rest = self.text_pass(
                done.extended[0], [text[p] for p in paths], output_positions=[torch.arange(len(p)) for p in paths]
            )
            hidden.append(rest.hidden)
        tokens = torch.cat([torch.arange(trunk), *paths]).tolist()
        row_of = {token: row for row, token in enumerate(tokens)}
        return torch.cat(hidden)[[row_of[token] for token in output_positions.tolist()]]


class PaddedByLengthBackend(PaddedBackend):
    """For models that count padding before a prefix as positions: a pass for each length of prefix."""

    mixes_prefix_lengths = False
