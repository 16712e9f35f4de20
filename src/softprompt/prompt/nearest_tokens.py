"""The vocabulary's nearest tokens to each virtual token of a soft prompt."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from softprompt.errors import PromptError
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.loading import require_fit
from softprompt.prompt.soft_prompt import SoftPrompt

CHUNK = 8192  # embeddings that are normalized at once: a vocabulary of 250,000 is not copied whole


@torch.no_grad()
def nearest_tokens(model: FrozenModel, prompt: SoftPrompt, count: int = 5) -> list[list[tuple[str, float]]]:
    """Return, for each virtual token, the vocabulary's nearest tokens and their cosine similarity, best first.

    Lester et al. (2021, section 7) interpret prompts so. A similarity far below 1 means that the virtual token is like
    no word.

    Args:
        model: the model that the prompt was trained on.
        prompt: `[P, H]`.

    Raises:
        PromptError: the prompt was trained on another model, or is a prefix, which has no embeddings.
    """
    require_fit(prompt, model)
    if prompt.method == "prefix-tuning":
        raise PromptError("a learned prefix has keys and values at every layer, and no embeddings")
    virtual = normalize(prompt.weights, dim=1)
    size = min(model.vocabulary_size, len(model.tokenizer))  # a padded table has rows for no token
    parts = []
    for first in range(0, size, CHUNK):
        rows = model.embed(range(first, min(first + CHUNK, size))).float().cpu()
        parts.append(virtual @ normalize(rows, dim=1).T)
    best = torch.cat(parts, dim=1).topk(min(count, size), dim=1)
    return [
        [(str(model.tokenizer.decode([i])), round(float(s), 4)) for i, s in zip(ids, similarities, strict=True)]
        for ids, similarities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
