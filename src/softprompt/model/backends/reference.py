"""The reference: what plain transformers gives when the prompt's embeddings stand before each row's.

It runs the prompt once per example and computes every logit: slow, and as plain as it can be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

from softprompt.data.example import Example
from softprompt.private_interfaces import input_device

# Texts after the shared one: the attention of two is computed together, that of the others alone, and the last is a
# single token, which is a target. Some are longer than a tiny copy's sliding window.
_LENGTHS = (6, 5, 3, 1)
_NUM_VIRTUAL_TOKENS = 4


def reference_loss(hf_model: PreTrainedModel, prompt: Tensor, examples: Sequence[Example]) -> Tensor:
    """Return the summed loss over the target tokens, in nats.

    Args:
        prompt: `[P, H]`.
        examples: token ids; rows become `prompt · text · padding`.
    """
    embed, device = hf_model.get_input_embeddings(), input_device(hf_model)
    length = prompt.shape[0]
    longest = max(len(e.ids) for e in examples)
    rows, masks, labels = [], [], []
    for example in examples:
        ids = torch.tensor(example.ids, device=device)
        padding = longest - len(ids)
        row = torch.cat([prompt.to(hf_model.dtype), embed(ids)])
        rows.append(pad(row, (0, 0, 0, padding)))
        masks.append(pad(torch.ones(length + len(ids), dtype=torch.long, device=device), (0, padding)))
        target = ids.clone()
        target[: example.start] = -100
        labels.append(pad(pad(target, (length, 0), value=-100), (0, padding), value=-100))
    logits = hf_model(inputs_embeds=torch.stack(rows), attention_mask=torch.stack(masks), use_cache=False).logits
    return cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), torch.stack(labels)[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


class Reference:
    """What plain transformers gives for a few texts after a prompt.

    Args:
        hf_model: a frozen model.

    Attributes:
        prompt: `[P, H]`, float32.
        shared_text_ids: what all examples begin with.
        examples: the texts after that, with a target each.
        texts: the texts alone, to be continued.
        next_ids: two tokens for each text, to continue it with.
        dropped_virtual_tokens: per text, how many of the first virtual tokens its row in a batch does not have.
        loss, gradient: the mean over all target tokens, and its gradient on the prompt.
    """

    dropped_virtual_tokens = (0, _NUM_VIRTUAL_TOKENS, 1, 0)

    def __init__(self, hf_model: PreTrainedModel) -> None:
        self._hf_model, self._embed = hf_model, hf_model.get_input_embeddings()
        generator = torch.Generator().manual_seed(0)
        vocabulary = int(self._embed.num_embeddings)  # type: ignore[arg-type]
        ids: list[int] = torch.randint(vocabulary, (40,), generator=generator).tolist()
        self.shared_text_ids, rest = ids[:2], ids[2 + _NUM_VIRTUAL_TOKENS :]
        self.texts = [rest[sum(_LENGTHS[:i]) : sum(_LENGTHS[: i + 1])] for i in range(len(_LENGTHS))]
        self.next_ids = rest[-len(_LENGTHS) :], rest[-2 * len(_LENGTHS) : -len(_LENGTHS)]
        shared, last = len(self.shared_text_ids), len(self.texts) - 1
        self.examples = [
            Example((*self.shared_text_ids, *text), shared + (i % 2 if i < last else 0))
            for i, text in enumerate(self.texts)
        ]
        # Between tokens, where training moves it: some models look up which token an embedding is.
        tokens = self._embedded(ids[2 : 2 + _NUM_VIRTUAL_TOKENS]).float()
        noise = torch.randn(tokens.shape, generator=generator).to(tokens.device)
        self.prompt = tokens + 0.3 * tokens.std() * noise
        with torch.enable_grad():
            weights = self.prompt.clone().requires_grad_()
            loss = reference_loss(hf_model, weights, self.examples) / sum(e.targets for e in self.examples)
            (self.gradient,) = torch.autograd.grad(loss, weights)
        self.loss = float(loss.detach())

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and bool(torch.isfinite(self.gradient).all())

    @cached_property
    @torch.no_grad()
    def decoded_logits(self) -> list[Tensor]:
        """Per text, the logits after it and after each of its `next_ids`, `[3, V]`, from a pass of its row alone."""
        decoded = []
        for dropped, text, *following in zip(self.dropped_virtual_tokens, self.texts, *self.next_ids, strict=True):
            embedded = self._embedded([*text, *following])
            row = torch.cat([self.prompt[dropped:].to(self._hf_model.dtype), embedded]).unsqueeze(0)
            mask = torch.ones(row.shape[:2], dtype=torch.long, device=row.device)
            logits = self._hf_model(inputs_embeds=row, attention_mask=mask, use_cache=False).logits
            decoded.append(logits[0, -len(following) - 1 :])
        return decoded

    @torch.no_grad()
    def _embedded(self, ids: Sequence[int]) -> Tensor:
        embedded: Tensor = self._embed(torch.tensor(list(ids), device=input_device(self._hf_model)))
        return embedded
