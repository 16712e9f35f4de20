"""Labels: those that look the same are one, those that look nearly the same are named with their counts."""

from __future__ import annotations

import json
import unicodedata
import warnings
from pathlib import Path

import pytest

from softprompt import TuneConfig, evaluate, load_data, load_prompt, tune
from softprompt.data.labels import clean_label
from softprompt.data.templates import make_format
from softprompt.errors import DataError
from softprompt.model.frozen import FrozenModel
from tiny_runs import SHORT, Command

FIXTURES = Path(__file__).parents[1] / "fixtures" / "version-1"


def labels_of(*labels: str) -> list[str]:
    return load_data([{"text": str(i), "label": label} for i, label in enumerate(labels)]).labels


@pytest.mark.parametrize(
    ("one", "same"),
    [
        ("é", "e\u0301"),
        ("é", "e\u200b\u0301"),
        ("가", "\u1100\u1161"),
        ("Å", "\u212b"),
        ("x", "x\u200b"),
        ("x", "\ufeffx"),
        ("x", "x\u00ad"),
        ("x", "\u200ex\u200f"),
        ("x", "x\u2060"),
        ("x", "x\u200d"),
        ("x", "x\u200c"),
        ("xy", "x\u200dy"),
        ("x", "x\x00"),
        ("x", "x\U000e0041"),
        ("x", "x\U000e0001"),
        ("a b", "a  b"),
        ("a b", "a\u00a0b"),
        ("a b", "a\u202f\u3000b"),
        ("a b", "a\tb"),
        ("a b", "a\r\nb"),
        ("a b", "a\u3164b"),
        ("x", "\u00a0x\u2003"),
    ],
    ids=ascii,
)
def test_labels_that_look_the_same_are_one(one: str, same: str) -> None:
    assert labels_of(one, same) == [one]


@pytest.mark.parametrize(
    "label",
    [
        "می\u200cخواهم",  # Persian
        "क्\u200dष",  # Devanagari, a joiner behind a virama
        "ශ්\u200dරී",  # Sinhala
        "👨\u200d👩\u200d👧",
        "👩🏽\u200d💻",
        "❤\ufe0f",
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # England's flag
        "été ☕",
        "C++",
        "\u0661\u0662",
    ],
)
def test_what_makes_a_difference_to_readers_stays(label: str) -> None:
    assert clean_label(label) == unicodedata.normalize("NFC", label)
    assert clean_label(clean_label(label)) == clean_label(label)


@pytest.mark.parametrize("label", ["\u200b", "\ufeff", "\u00ad \u200b", "\u200d", "\u2800"])
def test_label_that_looks_empty_is_refused(label: str) -> None:
    with pytest.raises(DataError, match="row 1: the column 'label' is empty"):
        labels_of(label)


def test_texts_and_targets_are_left_as_they_are() -> None:
    odd = "e\u0301 \u200b a\u00a0\u00a0b"
    assert load_data([{"text": odd, "label": "a"}])[0]["text"] == odd
    assert load_data([{"input": odd, "target": odd}])[0]["target"] == odd


def test_labels_that_look_alike_are_named_with_their_counts_once() -> None:
    counts = {"Positive": 3, "positive": 2, "positive.": 1, "neg_ative": 1, "neg ative": 2, "other": 4}
    rows = [{"text": f"{label} {i}", "label": label} for label, count in counts.items() for i in range(count)]
    with pytest.warns(UserWarning, match="look alike") as caught:
        assert load_data(rows).labels == sorted(counts)
    (message,) = [str(warning.message) for warning in caught]
    assert "'Positive' (3 rows), 'positive' (2 rows), 'positive.' (1 rows)" in message
    assert "'neg ative' (2 rows), 'neg_ative' (1 rows)" in message
    assert "other" not in message


@pytest.mark.parametrize(
    ("one", "other"),
    [("straße", "STRASSE"), ("1", "1.0"), ("x²", "x2"), ("positive", "pоsitive"), ("«ja»", "ja"), ("❤", "❤\ufe0f")],
)
def test_pairs_that_look_alike(one: str, other: str) -> None:
    with pytest.warns(UserWarning, match="look alike"):
        labels_of(one, other, "more")


@pytest.mark.parametrize(
    "labels",
    [
        ("C", "C++", "C#"),
        ("+", "-"),
        ("1", "-1"),
        ("!", "?"),
        ("1234567", "1234568"),
        ("1.5", "15"),
        ("a", "ä"),
        ("0", "00a"),
    ],
)
def test_labels_that_only_resemble_each_other_are_nothing_to_warn_of(labels: tuple[str, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert labels_of(*labels) == sorted(labels)


def test_verbalizers_may_name_labels_as_the_file_has_them() -> None:
    form = make_format("classification", ["é", "x"], verbalizers={"e\u0301": "good", "x\u200b": "bad"})
    assert dict(form.verbalizers) == {"é": "good", "x": "bad"}


def test_an_older_prompt_whose_labels_have_invisible_characters_fits_the_rows(
    llama: FrozenModel, tmp_path: Path
) -> None:
    rows = load_data([{"text": f"a {i}", "label": "ab"[i % 2]} for i in range(30)])
    folder = tune(llama, rows, TuneConfig(max_steps=1, num_virtual_tokens=3)).prompt.save(tmp_path / "prompt")
    record = json.loads((folder / "softprompt.json").read_text())
    record["verbalizers"] = {"a\u200b": "good  one", "b": "bad"}
    record["label_bias"] = {"a\u200b": 0.5, "b": -0.5}
    (folder / "softprompt.json").write_text(json.dumps(record))
    assert evaluate(llama, rows[:10], load_prompt(folder)).rows == 10


def test_rows_each_with_a_label_of_its_own_are_warned_of(command: Command, llama_folder: Path) -> None:
    Path("rows.csv").write_text("text,label\n" + "".join(f"a {i},name {i}\n" for i in range(40)))
    done = command("check", "rows.csv", "--model", llama_folder, *SHORT)
    assert done.code == 0
    assert "softprompt: warning: rows.csv: each of the 40 rows has a label of its own" in done.err
    assert "--map input=… --map target=…" in done.err
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data([{"text": f"a {i}", "label": f"name {i % 39}"} for i in range(40)])


def test_the_hash_of_plain_rows_is_what_it_was() -> None:
    record = json.loads((FIXTURES / "prompt" / "softprompt.json").read_text())
    assert load_data(FIXTURES / "rows.csv").sha256 == record["data"]["training_data"]
