"""Reading a prompt: which tokens of the vocabulary its virtual tokens lie next to."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from softprompt.errors import PromptError
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.soft_prompt import SoftPrompt, require_fit

_AT_ONCE = 8192  # rows of the vocabulary: a quarter of a million of them need not be held twice


@torch.no_grad()
def nearest_tokens(model: FrozenModel, prompt: SoftPrompt, count: int = 5) -> list[list[tuple[str, float]]]:
    """Return, for each virtual token, the vocabulary's nearest tokens and their cosine similarity, best first.

    This is how Lester et al. (2021, section 7) read a prompt. Similarities far below 1 say that the virtual token is
    no word any more.

    Args:
        model: the model that the prompt was trained on.
        prompt: `[P, H]`.
        count: how many tokens each.

    Raises:
        PromptError: the prompt was trained on another model, or is a deep prefix, which has no embeddings.
    """
    require_fit(prompt, model)
    if prompt.method == "prefix-tuning":
        raise PromptError("a deep prefix has keys and values at every layer, but no embeddings that lie next to words")
    virtual = normalize(prompt.weights, dim=1)
    size = min(model.vocabulary_size, len(model.tokenizer))  # a padded table has rows that stand for nothing
    parts = []
    for first in range(0, size, _AT_ONCE):
        rows = model.embed(range(first, min(first + _AT_ONCE, size))).float().cpu()
        parts.append(virtual @ normalize(rows, dim=1).T)
    best = torch.cat(parts, dim=1).topk(min(count, size), dim=1)
    return [
        [(str(model.tokenizer.decode([i])), round(float(s), 4)) for i, s in zip(ids, similarities, strict=True)]
        for ids, similarities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
