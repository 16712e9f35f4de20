"""Which backend a model gets: tested on the loaded model, not looked up in a list of names."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.errors import ModelError
from softprompt.model.backends.base import Backend
from softprompt.model.backends.differences import decoding_differences, step_differences
from softprompt.model.backends.packed import PackedBackend
from softprompt.model.backends.padded import PaddedBackend, PaddedByLengthBackend
from softprompt.model.backends.reference import Reference
from softprompt.model.backends.tiny_copy import shows_all_attention, tiny_copy
from softprompt.model.finite import describe_non_finite
from softprompt.model.frozen import FrozenModel
from softprompt.private_interfaces import input_device

logger = logging.getLogger(__name__)

BACKENDS: tuple[type[Backend], ...] = (PackedBackend, PaddedBackend, PaddedByLengthBackend)
MAX_TINY_PARAMETERS = 5_000_000  # parameters: a model that is as quick to check as a tiny copy of it
# Allowed rounding; docs/decisions.md has the measurements. On tiny copies, the backends differ from the reference by
# 2e-6, and deliberate faults (in masks, positions, scalings, windows, caps) by 2e-3 at least. Trained weights have
# outliers, and rounding accumulates over many layers.
_EXACT = 1e-4
_ROUNDING = {  # of loss and gradient
    torch.float32: (1e-3, 1e-3),
    torch.float16: (3e-3, 3e-2),
    torch.bfloat16: (1e-2, 1e-1),
}


@dataclass(frozen=True)
class Subject:
    """A model that backends are tried on.

    Attributes:
        reference: what plain transformers gives on it.
        hf_model: the model.
        allowed: the largest differences of loss and of gradient (and logits) that pass.
        whole: whether micro-batches and decoding are tried too: not on a large model that has a tiny copy.
    """

    reference: Reference
    hf_model: PreTrainedModel
    allowed: tuple[float, float]
    whole: bool


def freeze(
    hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str = "", revision: str | None = None
) -> FrozenModel:
    """Freeze a transformers model and give it the first backend that is exact on this very model.

    Args:
        hf_model: a causal language model; it is put in eval mode, and its weights no longer take gradients.
        source, revision: what it was loaded from, recorded in the prompts that are trained on it.

    Raises:
        ModelError: no backend gives the reference's loss and gradient, or the model's numbers are not finite.
    """
    hf_model = hf_model.eval().requires_grad_(False)
    tried = subjects(hf_model)
    faults: dict[str, str] = {}
    for kind in BACKENDS:
        try:
            fault, shares_cache = _fault(kind, tried, tokenizer)
        except Exception as error:  # whatever a foreign model raises, the backend is not for it
            fault, shares_cache = _first_line(error), False
        if fault is None:
            if not shares_cache:
                logger.info("%s counts padding in its cache, or stores something else there", _kind(hf_model))
            name = source or str(hf_model.name_or_path)
            return FrozenModel(hf_model, tokenizer, kind(hf_model, shares_cache), name, revision)
        faults.setdefault(fault, kind.name)
    raise ModelError(
        f"{_kind(hf_model)} cannot share a prompt between examples exactly ("
        f"{'; '.join(f'{name}: {fault}' for fault, name in faults.items())})"
        f"{_layers_without_keys(hf_model)}"
    )


def _fault(kind: type[Backend], tried: list[Subject], tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, bool]:
    """Return what is wrong with a backend, None for nothing; and whether rows can be continued in one shared cache."""
    shares_cache = True
    for subject in tried:
        model = FrozenModel(subject.hf_model, tokenizer, kind(subject.hf_model), "")
        loss, gradient = step_differences(subject.reference, model, cut=subject.whole)
        loss_bound, bound = subject.allowed
        if not (loss <= loss_bound and gradient <= bound):
            return f"loss differs by {_percent(loss)} and gradient by {_percent(gradient)}", False
        if subject.whole:
            own_prefixes, shared_cache = decoding_differences(subject.reference, model)
            if not own_prefixes <= bound:
                return f"texts of unlike lengths in one batch: logits differ by {_percent(own_prefixes)}", False
            shares_cache = shared_cache <= bound
    return None, shares_cache


def _percent(difference: float) -> str:
    return f"{difference:.2%}" if difference < 1e3 else "more than 100,000%"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).split(chr(10))[0]}"


def subjects(hf_model: PreTrainedModel) -> list[Subject]:
    """Return what backends are tried on: the model, and a tiny copy of it in float32, or one of the two.

    The model alone is enough where it is tiny, in float32 and without a long window. For a quantized model, the tiny
    copy alone is used: with LLM.int8, a row's results change with the rows beside it by more than a wrong mask would
    change them (14 % of a gradient on SmolLM2-135M), with any backend. In half precision, rounding hides what the tiny
    copy shows.

    Raises:
        ModelError: the model does not run on embeddings, or its own loss or gradient is not finite.
    """
    quantized = bool(getattr(hf_model, "is_quantized", False))
    shows_all = hf_model.dtype == torch.float32 and not quantized and shows_all_attention(hf_model.config)
    tiny = hf_model.num_parameters() <= MAX_TINY_PARAMETERS
    small = None if shows_all and tiny else _tiny_subject(hf_model, not shows_all)
    if small is not None and quantized:
        return [small]
    try:
        reference = Reference(hf_model)
    except Exception as error:  # whatever a foreign model raises
        reason = _first_line(error)
        raise ModelError(f"{_kind(hf_model)} cannot run on the embeddings of a prompt ({reason})") from error
    if not reference.finite:
        raise ModelError(f"{_kind(hf_model)} gives numbers that are not finite: {describe_non_finite(hf_model)}")
    allowed = _ROUNDING.get(hf_model.dtype, _ROUNDING[torch.float32])
    own = Subject(reference, hf_model, allowed, whole=small is None)
    return [own] if small is None else [small, own]


def _tiny_subject(hf_model: PreTrainedModel, needed: bool) -> Subject | None:
    """Return a tiny copy to try backends on; None where none can be made and run, with a warning if it is needed."""
    try:
        small = tiny_copy(hf_model)
        reference = Reference(small)
        if reference.finite:
            return Subject(reference, small, (_EXACT, _EXACT), whole=True)
        reason = "its numbers are not finite"
    except Exception as error:  # a foreign configuration can raise anything
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
def _layers_without_keys(hf_model: PreTrainedModel) -> str:
    """Say that layers keep no keys and values, where a model's own cache shows it."""
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=input_device(hf_model))
        layers = getattr(hf_model(input_ids=token, use_cache=True).get("past_key_values"), "layers", [])
    except Exception:  # whatever a foreign model raises, this is said of those that run
        return ""
    count = hf_model.config.get_text_config().num_hidden_layers
    with_keys = sum(isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers)
    if with_keys >= count:
        return ""
    return f": {with_keys} of its {count} layers keep keys and values; recurrent and hybrid models are not supported"
