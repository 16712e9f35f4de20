"""How far a model's backend is from the reference, on the same few texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from softprompt.model.backends.decode import DecodeBatch, OwnPrefixBatch, SharedCacheBatch
from softprompt.model.backends.reference import Reference
from softprompt.model.frozen import FrozenModel
from softprompt.model.gradient import prompt_gradient
from softprompt.model.prefix import Prefix

# The rows that take the second token: one is dropped, one doubled, and others change places, as beams do.
_SELECTED = (3, 1, 1, 0)


def step_differences(reference: Reference, model: FrozenModel, cut: bool = True) -> tuple[float, float]:
    """Return the largest relative differences of loss and gradient; infinite where they are not finite.

    The texts are run at once and, if `cut`, as two micro-batches too.
    """
    losses, gradients = [], []
    examples = reference.examples
    for micro_batches in [[examples], [examples[:2], examples[2:]]][: 2 if cut else 1]:
        loss, gradient = prompt_gradient(model, reference.prompt, reference.shared_text_ids, micro_batches)
        losses.append(abs(loss - reference.loss) / abs(reference.loss))
        gradients.append(float((gradient - reference.gradient).norm() / reference.gradient.norm()))
    return _largest(losses), _largest(gradients)


@torch.no_grad()
def decoding_differences(reference: Reference, model: FrozenModel) -> tuple[float, float]:
    """Compare a batch of texts of unlike lengths, after unlike prefixes, with plain passes of each row alone.

    The backend runs the texts; then each row takes two tokens.

    Returns:
        Differences of logits, relative to their spread: with a prefix of its own for each row, and with all rows in one
        cache of the model's own; infinite where a pass fails.
    """
    by_dropped = {
        dropped: model.prefix(reference.prompt[dropped:]) if dropped < len(reference.prompt) else Prefix()
        for dropped in set(reference.dropped_virtual_tokens)
    }
    logits, prefixes = model.backend.prefill([by_dropped[n] for n in reference.dropped_virtual_tokens], reference.texts)
    prefilled = _logits_difference(reference, logits, 0, range(len(reference.texts)))
    own_prefixes = _decoded_difference(reference, OwnPrefixBatch(model.backend.prefill, prefixes))
    try:
        batch = SharedCacheBatch(model.hf_model, model.backend.running, prefixes)
        shared_cache = _decoded_difference(reference, batch)
    except Exception:  # what a foreign model's cache holds may have another shape than what its attention uses
        shared_cache = math.inf
    return _largest([prefilled, own_prefixes]), _largest([prefilled, shared_cache])


def _decoded_difference(reference: Reference, batch: DecodeBatch) -> float:
    first, second = reference.next_ids
    differences = [_logits_difference(reference, batch.step(first), 1, range(len(first)))]
    batch.select(_SELECTED)
    differences.append(_logits_difference(reference, batch.step([second[i] for i in _SELECTED]), 2, _SELECTED))
    return _largest(differences)


def _logits_difference(reference: Reference, logits: Tensor, step: int, texts: Sequence[int]) -> float:
    """Return the largest difference of rows' logits `[rows, V]` after so many tokens, each from its text's own."""
    return _largest([_relative(row, reference.decoded_logits[i][step]) for row, i in zip(logits, texts, strict=True)])


def _relative(ours: Tensor, expected: Tensor) -> float:
    """Return the difference of logits `[V]`, relative to their spread; very unlikely tokens count as equal."""
    near, wanted = ((logits.float() - logits.float().amax()).clamp(min=-50) for logits in (ours, expected))
    return float((near - wanted).norm() / (wanted - wanted.mean()).norm())


def _largest(differences: Sequence[float]) -> float:
    """Return the largest, infinite where one is NaN: `max` drops a NaN that is not the first."""
    return max((math.inf if math.isnan(each) else each) for each in differences)
