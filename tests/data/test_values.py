"""Values: one spelling for each, wherever it comes from, and nothing that is not one text or one number."""

from __future__ import annotations

import datetime
import decimal
import enum
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from softprompt import TuneConfig, evaluate, load_data, tune
from softprompt.data.values import scalar_text
from softprompt.errors import DataError
from softprompt.model.frozen import FrozenModel
from tiny_runs import Command


class Stars(enum.Enum):
    TWO = 2
    GOOD = "good"
    BOTH = (1, 2)


class Mood(str, enum.Enum):
    GOOD = "good"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("1.0", "1.0"),  # as typed
        (np.str_("good"), "good"),
        (b"good", "good"),
        (1, "1"),
        (1.0, "1"),
        (-0.0, "0"),
        (0, "0"),
        (0.1, "0.1"),
        (1e20, "100000000000000000000"),
        (1e22, "1e+22"),
        (True, "true"),
        (False, "false"),
        (np.bool_(True), "true"),
        (np.int64(3), "3"),
        (np.float32(0.1), "0.1"),
        (np.float64(2), "2"),
        (np.array(1), "1"),
        (torch.tensor(1), "1"),
        (torch.tensor(True), "true"),
        (torch.tensor(0.1), "0.1"),
        (torch.tensor(1.0, dtype=torch.bfloat16), "1"),
        (decimal.Decimal("1.00"), "1"),
        (decimal.Decimal("1.10"), "1.1"),
        (Stars.TWO, "2"),
        (Stars.GOOD, "good"),
        (Mood.GOOD, "good"),
        (datetime.date(2020, 1, 2), "2020-01-02"),
        (pd.Timestamp("2020-01-02"), "2020-01-02 00:00:00"),
        (pd.Interval(0, 1), "(0, 1]"),
    ],
)
def test_a_scalar_counts_by_its_value(value: object, text: str) -> None:
    assert scalar_text(value, "label", "row 1") == text
    row = load_data([{"text": "a", "label": value, "more": value}])[0]
    assert (row["label"], row["more"]) == (text, text)
    assert all(type(cell) is str for cell in row.values())


MISSING = [
    None,
    float("nan"),
    np.float32("nan"),
    pd.NA,
    pd.NaT,
    np.datetime64("NaT"),
    np.ma.masked,
    decimal.Decimal("nan"),
]


@pytest.mark.parametrize("value", MISSING, ids=repr)
def test_a_missing_value_is_refused_where_it_is_needed_and_empty_elsewhere(value: object) -> None:
    with pytest.raises(DataError, match="rows, row 2: the column 'label' is empty"):
        load_data([{"text": "a", "label": "b"}, {"text": "c", "label": value}])
    with pytest.raises(DataError, match="rows, row 1: the column 'stars' is empty"):
        load_data([{"text": "a", "stars": value}], {"label": "stars"})
    with pytest.raises(DataError, match="text 3: the column 'text' is empty"):
        scalar_text(value, "text", "text 3")
    assert load_data([{"text": "a", "label": "b", "more": value}])[0]["more"] == ""


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (["x", "y"], r"a list, \['x', 'y'\]; give one text or one number"),
        (("x",), "a list"),
        ([], "a list"),
        ({"a": 1}, "a dictionary"),
        ({"x"}, "of type set"),
        (np.array([1]), "of type ndarray"),
        (torch.tensor([1]), "of type Tensor"),
        (pd.Series([1]), "of type Series"),
        (Stars.BOTH, "a list"),
        (object(), "of type object"),
        (float("inf"), "inf, which is no number"),
        (10**5000, "a number of too many digits"),
        ([{"role": "user", "content": "hi"}], "conversations are not supported yet: give the columns input and target"),
        ([{"from": "human", "value": "hi"}], "conversations are not supported yet"),
    ],
    ids=lambda value: str(type(value)),
)
def test_what_is_not_one_value_is_refused_with_row_and_column(value: object, says: str) -> None:
    rows = [{"text": "a", "label": "b"}, {"text": "c", "label": value}]
    with pytest.raises(DataError, match=f"rows, row 2: the column 'label' holds .*{says}"):
        load_data(rows)
    with pytest.raises(DataError, match=f"rows, row 1: the column 'input' holds .*{says}"):
        load_data([{"input": value, "target": "a"}])
    if not isinstance(value, int):
        assert load_data(rows, task="text")[1]["label"] == str(value), "a column that nothing needs breaks nothing"


def test_conversations_are_said_not_to_be_supported() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    for row in ({"messages": messages}, {"conversations": messages}, {"messages": messages, "id": 1}):
        with pytest.raises(DataError, match="conversations are not supported yet: give the columns input and target"):
            load_data([row])


def test_a_column_of_lists_is_refused_where_the_template_names_it(llama: FrozenModel) -> None:
    rows = load_data([{"text": f"a {i}", "label": "xy"[i % 2], "tags": "t" if i < 3 else ["t"]} for i in range(30)])
    config = TuneConfig(max_steps=1, num_virtual_tokens=3, batch_size=4)
    with pytest.raises(DataError, match="rows, row 4: the column 'tags', which the template names, holds a list"):
        tune(llama, rows, config.model_copy(update={"template": "{{ tags }} {{ text }}"}))
    with pytest.raises(DataError, match="rows, row 4: the column 'tags', which the template names"):
        evaluate(llama, rows, template="{{ tags }} {{ text }}")
    tune(llama, rows, config)


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow", None])
def test_a_data_set_says_the_same_in_every_format(kind: str | None) -> None:
    datasets = pytest.importorskip("datasets")
    records = [{"text": "a", "label": 1, "share": 0.1}, {"text": "b", "label": 0, "share": 1.0}]
    rows = load_data(datasets.Dataset.from_list(records).with_format(kind))
    assert list(rows) == [{"text": "a", "label": "1", "share": "0.1"}, {"text": "b", "label": "0", "share": "1"}]


def test_a_column_that_a_gap_made_one_of_floats_has_the_labels_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label,stars\na,1,\nb,0,5\n")
    frame = pd.read_csv(tmp_path / "rows.csv")
    assert str(frame["stars"].dtype) == "float64"
    assert list(load_data(frame)) == list(load_data(tmp_path / "rows.csv"))


def test_json_and_csv_have_one_spelling_of_numbers_and_truths(tmp_path: Path) -> None:
    cells = ["1", "1.0", "true", "false", "0"]
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "a", "label": {cell}}}\n' for cell in cells))
    (tmp_path / "rows.csv").write_text("text,label\na,1\na,1\na,true\na,false\na,0\n")
    from_json = load_data(tmp_path / "rows.jsonl")
    assert from_json.labels == ["0", "1", "false", "true"]
    assert list(from_json) == list(load_data(tmp_path / "rows.csv"))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("[" * 100_000 + "]" * 100_000, "line 2: lists or objects too deep in each other"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "line 2: lists or objects too deep in each other"),
        ("1" * 5000, "line 2: a number of too many digits; put it in quotes"),
        ("-" + "1" * 5000, "line 2: a number of too many digits"),
    ],
    ids=["lists", "objects", "digits", "negative"],
)
@pytest.mark.parametrize("column", ["label", "more"])
def test_json_that_python_cannot_hold_is_refused_with_its_line(
    fails: Command, llama_folder: Path, column: str, value: str, says: str
) -> None:
    Path("rows.jsonl").write_text(
        f'{{"text": "a", "label": "b"}}\n{{"text": "a", "label": "b", "{column}": {value}}}\n'
    )
    assert f"rows.jsonl, {says}" in fails("check", "rows.jsonl", "--model", llama_folder).err


def test_json_numbers_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for label, says in {"NaN": "row 1: the column 'label' is empty", "Infinity": "'label' holds inf"}.items():
        path.write_text(f'{{"text": "a", "label": {label}}}\n')
        with pytest.raises(DataError, match=says):
            load_data(path)
    path.write_text('{"text": "a", "label": "b", "score": NaN, "most": -Infinity, "large": 1e5000}\n')
    found: dict[str, Any] = load_data(path)[0]
    assert (found["score"], found["most"], found["large"]) == ("", "-inf", "inf")
