"""The model's chat template around a row's input: the same tokens in training, evaluation and generation."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from conftest import frozen, tiny_tokenizer
from softprompt import TuneConfig, evaluate, generate, load_data, load_prompt, tune
from softprompt.config import GenerateConfig
from softprompt.data.examples import Encoder
from softprompt.data.templates import make_format
from softprompt.errors import DataError, SettingsError
from softprompt.model.frozen import FrozenModel
from test_examples import bos_tokenizer

CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS = [{"text": "a fine film", "label": "good"}, {"text": "a dull film, what a waste", "label": "bad"}]


def with_chat() -> PreTrainedTokenizerFast:
    """A tokenizer that puts BOS before every text, with a chat template that brings its own."""
    tokenizer = bos_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def model() -> FrozenModel:
    made = frozen("llama")
    made.tokenizer = with_chat()
    return made


def encoder(max_length: int = 512) -> Encoder:
    return Encoder(with_chat(), make_format("classification", ["bad", "good"], chat_template=True), max_length)


def test_the_input_stands_in_the_chat_and_the_target_follows_it_at_once() -> None:
    tokenizer = with_chat()
    for row, example in zip(ROWS, encoder().examples(load_data(ROWS)), strict=True):
        expected = f"<bos><user>{row['text']}\nLabel:\n<assistant>{row['label']}"
        assert tokenizer.decode(example.ids) == expected
        assert example.ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(example.ids[example.start :]) == row["label"]


def test_labels_and_inputs_are_encoded_like_examples() -> None:
    rows = load_data(ROWS)
    for example, choices, alone, row in zip(
        encoder().examples(rows), encoder().choices(rows), encoder().inputs(list(rows)), rows, strict=True
    ):
        tail = choices.tails[["bad", "good"].index(row["label"])]
        assert choices.stem + tail == example.ids
        assert example.ids[: len(alone)] == alone


def test_a_long_input_is_cut_and_the_chat_stays_whole() -> None:
    rows = load_data([{"text": "what a waste of time " * 60, "label": "bad"}, ROWS[0]])
    short = encoder(40)
    for ids in (short.examples(rows)[0].ids, short.inputs(list(rows))[0]):
        text = with_chat().decode(ids)
        assert len(ids) <= 40
        assert text.startswith("<bos><user>what a waste")
        assert "\nLabel:\n<assistant>" in text
    with pytest.raises(DataError, match="the template's own text does not fit in max_length 6"):
        encoder(6).examples(rows)


def test_a_prompt_remembers_that_it_was_trained_in_a_chat(model: FrozenModel, reviews: Path, tmp_path: Path) -> None:
    data = load_data(reviews)
    config = TuneConfig(chat_template=True, max_steps=2, batch_size=4, num_virtual_tokens=3)
    tune(model, data, config, out=tmp_path / "run")
    prompt = load_prompt(tmp_path / "run" / "prompt")
    assert prompt.record.chat_template
    # Its own base is evaluated in the chat too; a base without a chat reads other tokens.
    base = evaluate(model, data, chat_template=True).metrics["loss"].value
    assert evaluate(model, data, prompt).without_prompt["loss"].value == pytest.approx(base)  # type: ignore[index]
    assert evaluate(model, data).metrics["loss"].value != pytest.approx(base)
    text = "<bos><user>a fine film\nLabel:\n<assistant>"
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    made = generate(model, ["a fine film"], prompt, GenerateConfig(max_new_tokens=8), raw=False, virtual_tokens=False)
    plain = model.hf_model.generate(
        input_ids=model.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"],
        max_new_tokens=8,
        do_sample=False,
    )[0, len(ids) :]
    assert model.tokenizer.decode(plain, skip_special_tokens=True).startswith(made[0])


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    form = make_format("classification", ["bad", "good"], chat_template=True)
    with pytest.raises(SettingsError, match="no chat template; leave chat_template out"):
        Encoder(tiny_tokenizer(), form, 512)


def test_plain_text_has_no_chat() -> None:
    with pytest.raises(SettingsError, match="plain text has no input for a chat"):
        make_format("text", [], chat_template=True)
