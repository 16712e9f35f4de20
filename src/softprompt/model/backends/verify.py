"""Which way a model gets: tested on the loaded model, not looked up in a list of names."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.errors import ModelError
from softprompt.model.backends.base import Backend
from softprompt.model.backends.differences import Differences, Plain
from softprompt.model.backends.packed import PackedBackend
from softprompt.model.backends.padded import PaddedBackend, PaddedByLengthBackend
from softprompt.model.backends.tiny_copy import shows_itself, tiny_copy
from softprompt.model.finite import what_is_not_finite
from softprompt.model.frozen import FrozenModel
from softprompt.private_interfaces import input_device

logger = logging.getLogger(__name__)

BACKENDS: tuple[type[Backend], ...] = (PackedBackend, PaddedBackend, PaddedByLengthBackend)
_FEW = 5_000_000  # parameters: a model that is as quick to check as a miniature of it
# What rounding may do; docs/decisions.md has the measurements. A miniature's results are those of plain transformers
# to 2e-6, and what was broken on purpose (masks, positions, scalings, windows, caps) moved them by 2e-3 at least.
# Weights that were learned have outliers, and many layers add up: rounding does more there.
_EXACT = 1e-4
_ROUNDING = {
    torch.float32: Differences(1e-3, 1e-3),
    torch.float16: Differences(3e-3, 3e-2),
    torch.bfloat16: Differences(1e-2, 1e-1),
}


@dataclass(frozen=True)
class Subject:
    """A model that ways are tried on, and what may differ there."""

    plain: Plain
    hf_model: PreTrainedModel
    allowed: Differences
    whole: bool  # whether micro-batches and decoding are tried on it as well: not on a large model that has a tiny copy


def freeze(
    hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str = "", revision: str | None = None
) -> FrozenModel:
    """Freeze a transformers model and give it the first way that is exact on this very model.

    Args:
        hf_model: a causal language model; it is put in eval mode and its weights take no gradient any more.
        tokenizer: its tokenizer.
        source, revision: what it was loaded from, noted in the prompts that are trained on it.

    Raises:
        ModelError: no way gives the concatenated reference's loss and gradient, or the model's numbers are not finite.
    """
    hf_model = hf_model.eval().requires_grad_(False)
    tried = subjects(hf_model)
    wrong: dict[str, str] = {}
    for kind in BACKENDS:
        try:
            fault, shares = _fault(kind, tried, tokenizer)
        except Exception as error:  # whatever a foreign model raises, the way is not for it
            fault, shares = f"{type(error).__name__}: {str(error).split(chr(10))[0]}", False
        if fault is None:
            name = source or str(hf_model.name_or_path)
            if not shares:
                logger.info("%s counts padding in its cache, or keeps something else there", _kind(hf_model))
            return FrozenModel(hf_model, tokenizer, kind(hf_model, shares), name, revision)
        wrong.setdefault(fault, kind.name)
    raise ModelError(
        f"{_kind(hf_model)} cannot share a prompt between examples exactly ("
        f"{'; '.join(f'{name}: {fault}' for fault, name in wrong.items())})"
        f"{_without_keys(hf_model)}"
    )


def _fault(kind: type[Backend], tried: list[Subject], tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, bool]:
    """Return what is wrong with a way, None for nothing; and whether rows can be continued in one shared cache."""
    shares = True
    for subject in tried:
        model = FrozenModel(subject.hf_model, tokenizer, kind(subject.hf_model), "")
        loss, gradient = subject.plain.differences(model, cut=subject.whole)
        if not (loss <= subject.allowed.loss and gradient <= subject.allowed.gradient):
            return f"loss differs by {_shown(loss)} and gradient by {_shown(gradient)}", False
        if subject.whole:
            apart, together = subject.plain.decoding(model)
            if not apart <= subject.allowed.gradient:
                return f"texts of unlike lengths in one batch: logits differ by {_shown(apart)}", False
            shares = together <= subject.allowed.gradient
    return None, shares


def _shown(difference: float) -> str:
    return f"{difference:.2%}" if difference < 1e3 else "more than can be"


def subjects(hf_model: PreTrainedModel) -> list[Subject]:
    """Return what ways are tried on: the model, and a miniature of it in float32, or one of the two.

    A model that is tiny, in float32 and without a long window shows all by itself. A quantized model is tested on the
    miniature alone: with LLM.int8, a row's results change with the rows beside it by more than a wrong mask would
    change them (14 % of a gradient on SmolLM2-135M), in any way of running it. In half precision, rounding hides what
    the miniature shows.

    Raises:
        ModelError: the model does not run on embeddings, or its own loss or gradient is not finite.
    """
    quantized = bool(getattr(hf_model, "is_quantized", False))
    shows = hf_model.dtype == torch.float32 and not quantized and shows_itself(hf_model.config)
    tiny = hf_model.num_parameters() <= _FEW
    small = None if shows and tiny else _small_subject(hf_model, not shows)
    if small is not None and quantized:
        return [small]
    try:
        plain = Plain(hf_model)
    except Exception as error:  # whatever a foreign model raises
        reason = f"{type(error).__name__}: {str(error).split(chr(10))[0]}"
        raise ModelError(f"{_kind(hf_model)} cannot run on the embeddings of a prompt ({reason})") from error
    if not plain.finite:
        raise ModelError(f"{_kind(hf_model)} gives numbers that are not finite: {what_is_not_finite(hf_model)}")
    allowed = _ROUNDING.get(hf_model.dtype, _ROUNDING[torch.float32])
    own = Subject(plain, hf_model, allowed, whole=small is None)
    return [own] if small is None else [small, own]


def _small_subject(hf_model: PreTrainedModel, needed: bool) -> Subject | None:
    """Return a miniature to try ways on; None where none can be made and run, which is warned of where it is needed."""
    try:
        small = tiny_copy(hf_model)
        plain = Plain(small)
        if plain.finite:
            return Subject(plain, small, Differences(_EXACT, _EXACT), whole=True)
        reason = "its numbers are not finite"
    except Exception as error:  # a foreign configuration can resist in any way
        reason = f"{type(error).__name__}: {error}"
    if needed:
        logger.warning(
            "%s could be checked in its own precision and on short texts alone; no tiny copy of it could be made (%s)",
            _kind(hf_model),
            reason,
        )
    return None


def _kind(hf_model: PreTrainedModel) -> str:
    return type(hf_model).__name__


@torch.no_grad()
def _without_keys(hf_model: PreTrainedModel) -> str:
    """Say that layers keep no keys and values, where a model's own cache shows it."""
    try:
        one = torch.zeros(1, 1, dtype=torch.long, device=input_device(hf_model))
        layers = getattr(hf_model(input_ids=one, use_cache=True).get("past_key_values"), "layers", [])
    except Exception:  # whatever a foreign model raises, this is said of those that run
        return ""
    count = hf_model.config.get_text_config().num_hidden_layers
    keep = sum(isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers)
    if keep >= count:
        return ""
    return f": {keep} of its {count} layers keep keys and values; recurrent and hybrid models are not supported"
