"""The model's chat template around a row's input: the same tokens in training, evaluation and generation."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.chat_template_utils

from softprompt import TuneConfig, evaluate, generate, load_data, load_prompt, tune
from softprompt.config import GenerateConfig, make_config
from softprompt.data.chat import USUAL_DATE, Chat
from softprompt.data.encoder import Encoder
from softprompt.data.templates import make_format
from softprompt.errors import DataError, SettingsError
from softprompt.model.frozen import FrozenModel
from tiny_models import frozen
from tiny_runs import Command
from tiny_tokenizers import CHAT, tiny_tokenizer, with_chat

ROWS = [{"text": "a fine film", "label": "good"}, {"text": "a dull film, what a waste", "label": "bad"}]


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
        assert choices.input_ids + tail == example.ids
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
    made = generate(
        model, ["a fine film"], prompt, GenerateConfig(max_new_tokens=8), mode="write", virtual_tokens=False
    )
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


DATED = (
    "\n  {%- if not date_string is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y, %H:%M, 100%% %-d') %}{%- endif %}"
    "<system>Today is {{ date_string }}.\n" + CHAT
)


def on(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    """Make it another day, as transformers sees it."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return datetime.datetime.fromisoformat(f"{day}T13:37:05")

    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Clock)


@pytest.mark.parametrize("day", ["2024-07-26", "2025-12-01"])
def test_recorded_date_renders_the_chat_template_of_that_day(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    tokenizer = with_chat()
    codes = "aAbBcdDFHIjmMpSUwWxXyYZeGVu"
    tokenizer.chat_template = (
        "\n  {% if true %}"
        + "|".join(f"{{{{ strftime_now('%{code} %-d {code}') }}}}" for code in codes)
        + "{% endif %}{{ messages[0].content }}"
    )
    on(monkeypatch, day)
    monkeypatch.setattr(
        transformers.utils.chat_template_utils.datetime, "now", lambda: datetime.datetime.fromisoformat(day)
    )
    as_transformers = Chat(tokenizer, None).around("a % d")
    on(monkeypatch, "2031-03-03")
    assert Chat(tokenizer, day).around("a % d") == as_transformers


def test_a_chat_that_prints_the_date_reads_alike_on_every_day(
    model: FrozenModel, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.tokenizer.chat_template = DATED
    data, files, losses = load_data(reviews), list[bytes](), list[float]()
    config = TuneConfig(chat_template=True, max_steps=2, batch_size=4, num_virtual_tokens=3)
    for number, day in enumerate(("2026-01-31", "2026-02-01")):
        on(monkeypatch, day)
        with pytest.warns(UserWarning, match=f"the chat template prints the date: it is {USUAL_DATE} for every row"):
            result = tune(model, data, config, out=tmp_path / f"run-{number}")
        assert result.settings.chat_date == USUAL_DATE
        prompt = load_prompt(tmp_path / f"run-{number}" / "prompt")
        assert prompt.record.chat_date == USUAL_DATE
        files.append((tmp_path / f"run-{number}" / "prompt" / "adapter_model.safetensors").read_bytes())
        losses.append(evaluate(model, data, prompt).metrics["loss"].value)
    assert files[0] == files[1]
    assert losses[0] == losses[1]
    ids = Encoder(model.tokenizer, prompt.format, 512).inputs([ROWS[0]])[0]
    assert "Today is 26 Jul 2024, 00:00, 100% 26." in model.tokenizer.decode(ids)


def test_another_date_can_be_asked_for(model: FrozenModel, reviews: Path) -> None:
    model.tokenizer.chat_template = DATED
    data = load_data(reviews)
    config = TuneConfig(chat_template=True, chat_date="2025-03-01", max_steps=1, num_virtual_tokens=3)
    prompt = tune(model, data, config).prompt
    assert prompt.record.chat_date == "2025-03-01"
    own = evaluate(model, data, prompt).without_prompt["loss"].value  # type: ignore[index]
    assert evaluate(model, data, chat_template=True, chat_date="2025-03-01").metrics["loss"].value == pytest.approx(own)
    with pytest.raises(SettingsError, match=r"chat_date.*not a day; write year, month and day"):
        make_config(TuneConfig, {"chat_date": "tomorrow"})


def test_a_prompt_without_a_date_reads_todays_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = with_chat()
    tokenizer.chat_template = DATED
    form = make_format("classification", ["bad", "good"], chat_template=True)
    on(monkeypatch, "2026-02-01")
    with pytest.warns(UserWarning, match="was tuned before dates were recorded: it reads today's"):
        ids = Encoder(tokenizer, form, 512).inputs([ROWS[0]])[0]
    assert "Today is 01 Feb 2026, 13:37" in tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('only system messages') }}", "only system messages"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].content[0].text }}{{ messages[0].nothing.at_all }}", "has no attribute"),
        ({"tool_use": CHAT, "rag": CHAT}, "no default specified"),
        ("{{ messages | nofilter }}", "No filter named"),
    ],
)
def test_a_chat_template_that_fails_is_the_models_fault_and_told(
    template: Any, reason: str, model: FrozenModel, reviews: Path, tmp_path: Path
) -> None:
    model.tokenizer.chat_template = template
    data = load_data(reviews)
    for verb in (
        lambda: tune(model, data, TuneConfig(chat_template=True, max_steps=1), out=tmp_path / "run"),
        lambda: evaluate(model, data, chat_template=True),
    ):
        with pytest.raises(SettingsError, match=rf"fails on a user's message: .*{reason}.* Leave chat_template out"):
            verb()
    assert not (tmp_path / "run").exists()


def test_a_dictionary_with_a_default_is_read(model: FrozenModel) -> None:
    model.tokenizer.chat_template = {"default": DATED, "tool_use": "x"}
    assert "26 Jul 2024" in Chat(model.tokenizer, USUAL_DATE).around("a")


def test_the_command_tells_of_a_broken_chat_template(
    fails: Command, llama_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    tokenizer = with_chat()
    tokenizer.chat_template = "{{ raise_exception('no users') }}"
    folder = tmp_path / "model"
    folder.mkdir()
    for file in llama_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(folder)
    for verb in (["tune", reviews, "--out", "run"], ["check", reviews], ["evaluate", "none", reviews]):
        assert "no users" in fails(*verb, "--model", folder, "--set", "chat_template=true").err
    assert not (tmp_path / "run").exists()
