"""The cached way: the prefix of every row as its key-value cache, over padded rows.

For causal models with an attention of their own (Bloom, Falcon, MPT, GPT-J). Padding stands only before the prefix or
behind the text, so that the two lie next to each other in every row: sliding windows and ALiBi count cache slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from softprompt.model.backends.base import Backend, TextPass, rows_of
from softprompt.model.backends.cache import cached_tensors, filled_cache, position_arguments
from softprompt.model.backends.prefix_batch import PrefixBatch, broadcast_prefix
from softprompt.model.prefix import Prefix
from softprompt.private_interfaces import input_device


class PaddedBackend(Backend):
    """For models whose attention cannot be replaced, but which keep keys and values in a cache."""

    name = "padded"
    pads = True

    def prompt_pass(self, embeddings: Tensor) -> Prefix:
        length = embeddings.shape[1]
        # An explicit cache: the model's default one drops what lies outside a sliding window.
        cache = DynamicCache()
        taken: list[Tensor] = []
        with self.running(), self.lm_head.skipped(taken.append):
            self.hf_model(
                inputs_embeds=embeddings,
                past_key_values=cache,
                use_cache=True,
                attention_mask=torch.ones(1, length, dtype=torch.long, device=embeddings.device),
                **position_arguments(self.hf_model, torch.arange(length, device=embeddings.device).unsqueeze(0)),
            )
        keys, values = cached_tensors(cache)
        return Prefix(keys=keys, values=values, last=taken[0][0, -1:], length=length)

    def text_pass(
        self,
        prefix: Prefix | Sequence[Prefix],
        texts: Sequence[Tensor],
        wanted: Sequence[Tensor],
        parents: Sequence[Tensor] | None = None,
        extend: bool = False,
        activation_checkpointing: bool = False,
    ) -> TextPass:
        assert (
            not activation_checkpointing
        )  # a layer that runs again would find its keys and values in the cache already
        prefixes = broadcast_prefix(prefix, len(texts))
        if parents is not None:
            trees = zip(prefixes, texts, wanted, parents, strict=True)
            return TextPass(torch.cat([self._tree(*tree) for tree in trees]))
        device, prefix_batch = input_device(self.hf_model), PrefixBatch(prefixes)
        starts = torch.tensor(prefix_batch.lengths)[:, None]
        lengths = torch.tensor([len(text) for text in texts])
        ids = pad_sequence(list(texts), batch_first=True).to(device)
        count, longest = ids.shape
        real = torch.arange(longest)[None, :] < lengths[:, None]
        held = torch.arange(prefix_batch.longest)[None, :] >= prefix_batch.longest - starts
        mask = torch.cat([held, real], dim=1).long().to(device)
        taken: list[Tensor] = []
        cache = filled_cache(prefix_batch, max(len(each.keys) for each in prefixes), self.hf_model.dtype)
        with self.running(), self.lm_head.skipped(taken.append):
            self.hf_model(
                input_ids=ids,
                past_key_values=cache,
                use_cache=True,
                attention_mask=mask,
                **position_arguments(self.hf_model, (starts + torch.arange(longest)).to(device)),
            )
        hidden = rows_of(taken[0], [i * longest for i in range(count)], wanted, prefixes)
        if not extend:
            return TextPass(hidden)
        keys, values = cached_tensors(cache)
        extended = []
        for i, (own, text) in enumerate(zip(prefixes, texts, strict=True)):
            begin, end = prefix_batch.longest - own.length, prefix_batch.longest + len(text)
            extended.append(
                Prefix(
                    keys=[k[i : i + 1, :, begin:end] for k in keys],
                    values=[v[i : i + 1, :, begin:end] for v in values],
                    last=taken[0][i, len(text) - 1].unsqueeze(0),
                    length=end - begin,
                    text=own.text + tuple(text.tolist()),
                )
            )
        return TextPass(hidden, extended)

    def _tree(self, prefix: Prefix, text: Tensor, wanted: Tensor, parents: Tensor) -> Tensor:
        """Return the head's input at a tree's wanted positions: its trunk is run once, then every path from there."""
        before = parents.tolist()
        trunk = min((parent + 1 for i, parent in enumerate(before) if parent != i - 1), default=len(text))
        done = self.text_pass(prefix, [text[:trunk]], [torch.arange(trunk)], extend=True)
        paths = []
        for leaf in sorted(set(range(trunk, len(text))) - set(before)):
            path = [leaf]
            while before[path[-1]] >= trunk:
                path.append(before[path[-1]])
            paths.append(torch.tensor(path[::-1]))
        hidden = [done.hidden]
        if paths:
            rest = self.text_pass(done.extended[0], [text[p] for p in paths], [torch.arange(len(p)) for p in paths])
            hidden.append(rest.hidden)
        run = torch.cat([torch.arange(trunk), *paths]).tolist()
        place = {token: row for row, token in enumerate(run)}
        return torch.cat(hidden)[[place[token] for token in wanted.tolist()]]


class PaddedByLengthBackend(PaddedBackend):
    """For those that count padding before a prefix as positions: a pass for each length of prefix."""

    def text_pass(
        self,
        prefix: Prefix | Sequence[Prefix],
        texts: Sequence[Tensor],
        wanted: Sequence[Tensor],
        parents: Sequence[Tensor] | None = None,
        extend: bool = False,
        activation_checkpointing: bool = False,
    ) -> TextPass:
        prefixes = broadcast_prefix(prefix, len(texts))
        if parents is not None or len({each.length for each in prefixes}) == 1:  # trees are run one by one
            return super().text_pass(prefixes, texts, wanted, parents, extend, activation_checkpointing)
        hidden: list[Tensor] = [torch.empty(0)] * len(texts)
        extended: list[Prefix] = [Prefix()] * len(texts)
        for length in sorted({each.length for each in prefixes}):
            own = [i for i, each in enumerate(prefixes) if each.length == length]
            asked = [wanted[i] for i in own]
            done = super().text_pass([prefixes[i] for i in own], [texts[i] for i in own], asked, None, extend)
            for i, part in zip(own, done.hidden.split([len(each) for each in asked]), strict=True):
                hidden[i] = part
            for i, longer in zip(own, done.extended, strict=False):  # empty unless asked for
                extended[i] = longer
        return TextPass(torch.cat(hidden), extended if extend else [])
