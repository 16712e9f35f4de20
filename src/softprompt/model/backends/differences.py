"""The load check: what a way of running a model gives, against plain transformers on the same few texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.data.encoder import Example
from softprompt.model.backends.decode import DecodeBatch, OwnPrefixBatch, SharedCacheBatch
from softprompt.model.backends.reference import reference_loss
from softprompt.model.frozen import FrozenModel
from softprompt.model.gradient import prompt_gradient
from softprompt.model.prefix import Prefix
from softprompt.private_interfaces import input_device

# The texts behind the common beginning: two so much alike in length that their attention is computed together, others
# not, and one of a single token, which is a target. Some are longer than a miniature's window.
_LENGTHS = (6, 5, 3, 1)
_VIRTUAL = 4
# Decoded, a text each behind all virtual tokens, behind none, behind all but the first, and behind all. Before the
# second token, one row is dropped, one doubled, and others change places, as beams do.
_FEWER = (0, _VIRTUAL, 1, 0)
_PLACES = (3, 1, 1, 0)


class Differences(NamedTuple):
    """Relative differences; infinite where a way gives numbers that are not finite."""

    loss: float
    gradient: float


class Decoding(NamedTuple):
    """Differences of logits, relative to how much they differ among each other; infinite where a pass fails.

    Attributes:
        apart: with a prefix of its own for each row.
        together: with all rows in one cache of the model's own.
    """

    apart: float
    together: float


class Plain:
    """What plain transformers gives for a few texts behind a prompt.

    Args:
        hf_model: a frozen model.

    Attributes:
        loss, gradient: of all target tokens, from one padded batch of concatenated rows.
    """

    def __init__(self, hf_model: PreTrainedModel) -> None:
        self._hf_model, self._embed = hf_model, hf_model.get_input_embeddings()
        generator = torch.Generator().manual_seed(0)
        vocabulary = int(self._embed.num_embeddings)  # type: ignore[arg-type]
        ids: list[int] = torch.randint(vocabulary, (40,), generator=generator).tolist()
        self.shared_text_ids, rest = ids[:2], ids[2 + _VIRTUAL :]
        self._texts = [rest[sum(_LENGTHS[:i]) : sum(_LENGTHS[: i + 1])] for i in range(len(_LENGTHS))]
        self._more = rest[-len(_LENGTHS) :], rest[-2 * len(_LENGTHS) : -len(_LENGTHS)]
        *longer, single = self._texts
        self.examples = [
            Example((*self.shared_text_ids, *text), len(self.shared_text_ids) + i % 2) for i, text in enumerate(longer)
        ]
        self.examples.append(Example((*self.shared_text_ids, *single), len(self.shared_text_ids)))
        # Between tokens, where learning takes it: some models look up which token an embedding is.
        tokens = self._embedded(ids[2 : 2 + _VIRTUAL]).float()
        noise = torch.randn(tokens.shape, generator=generator).to(tokens.device)
        self.prompt = tokens + 0.3 * tokens.std() * noise
        with torch.enable_grad():
            learned = self.prompt.clone().requires_grad_()
            loss = reference_loss(hf_model, learned, self.examples) / sum(e.targets for e in self.examples)
            (self.gradient,) = torch.autograd.grad(loss, learned)
        self.loss = float(loss.detach())

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and bool(torch.isfinite(self.gradient).all())

    def differences(self, model: FrozenModel, cut: bool = True) -> Differences:
        """Return the largest differences of a model's way, the texts at once and, if `cut`, as two micro-batches."""
        found = []
        micro_batch_cuts = [[self.examples], [self.examples[:2], self.examples[2:]]]
        for parts in micro_batch_cuts if cut else micro_batch_cuts[:1]:
            loss, gradient = prompt_gradient(model, self.prompt, self.shared_text_ids, parts)
            away = float((gradient - self.gradient).norm() / self.gradient.norm())
            found.append(Differences(abs(loss - self.loss) / abs(self.loss), away))
        losses, gradients = zip(*found, strict=True)
        return Differences(_largest(losses), _largest(gradients))

    @torch.no_grad()
    def decoding(self, model: FrozenModel) -> Decoding:
        """Compare a batch of texts, unlike in length and behind unlike prefixes, with plain passes of each row alone.

        They are read by the model's way, which is being checked, and take two tokens each.
        """
        behind = {fewer: model.prefix(self.prompt[fewer:]) for fewer in set(_FEWER) - {_VIRTUAL}}
        logits, prefixes = model.prefill([behind.get(fewer, Prefix()) for fewer in _FEWER], self._texts)
        read = self._away(logits, 0, range(len(self._texts)))
        apart = self._continued(OwnPrefixBatch(model.backend.prefill, prefixes))
        try:
            together = self._continued(SharedCacheBatch(model.hf_model, model.backend.running, prefixes))
        except Exception:  # what a foreign model's cache holds may have another shape than what its attention sees
            together = math.inf
        return Decoding(_largest([read, apart]), _largest([read, together]))

    def _continued(self, rows: DecodeBatch) -> float:
        first = self._away(rows.step(self._more[0]), 1, range(len(_PLACES)))
        rows.select(_PLACES)
        return _largest([first, self._away(rows.step([self._more[1][i] for i in _PLACES]), 2, _PLACES)])

    def _away(self, logits: Tensor, taken: int, places: Sequence[int]) -> float:
        """Return how far rows are from plain passes after so many tokens, each from that of the text in its place."""
        return _largest([_apart(row, self._decoded[i][taken]) for row, i in zip(logits, places, strict=True)])

    @cached_property
    @torch.no_grad()
    def _decoded(self) -> list[Tensor]:
        """Per text, the logits after it and after each token that it takes, `[3, V]`, from one plain pass."""
        found = []
        for fewer, text, *more in zip(_FEWER, self._texts, *self._more, strict=True):
            row = torch.cat([self.prompt[fewer:].to(self._hf_model.dtype), self._embedded([*text, *more])]).unsqueeze(0)
            mask = torch.ones(row.shape[:2], dtype=torch.long, device=row.device)
            logits = self._hf_model(inputs_embeds=row, attention_mask=mask, use_cache=False).logits
            found.append(logits[0, -len(more) - 1 :])
        return found

    @torch.no_grad()
    def _embedded(self, ids: Sequence[int]) -> Tensor:
        embedded: Tensor = self._embed(torch.tensor(list(ids), device=input_device(self._hf_model)))
        return embedded


def largest_difference(model: FrozenModel) -> float:
    """Return the larger relative difference, of loss and of gradient, between a model's way and plain transformers."""
    return max(Plain(model.hf_model).differences(model))


def _apart(ours: Tensor, plain: Tensor) -> float:
    """Return how far logits `[V]` are from others, relative to their spread; very unlikely tokens are all alike."""
    near, wanted = ((logits.float() - logits.float().amax()).clamp(min=-50) for logits in (ours, plain))
    return float((near - wanted).norm() / (wanted - wanted.mean()).norm())


def _largest(differences: Sequence[float]) -> float:
    """Return the largest, infinite where one is NaN: `max` drops a NaN that is not the first."""
    return max((math.inf if math.isnan(each) else each) for each in differences)
