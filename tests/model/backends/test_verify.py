"""Which backend a model gets where the load check's short texts cannot show it: long windows, quantized weights."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoConfig, PreTrainedModel

from softprompt.errors import ModelError
from softprompt.model.backends.attention import LengthBucket
from softprompt.model.backends.differences import step_differences
from softprompt.model.backends.packed import PackedBackend
from softprompt.model.backends.reference import Reference
from softprompt.model.backends.tiny_copy import WINDOW, sliding_window, tiny_copy
from softprompt.model.backends.verify import freeze
from softprompt.model.frozen import FrozenModel
from tiny_models import ARCHITECTURES, tiny_model
from tiny_tokenizers import tiny_tokenizer

WINDOWED = ["mistral", "qwen2-window", "gemma2", "gemma3", "phi3", "gpt-oss", "phimoe"]
LONG = 64  # no text of the load check is so long


def long_window(architecture: str) -> PreTrainedModel:
    return tiny_model(architecture, sliding_window=LONG)


@pytest.mark.parametrize("architecture", WINDOWED)
def test_model_with_a_long_window_gets_the_backend_of_its_kind(architecture: str) -> None:
    assert freeze(long_window(architecture), tiny_tokenizer()).backend.name == ARCHITECTURES[architecture][0]


@pytest.mark.parametrize("architecture", WINDOWED)
def test_backend_that_forgets_a_long_window_is_found_out(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = long_window(architecture)
    right = LengthBucket.mask
    # The packed attention, gone wrong: every token sees all that came before it.
    monkeypatch.setattr(LengthBucket, "mask", lambda self, _window, like: right(self, None, like))
    wrong = FrozenModel(model, tiny_tokenizer(), PackedBackend(model), "")
    assert max(step_differences(Reference(model), wrong)) < 1e-3  # not by the model itself
    assert freeze(model, tiny_tokenizer()).backend.name == "padded"


def test_a_window_that_only_some_layers_have_is_found_in_the_miniature() -> None:
    """GPT-Neo keeps its window in a buffer of its own, which the packed backend cannot know."""
    kinds = [[["global", "local"], 2]]
    config = GPTNeoConfig(vocab_size=400, hidden_size=32, num_layers=4, num_heads=4, attention_types=kinds)
    model = freeze(AutoModelForCausalLM.from_config(config), tiny_tokenizer())
    assert sliding_window(config) == 256
    assert model.backend.name == "padded"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_miniature_is_of_the_models_kind_and_small(architecture: str) -> None:
    model = tiny_model(architecture)
    before = model.config.to_dict()
    small = tiny_copy(model)
    assert type(small) is type(model)
    assert model.config.to_dict() == before
    assert sum(p.numel() for p in small.parameters()) < 1_000_000
    assert next(small.parameters()).dtype == torch.float32
    if (window := sliding_window(model.config)) is not None:
        assert sliding_window(small.config) == min(window, WINDOW)


def test_a_model_that_takes_no_embeddings_but_those_of_tokens_is_refused() -> None:
    """As Gemma 4 does where its layers have embeddings of their own: it looks up which token each one is."""
    model = tiny_model("llama")
    table = model.get_input_embeddings().weight

    def looked_up(_module: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        given = kwargs.get("inputs_embeds")
        if isinstance(given, torch.Tensor) and not all((table == each).all(dim=1).any() for each in given[0]):
            raise RuntimeError("these are no embeddings of tokens")

    model.model.register_forward_pre_hook(looked_up, with_kwargs=True)
    with pytest.raises(ModelError):
        freeze(model, tiny_tokenizer())


def test_building_a_miniature_leaves_the_random_state() -> None:
    model = tiny_model("mistral")
    before = torch.get_rng_state()
    tiny_copy(model)
    assert torch.equal(torch.get_rng_state(), before)
