"""Which way a model gets: tested on the loaded model, not looked up in a list of names."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.data.examples import Example
from softprompt.errors import ModelError
from softprompt.model.cached import Cached
from softprompt.model.concatenated import concatenated_loss
from softprompt.model.frozen import FrozenModel
from softprompt.model.gradient import prompt_gradient
from softprompt.model.packed import Packed
from softprompt.model.way import Way

WAYS: tuple[type[Way], ...] = (Packed, Cached)
# Rounding moves float32 results by about 1e-6, and those of bfloat16, on a real model, by a few hundredths. A wrong
# mask or position moves them by a tenth or more.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def freeze(
    hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str = "", revision: str | None = None
) -> FrozenModel:
    """Freeze a transformers model and give it the first way that is exact on this very model.

    Args:
        hf_model: a causal language model; it is put in eval mode and its weights take no gradient any more.
        tokenizer: its tokenizer.
        source, revision: what it was loaded from, noted in the prompts that are trained on it.

    Raises:
        ModelError: no way gives the concatenated reference's loss and gradient.
    """
    hf_model = hf_model.eval().requires_grad_(False)
    wrong = []
    for kind in WAYS:
        model = FrozenModel(hf_model, tokenizer, kind(hf_model), source or str(hf_model.name_or_path), revision)
        try:
            difference = largest_difference(model)
        except Exception as error:  # whatever a foreign model raises, the way is not for it
            wrong.append(f"{kind.name}: {type(error).__name__}: {str(error).split(chr(10))[0]}")
            continue
        if difference <= _TOLERANCE.get(hf_model.dtype, 1e-3):
            return model
        wrong.append(f"{kind.name}: loss or gradient differs by {difference:.1%}")
    raise ModelError(
        f"{type(hf_model).__name__} cannot share a prompt between examples exactly ({'; '.join(wrong)}); "
        "recurrent and hybrid models are not supported"
    )


def largest_difference(model: FrozenModel) -> float:
    """Return the larger relative difference, of loss and of gradient, between a model's way and the reference.

    The texts have unlike lengths and a common beginning, one's first token is a target, and there are two
    micro-batches.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocabulary_size, (20,), generator=generator).tolist()
    lead, texts = ids[:2], [ids[2:8], ids[8:11], ids[11:12]]
    examples = [Example((*lead, *text), len(lead) + i % 2) for i, text in enumerate(texts[:2])]
    examples.append(Example((*lead, *texts[2]), len(lead)))
    prompt = model.embed(ids[12:16]).float().requires_grad_()
    reference = concatenated_loss(model.hf_model, prompt, examples) / sum(e.targets for e in examples)
    (wanted,) = torch.autograd.grad(reference, prompt)
    loss, gradient = prompt_gradient(model, prompt, lead, [examples[:2], examples[2:]])
    expected = float(reference.detach())
    by_loss = abs(loss - expected) / abs(expected)
    return max(by_loss, float((gradient - wanted).norm() / wanted.norm()))
