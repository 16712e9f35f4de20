"""Tiny tokenizers, made on the spot: one sentence of words, and what real tokenizers add to their texts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from softprompt.model.bundled import SMOLLM2, cached_folder

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


def with_post_processor(processor: Any) -> PreTrainedTokenizerFast:
    copy = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    copy.post_processor = processor
    return PreTrainedTokenizerFast(tokenizer_object=copy, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def bos_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that puts BOS before every text, as Llama's and Gemma's do."""
    return with_post_processor(processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)]))


def trimmed_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose offsets leave out the space that a token begins with, as Pythia's do."""
    return with_post_processor(processors.ByteLevel(trim_offsets=True))


@functools.cache
def straddling_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens reach over words, and over the place where input and target meet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Label: good", "Label: bad", "Label:\ngood", "e:\nL"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def bundled_tokenizer() -> PreTrainedTokenizerFast:
    if not cached_folder(SMOLLM2).exists():
        pytest.skip("the bundled model is not kept here")
    return AutoTokenizer.from_pretrained(cached_folder(SMOLLM2))


TOKENIZERS = {
    "tiny": tiny_tokenizer,
    "bos": bos_tokenizer,
    "trimmed": trimmed_tokenizer,
    "straddling": straddling_tokenizer,
    "bundled": bundled_tokenizer,
}


CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def with_chat() -> PreTrainedTokenizerFast:
    """A tokenizer that puts BOS before every text, with a chat template that brings its own."""
    tokenizer = bos_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer
