"""Base models in fewer bits and base models split over places, both by transformers' own means."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from softprompt import TuneConfig, generate, load_data, tune
from softprompt.data.example import Example
from softprompt.errors import InputError, ModelError
from softprompt.model import load
from softprompt.model.backends.reference import reference_loss
from softprompt.model.backends.verify import subjects
from softprompt.model.fingerprint import fingerprint
from softprompt.model.frozen import FrozenModel
from softprompt.model.gradient import prompt_gradient
from softprompt.model.load import load_model
from tiny_tokenizers import tiny_tokenizer

EXAMPLES = [Example((5, 6, 7, 8, 9, 10), 4), Example((5, 11, 12), 2)]


def made(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "bloom":
        return BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=64, n_layer=3, n_head=4))
    if kind == "gptj":
        return GPTJForCausalLM(GPTJConfig(vocab_size=400, n_embd=64, n_layer=3, n_head=4, rotary_dim=8))
    shape = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2))


@pytest.fixture(params=["llama", "bloom", "gptj"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model whose layers are wide enough for blocks of 64 weights."""
    made(request.param).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def expected_way(folder: Path) -> str:
    return "padded" if "gptj" in (folder / "config.json").read_text() else "packed"


def step(model: FrozenModel) -> tuple[float, torch.Tensor]:
    return prompt_gradient(model, model.embed([20, 21, 22]).float(), (), [EXAMPLES])


def test_a_quantized_model_is_the_same_model_and_learns(folder: Path, reviews: Path) -> None:
    plain = load_model(folder)
    model = load_model(folder, quantization="8bit")
    assert model.hf_model.is_quantized
    assert model.backend.name == expected_way(folder)
    # Its own rows depend on their neighbours, so the backend is checked on another model of the kind.
    assert [getattr(one.hf_model, "is_quantized", False) for one in subjects(model.hf_model)] == [False]
    # What keeps its precision is compared, so that a prompt fits the model in any number of bits.
    assert not fingerprint(plain).differences(fingerprint(model))
    loss, gradient = step(model)
    wanted, exact = step(plain)
    assert loss == pytest.approx(wanted, rel=0.05)
    assert float(torch.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0)) > 0.8
    config = TuneConfig(max_steps=4, batch_size=4, num_virtual_tokens=4, learning_rate=0.1)
    result = tune(model, load_data(reviews), config)
    assert result.metrics["loss"] < 10
    with pytest.warns(UserWarning, match=r"\d+ of the weights of .* are quantized .* could not be checked"):
        assert len(generate(plain, ["a fine film"], result.prompt)) == 1


def test_bits_that_there_are_not_are_named(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"4-bit weights on a CPU; take quantization=8bit"):
        load_model(folder, quantization="4bit", device="cpu")
    with pytest.raises(ModelError, match="unknown quantization '3bit'; allowed are none, 8bit and 4bit"):
        load_model(folder, quantization="3bit")


def test_the_package_that_is_missing_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"needs the package bitsandbytes: pip install 'softprompt\[quantization\]'"):
        load_model(folder, quantization="8bit")


@pytest.mark.parametrize("where", ["auto", {"": "cpu"}])
def test_a_model_that_is_placed_by_a_map_gives_the_same(folder: Path, where: str | dict[str, str]) -> None:
    split, plain = load_model(folder, device_map=where), load_model(folder)
    assert split.backend.name == plain.backend.name
    assert step(split)[0] == pytest.approx(step(plain)[0], rel=1e-6)
    torch.testing.assert_close(step(split)[1], step(plain)[1])
    assert generate(split, ["a fine film"]) == generate(plain, ["a fine film"])


def test_a_map_that_transformers_refuses_is_the_users_error(folder: Path) -> None:
    with pytest.raises(ModelError, match="cannot load"):
        load_model(folder, device_map="sideways")


@pytest.mark.parametrize("kind", ["llama", "bloom", "gptj"])
def test_layers_that_are_brought_in_when_they_run_give_the_same(kind: str) -> None:
    """accelerate moves a split model's tensors by hooks; the backends must leave that to it."""
    from accelerate import cpu_offload

    plain, split = made(kind).eval().requires_grad_(False), made(kind).eval().requires_grad_(False)
    cpu_offload(split, execution_device=torch.device("cpu"), offload_buffers=True)
    backend = type(load.freeze(plain, tiny_tokenizer()).backend)
    prompt = plain.get_input_embeddings()(torch.tensor([20, 21, 22])).detach()
    whole = reference_loss(plain, prompt, EXAMPLES) / sum(e.targets for e in EXAMPLES)
    loss, _ = prompt_gradient(FrozenModel(split, tiny_tokenizer(), backend(split), ""), prompt, (), [EXAMPLES])
    assert loss == pytest.approx(float(whole), rel=1e-5)
