"""The load check finds what is wrong on purpose, in every precision; and what is right passes far within its bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import JambaConfig, JambaForCausalLM, PreTrainedModel, RobertaConfig, RobertaForCausalLM

from softprompt.errors import ModelError
from softprompt.model.backends import attention, padded, verify
from softprompt.model.backends.attention import LengthBucket
from softprompt.model.backends.base import Backend
from softprompt.model.backends.differences import decoding_differences, step_differences
from softprompt.model.backends.packed import PackedBackend
from softprompt.model.backends.reference import Reference
from softprompt.model.backends.tiny_copy import tiny_copy
from softprompt.model.backends.verify import freeze, subjects
from softprompt.model.frozen import FrozenModel
from tiny_models import ARCHITECTURES, tiny_model
from tiny_tokenizers import tiny_tokenizer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PACKED = [name for name, (backend, _) in ARCHITECTURES.items() if backend == "packed"]
CACHED = [name for name, (backend, _) in ARCHITECTURES.items() if backend == "padded"]

right_positions, right_mask = LengthBucket.positions, LengthBucket.mask
right_keys, right_scores = attention._with_prefixes, attention._explicit_attention
right_fused = attention.scaled_dot_product_attention


def moved(by: int) -> Callable[[LengthBucket], Tensor]:
    """Positions of the texts alone, not those of a prompt."""
    return lambda self: right_positions(self) + (by if self.prefix_batch.longest else 0)


def hidden(place: int) -> Callable[..., Tensor]:
    """A text does not see one position of its prefix; counted from the prefix's end, which no window hides."""

    def mask(self: LengthBucket, window: int | None, like: Tensor) -> Tensor:
        made = right_mask(self, window, like).clone()
        if self.prefix_batch.longest:
            made[..., self.prefix_batch.longest - place] = torch.finfo(like.dtype).min
        return made

    return mask


def ahead_seen(self: LengthBucket, window: int | None, like: Tensor) -> Tensor:
    """A text's first token sees the second."""
    made = right_mask(self, window, like).clone()
    if self.longest > 1:
        made[..., 0, self.prefix_batch.longest + 1] = 0
    return made


def neighbour_seen(
    bucket: LengthBucket, prompt_states: Any, layer: int, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """A text sees, in its prefix's last place, its neighbour's first token."""
    joined = [states.clone() for states in right_keys(bucket, prompt_states, layer, keys, values)]
    if len(keys) > 1:
        for states, own in zip(joined, (keys, values), strict=True):
            states[:, :, states.shape[2] - own.shape[2] - 1] = own.roll(1, 0)[:, :, 0]
    return joined[0], joined[1]


def window(change: int | None) -> Callable[..., Tensor]:
    """A window that is some positions longer, or forgotten."""

    def mask(self: LengthBucket, size: int | None, like: Tensor) -> Tensor:
        return right_mask(self, None if size is None or change is None else size + change, like)

    return mask


def scaled(query: Tensor, *rest: Any, scale: float | None = None, **more: Any) -> Tensor:
    size = query.shape[-1] ** -0.5 if scale is None else scale
    return right_fused(query, *rest, scale=1.05 * size, **more)


def written_out(**changed: Any) -> Callable[..., Tensor]:
    """Scores without their soft cap, or without sinks; scaled otherwise."""

    def plain(*given: Any) -> Tensor:
        query, key, value, mask, scaling, softcap, sinks = given
        size = query.shape[-1] ** -0.5 if scaling is None else scaling
        values = {"scaling": size * changed.get("times", 1), "softcap": softcap, "sinks": sinks, **changed}
        return right_scores(query, key, value, mask, values["scaling"], values["softcap"], values["sinks"])

    return plain


EVERY = ["llama", "gpt2", "gemma2", "gpt-oss", "mixtral", "qwen2-window"]
# What is replaced, by what, and in which models that changes something.
FAULTS: dict[str, tuple[object, str, object, list[str]]] = {
    "positions one too far": (LengthBucket, "positions", moved(1), EVERY),
    "positions one too near": (LengthBucket, "positions", moved(-1), EVERY),
    "the prefix's last position hidden": (LengthBucket, "mask", hidden(1), EVERY),
    "the prefix's last position but two hidden": (LengthBucket, "mask", hidden(3), EVERY),
    "the next token seen": (LengthBucket, "mask", ahead_seen, [*EVERY, "bloom"]),
    "a neighbour seen": (attention, "_with_prefixes", neighbour_seen, [*EVERY, "bloom"]),
    "a window one too long": (LengthBucket, "mask", window(1), ["mistral", "qwen2-window", "gemma3", "gpt-oss"]),
    "a window one too short": (LengthBucket, "mask", window(-1), ["mistral", "gemma2", "phi3"]),
    "a window forgotten": (LengthBucket, "mask", window(None), ["phimoe", "qwen2-window"]),
    "scores 5 % too large": (
        attention,
        "scaled_dot_product_attention",
        scaled,
        ["llama", "granite", "gemma3", "bloom"],
    ),
    "capped scores 5 % too large": (attention, "_explicit_attention", written_out(times=1.05), ["gemma2", "gpt-oss"]),
    "a soft cap forgotten": (attention, "_explicit_attention", written_out(softcap=None), ["gemma2"]),
    "sinks forgotten": (attention, "_explicit_attention", written_out(sinks=None), ["gpt-oss"]),
}
PLANTED = [(fault, name) for fault, (*_, names) in FAULTS.items() for name in names]


def packed_fault(model: PreTrainedModel, backend: type[Backend] = PackedBackend) -> str | None:
    return verify._fault(backend, subjects(model), tiny_tokenizer())[0]


@pytest.mark.parametrize(("fault", "name"), PLANTED)
def test_a_fault_that_was_planted_is_found_in_every_precision(
    fault: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, what, instead, _ = FAULTS[fault]
    monkeypatch.setattr(where, what, instead)
    for dtype in DTYPES:
        found = packed_fault(tiny_model(name).to(dtype))
        assert found is not None
        assert found.startswith(("loss differs by", "texts of unlike lengths"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_model_whose_packed_backend_is_wrong_gets_the_padded_one(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LengthBucket, "positions", moved(1))
    assert freeze(tiny_model("llama").to(dtype), tiny_tokenizer()).backend.name == "padded"


@pytest.mark.parametrize("fault", ["positions", "a hidden place", "padding seen"])
@pytest.mark.parametrize("name", ["gptj", "falcon-rotary", "falcon-alibi", "mpt"])
def test_model_whose_padded_backend_is_wrong_too_is_refused(
    name: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted in what a model is given along with a filled cache."""
    if fault == "positions" and name in ("falcon-alibi", "mpt"):
        pytest.skip("has no positions but those of the cache")
    right = padded.PaddedBackend.text_pass

    def wrong(self: padded.PaddedBackend, *args: Any, **kwargs: Any) -> Any:
        def given(_module: object, args: Any, inputs: dict[str, Any]) -> Any:
            if inputs.get("past_key_values") is None:  # the output head's own run
                return args, inputs
            changed = dict(inputs)
            if fault == "positions":
                changed["position_ids"] = inputs["position_ids"] + 1
            elif fault == "a hidden place":
                changed["attention_mask"] = inputs["attention_mask"].clone()
                changed["attention_mask"][:, 4] = 0
            else:
                changed["attention_mask"] = torch.ones_like(inputs["attention_mask"])
            return args, changed

        handle = self.hf_model.register_forward_pre_hook(given, with_kwargs=True)
        try:
            return right(self, *args, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(padded.PaddedBackend, "text_pass", wrong)
    for dtype in DTYPES:
        model = tiny_model(name).to(dtype)
        if fault == "padding seen":  # prefixes of one length need no padding, and are run apart
            assert packed_fault(model, padded.PaddedBackend) is not None
            continue
        with pytest.raises(ModelError, match="cannot share a prompt between examples exactly"):
            freeze(model, tiny_tokenizer())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_right_is_far_within_the_bound(name: str) -> None:
    """So far that another machine's rounding does not refuse a model: by a factor of twenty."""
    for model in (tiny_model(name), tiny_copy(tiny_model(name))):
        backend = {"packed": PackedBackend, "padded": padded.PaddedBackend}[ARCHITECTURES[name][0]]
        frozen, reference = FrozenModel(model, tiny_tokenizer(), backend(model), ""), Reference(model)
        found = (*step_differences(reference, frozen), *decoding_differences(reference, frozen))
        assert max(found) < verify._EXACT / 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gets_the_same_backend_in_half_precision(name: str, dtype: torch.dtype) -> None:
    model = freeze(tiny_model(name).to(dtype), tiny_tokenizer())
    assert (model.backend.name, model.backend.shares_cache) == (ARCHITECTURES[name][0], True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_without_a_tiny_copy_is_warned_of(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def resists(_model: PreTrainedModel) -> PreTrainedModel:
        raise ValueError("sizes do not fit")

    monkeypatch.setattr(verify, "tiny_copy", resists)
    assert freeze(tiny_model("llama").to(dtype), tiny_tokenizer()).backend.name == "packed"
    assert "no tiny copy of it could be made (ValueError: sizes do not fit)" in caplog.text
    caplog.clear()
    monkeypatch.setattr(verify, "MAX_TINY_PARAMETERS", 0)  # a large model in float32 shows all by itself
    assert freeze(tiny_model("llama"), tiny_tokenizer()).backend.name == "packed"
    assert not caplog.text


def test_a_large_model_is_checked_in_part_and_its_tiny_copy_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = subjects(tiny_model("llama"))
    assert whole.whole
    monkeypatch.setattr(verify, "MAX_TINY_PARAMETERS", 0)
    small, large = subjects(tiny_model("llama"))
    assert (small.whole, large.whole) == (True, False)
    assert small.allowed < large.allowed


def test_a_difference_that_is_not_a_number_is_none_that_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`max` of 0 and NaN is 0."""
    nothing = torch.full((4, 32), float("nan"))
    calls = iter([(1.0, torch.zeros(4, 32)), (float("nan"), nothing)])
    monkeypatch.setattr("softprompt.model.backends.differences.prompt_gradient", lambda *_args: next(calls))
    model = tiny_model("llama")
    found = step_differences(Reference(model), FrozenModel(model, tiny_tokenizer(), PackedBackend(model), ""))
    assert found == (float("inf"), float("inf"))


def test_only_models_whose_layers_keep_nothing_are_called_recurrent() -> None:
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    jamba = JambaConfig(
        **sizes, num_hidden_layers=4, num_key_value_heads=2, num_experts=2, attn_layer_period=2, attn_layer_offset=1
    )
    with pytest.raises(ModelError, match="4 layers keep keys and values; recurrent and hybrid models are not"):
        freeze(JambaForCausalLM(jamba), tiny_tokenizer())
    # It counts positions from the padding id on, also where they are given.
    roberta = RobertaForCausalLM(RobertaConfig(**sizes, num_hidden_layers=2, is_decoder=True))
    with pytest.raises(ModelError, match="gradient by") as refused:
        freeze(roberta, tiny_tokenizer())
    assert "recurrent" not in str(refused.value)
