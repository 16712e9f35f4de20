"""Tiny random models of several architectures, and a tiny tokenizer, made on the spot."""

from __future__ import annotations

import functools
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: tests never wait for a hub

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from softprompt.model.choice import freeze
from softprompt.model.frozen import FrozenModel

logging.set_verbosity_error()
logging.disable_progress_bar()
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
WORDS = (
    "the parcel never came and I want my money back please classify this text as good or bad label sentiment "
    "positive negative delivery billing returns hello world a fine film a dull film what a waste of time"
)


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens, trained on one sentence; every string can be written in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LIKE_LLAMA = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    **_IDS,
}


def tiny_model(architecture: str) -> PreTrainedModel:
    """A random model, the same each time."""
    torch.manual_seed(0)
    made: PreTrainedModel
    if architecture == "llama":
        made = LlamaForCausalLM(LlamaConfig(**_LIKE_LLAMA))
    elif architecture == "mistral":
        made = MistralForCausalLM(MistralConfig(**_LIKE_LLAMA, sliding_window=6))
    elif architecture == "gemma2":
        made = Gemma2ForCausalLM(Gemma2Config(**_LIKE_LLAMA, head_dim=8, sliding_window=6))
    elif architecture == "gpt2":
        made = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=3, n_head=4, n_positions=256, **_IDS))
    elif architecture == "bloom":
        made = BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=32, n_layer=3, n_head=4, **_IDS))
    else:
        raise ValueError(architecture)
    # Random weights of the usual size give nearly the same logits everywhere; larger ones tell positions apart.
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return made.eval().requires_grad_(False)


def frozen(architecture: str) -> FrozenModel:
    return freeze(tiny_model(architecture), tiny_tokenizer(), f"tiny-{architecture}")


@pytest.fixture(scope="session")
def llama() -> FrozenModel:
    return frozen("llama")


@pytest.fixture(scope="session")
def llama_folder(llama: FrozenModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    llama.hf_model.save_pretrained(folder)
    llama.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Forty labelled rows."""
    good = ["a fine film", "what a fine time", "I want this film", "good text"]
    bad = ["a dull film", "what a waste of time", "I want my money back", "the parcel never came"]
    lines = ["text,label"]
    for i in range(20):
        lines += [f'"{good[i % 4]} {i}",positive', f'"{bad[i % 4]} {i}",negative']
    path = tmp_path / "reviews.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def shared_data(name: str) -> Path:
    """A real data set, where the folder that holds them is there."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"real data set {name} is not here: {path}")
    return path
