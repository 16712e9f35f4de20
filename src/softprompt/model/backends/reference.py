"""The concatenated way: the prompt's embeddings before each row's. The reference that the others are checked against.

It runs the prompt once per example and computes every logit: slow, and as plain as it can be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

from softprompt.data.encoder import Example
from softprompt.private_interfaces import input_device


def reference_loss(hf_model: PreTrainedModel, prompt: Tensor, examples: Sequence[Example]) -> Tensor:
    """Return the summed loss over the target tokens, in nats.

    Args:
        hf_model: the frozen model.
        prompt: `[P, H]`.
        examples: token ids; rows become `prompt · text · padding`.
    """
    embed, device = hf_model.get_input_embeddings(), input_device(hf_model)
    length = prompt.shape[0]
    longest = max(len(e.ids) for e in examples)
    rows, masks, labels = [], [], []
    for example in examples:
        ids = torch.tensor(example.ids, device=device)
        short = longest - len(ids)
        row = torch.cat([prompt.to(hf_model.dtype), embed(ids)])
        rows.append(pad(row, (0, 0, 0, short)))
        masks.append(pad(torch.ones(length + len(ids), dtype=torch.long, device=device), (0, short)))
        target = ids.clone()
        target[: example.start] = -100
        labels.append(pad(pad(target, (length, 0), value=-100), (0, short), value=-100))
    logits = hf_model(inputs_embeds=torch.stack(rows), attention_mask=torch.stack(masks), use_cache=False).logits
    return cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), torch.stack(labels)[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
