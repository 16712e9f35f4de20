"""Losses computed without the package, one plain forward pass a row, and how far two tensors lie apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from softprompt.data.example import Example
from softprompt.model.frozen import FrozenModel


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def candidate_loss(logits: list[Tensor], examples: list[Example]) -> Tensor:
    """Return the mean loss of targets, half over all tokens and half over candidate tokens, from logits row by row."""
    losses = []
    for row, example in zip(logits, examples, strict=True):
        for place, others in zip(range(example.start, len(example.ids)), example.candidate_ids, strict=True):
            before, target = row[place - 1].float(), example.ids[place]
            there = torch.full_like(before, -torch.inf)
            there[list(others)] = before[list(others)]
            losses.append(-(before.softmax(dim=0)[target].log() + there.softmax(dim=0)[target].log()) / 2)
    return torch.stack(losses).mean()


def token_losses(model: FrozenModel, prompt: Tensor | None, text: str, target: str) -> Tensor:
    """Nats of the target's tokens: one forward pass of the whole model on prompt, text and target."""
    tokenizer = model.tokenizer
    ids = torch.tensor(tokenizer(text)["input_ids"] + tokenizer(target)["input_ids"])
    assert ids.tolist() == tokenizer(text + target)["input_ids"], "the test's own texts have to split cleanly"
    embeds = model.hf_model.get_input_embeddings()(ids)
    num_virtual_tokens = 0 if prompt is None else len(prompt)
    embeds = embeds if prompt is None else torch.cat([prompt, embeds])
    logits = model.hf_model(inputs_embeds=embeds.unsqueeze(0), use_cache=False).logits[0, num_virtual_tokens:].float()
    start = len(tokenizer(text)["input_ids"])
    return cross_entropy(logits[start - 1 : -1], ids[start:], reduction="none")
