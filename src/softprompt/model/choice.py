"""Which way a model gets: tested on the loaded model, not looked up in a list of names."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.data.examples import Example
from softprompt.errors import ModelError
from softprompt.model.cached import Cached
from softprompt.model.concatenated import concatenated_loss
from softprompt.model.frozen import FrozenModel
from softprompt.model.gradient import prompt_gradient
from softprompt.model.miniature import WINDOW, miniature, sliding_window
from softprompt.model.packed import Packed
from softprompt.model.way import Way

logger = logging.getLogger(__name__)

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
    checked = _models_to_check(hf_model)
    wrong = []
    for kind in WAYS:
        try:
            differences = [
                (largest_difference(FrozenModel(one, tokenizer, kind(one), "")), _TOLERANCE.get(one.dtype, 1e-3))
                for one in checked
            ]
        except Exception as error:  # whatever a foreign model raises, the way is not for it
            wrong.append(f"{kind.name}: {type(error).__name__}: {str(error).split(chr(10))[0]}")
            continue
        if all(difference <= tolerance for difference, tolerance in differences):
            return FrozenModel(hf_model, tokenizer, kind(hf_model), source or str(hf_model.name_or_path), revision)
        wrong.append(f"{kind.name}: loss or gradient differs by {max(differences)[0]:.1%}")
    raise ModelError(
        f"{type(hf_model).__name__} cannot share a prompt between examples exactly ({'; '.join(wrong)}); "
        "recurrent and hybrid models are not supported"
    )


def _models_to_check(hf_model: PreTrainedModel) -> list[PreTrainedModel]:
    """Return what a way is tested on: the model, and a miniature where the model's window is too long to be crossed.

    A quantized model is tested on the miniature alone: with LLM.int8, a row's results change with the rows beside it
    by more than a wrong mask would change them (14 % of a gradient on SmolLM2-135M), in any way of running it.
    """
    quantized = bool(getattr(hf_model, "is_quantized", False))
    window = sliding_window(hf_model.config)
    if not quantized and (window is None or window <= WINDOW):
        return [hf_model]
    try:
        small = miniature(hf_model)
    except Exception as error:  # a foreign configuration can resist in any way
        logger.warning("%s could not be tested across its sliding window: %s", type(hf_model).__name__, error)
        return [hf_model]
    return [small] if quantized else [hf_model, small]


@torch.enable_grad()
def largest_difference(model: FrozenModel) -> float:
    """Return the larger relative difference, of loss and of gradient, between a model's way and the reference.

    The texts have unlike lengths and a common beginning, and one's first token is a target; they are run at once and
    as two micro-batches.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocabulary_size, (20,), generator=generator).tolist()
    lead, texts = ids[:2], [ids[2:8], ids[8:11], ids[11:12]]
    examples = [Example((*lead, *text), len(lead) + i % 2) for i, text in enumerate(texts[:2])]
    examples.append(Example((*lead, *texts[2]), len(lead)))
    # Between tokens, where learning takes it: some models look up which token an embedding is.
    prompt = model.embed(ids[12:16]).float()
    noise = torch.randn(prompt.shape, generator=generator).to(prompt.device)
    prompt = (prompt + 0.3 * prompt.std() * noise).requires_grad_()
    reference = concatenated_loss(model.hf_model, prompt, examples) / sum(e.targets for e in examples)
    (wanted,) = torch.autograd.grad(reference, prompt)
    expected, differences = float(reference.detach()), list[float]()
    for parts in ([examples], [examples[:2], examples[2:]]):
        loss, gradient = prompt_gradient(model, prompt, lead, parts)
        differences += [abs(loss - expected) / abs(expected), float((gradient - wanted).norm() / wanted.norm())]
    return max(differences)
