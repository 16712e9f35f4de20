"""Reading rows: what a file says arrives unchanged, and what cannot be read is named with its place."""

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from softprompt.data.rows import Rows, Task, load_data
from softprompt.errors import DataError, InputError

RECORDS = [
    {"text": "a fine film", "label": "good"},
    {"text": 'he said "no", twice,\nand left', "label": "bad, very"},
    {"text": "ends with a comma,", "label": "été ☕"},
    {"text": " spaces around ", "label": "5"},
]


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def write_csv(path: Path, records: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return path


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def columns(rows: Rows, *names: str) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in names) for row in rows]


@pytest.mark.parametrize("suffix", [".csv", ".CSV", ".jsonl", ".ndjson"])
def test_quotes_commas_line_breaks_and_spaces_arrive_as_they_were_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    (write_csv if suffix.lower() == ".csv" else write_jsonl)(path, RECORDS)
    rows = load_data(path)
    assert list(rows) == RECORDS
    assert rows.task == "classification"
    assert rows.labels == sorted({record["label"] for record in RECORDS})
    assert rows.name == str(path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, suffix: str) -> None:
    path = (write_csv if suffix == ".csv" else write_jsonl)(tmp_path / f"rows{suffix}", RECORDS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert list(load_data(path)) == RECORDS


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_line_endings_of_every_system_are_read(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / "rows.csv", ending.join(["text,label", "one,a", "", "two,b", ""]))
    assert columns(load_data(path), "text", "label") == [("one", "a"), ("two", "b")]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
@pytest.mark.parametrize("quoted", [True, False])
def test_only_line_breaks_end_a_csv_row(tmp_path: Path, character: str, quoted: bool) -> None:
    value = f"one{character}two"
    text = f'"{value}"' if quoted else value
    path = write(tmp_path / "rows.csv", f"text,label\n{text},a\nthree,b\n")
    assert columns(load_data(path), "text", "label") == [(value, "a"), ("three", "b")]


@pytest.mark.parametrize("character", ["\u2028", "\x85", "\x0c"])
def test_only_line_breaks_end_a_jsonl_row(tmp_path: Path, character: str) -> None:
    records = [{"text": f"one{character}two", "label": "a"}]
    assert list(load_data(write_jsonl(tmp_path / "rows.jsonl", records))) == records


@pytest.mark.parametrize(
    ("window", "expected"),
    [("[:50]", range(50)), ("[5:]", range(5, 60)), ("[2:4]", range(2, 4)), ("[:]", range(60)), ("[58:99]", [58, 59])],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_row_range_counts_rows_from_nought(
    tmp_path: Path, suffix: str, window: str, expected: range | list[int]
) -> None:
    records = [{"text": f"row {i}\nof many", "label": str(i % 2)} for i in range(60)]
    path = (write_csv if suffix == ".csv" else write_jsonl)(tmp_path / f"rows{suffix}", records)
    assert columns(load_data(f"{path}{window}"), "text") == [(f"row {i}\nof many",) for i in expected]


def test_a_range_without_rows_is_an_error(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", RECORDS)
    with pytest.raises(DataError, match=r"rows\.csv\[4:\] has no rows"):
        load_data(f"{path}[4:]")


@pytest.mark.parametrize(
    ("header", "mapping", "given", "task", "read"),
    [
        (["text", "label"], {}, None, "classification", {"text": "text", "label": "label"}),
        (["label", "id", "text"], {}, None, "classification", {"text": "text", "label": "label"}),
        (["input", "target"], {}, None, "completion", {"input": "input", "target": "target"}),
        (["prompt"], {}, None, "text", {"text": "prompt"}),
        (["text"], {}, None, "text", {"text": "text"}),
        (["id", "text", "more"], {}, None, "text", {"text": "text"}),
        (["text", "label"], {}, "text", "text", {"text": "text"}),
        (["review", "stars"], {"text": "review", "label": "stars"}, None, "classification", {"text": "review"}),
        (["text", "stars"], {"label": "stars"}, None, "classification", {"text": "text", "label": "stars"}),
        (["q", "a", "text"], {"input": "q", "target": "a"}, None, "completion", {"input": "q", "target": "a"}),
        (["text", "label", "a"], {"input": "text", "target": "a"}, None, "completion", {"input": "text"}),
        (["text", "label"], {"text": "label", "label": "text"}, None, "classification", {"text": "label"}),
        (["act", "prompt"], {"text": "prompt"}, None, "text", {"text": "prompt"}),
    ],
)
def test_the_task_is_found_from_the_columns_and_the_map(
    tmp_path: Path, header: list[str], mapping: dict[str, str], given: Task | None, task: str, read: dict[str, str]
) -> None:
    record = {name: f"value of {name}" for name in header}
    rows = load_data(write_csv(tmp_path / "rows.csv", [record]), mapping, given)
    assert rows.task == task
    for name, column in read.items():
        assert rows[0][name] == record[column]


def test_columns_that_no_task_needs_stay_for_the_template(tmp_path: Path) -> None:
    rows = load_data(write_csv(tmp_path / "rows.csv", [{"text": "a", "label": "b", "title": "c"}]))
    assert rows[0]["title"] == "c"


def test_numbers_are_labels_like_any_other(tmp_path: Path) -> None:
    records = [{"text": "a", "label": 0}, {"text": "b", "label": 10}, {"text": "c", "label": 2}]
    from_jsonl = load_data(write_jsonl(tmp_path / "rows.jsonl", records))
    from_csv = load_data(write(tmp_path / "rows.csv", "text,label\na,0\nb,10\nc,2\n"))
    assert from_jsonl.labels == from_csv.labels == ["0", "10", "2"]


def test_dictionaries_are_read_and_not_changed() -> None:
    given: list[dict[str, Any]] = [{"review": "a", "stars": 1}, {"review": "b", "stars": 5}]
    before = json.dumps(given)
    rows = load_data(iter(given), map={"text": "review", "label": "stars"})
    assert columns(rows, "text", "label") == [("a", "1"), ("b", "5")]
    assert json.dumps(given) == before


def test_a_pandas_data_frame_is_read(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", RECORDS)
    assert list(load_data(pd.read_csv(path))) == list(load_data(path))


def test_rows_can_be_sliced_and_picked() -> None:
    rows = load_data([{"text": str(i)} for i in range(10)])
    assert columns(rows[2:4], "text") == [("2",), ("3",)]
    assert columns(rows.pick([7, 0, 7]), "text") == [("7",), ("0",), ("7",)]
    assert rows[2:4].task == rows.pick([0]).task == "text"


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` caches out of the user's folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_folder_is_read_by_the_hub_loader_split_by_split(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows = write_csv if suffix == ".csv" else write_jsonl
    train = write_rows(folder / f"train{suffix}", RECORDS)
    test = write_rows(folder / f"test{suffix}", RECORDS[1:2])
    assert list(load_data(f"hub:{folder}")) == list(load_data(train))
    assert load_data(f"hub:{folder}").sha256 == load_data(train).sha256
    assert list(load_data(f"hub:{folder}:test")) == list(load_data(test))
    assert list(load_data(f"hub:{folder}:train[1:3]")) == RECORDS[1:3]
    with pytest.raises(DataError, match=r"split 'nope'.*train.*test"):
        load_data(f"hub:{folder}:nope")


@pytest.mark.usefixtures("datasets_cache")
def test_a_data_set_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot load the data set '.*nowhere', split 'train'"):
        load_data(f"hub:{tmp_path / 'nowhere'}")


def test_a_datasets_object_is_read() -> None:
    datasets = pytest.importorskip("datasets")
    assert list(load_data(datasets.Dataset.from_list(RECORDS))) == RECORDS


def test_the_hash_is_of_what_the_rows_say_not_of_how_they_are_stored(tmp_path: Path) -> None:
    from_csv = load_data(write_csv(tmp_path / "rows.csv", RECORDS))
    turned = [dict(reversed(record.items())) for record in RECORDS]
    from_jsonl = load_data(write_jsonl(tmp_path / "rows.jsonl", turned))
    assert from_csv.sha256 == from_jsonl.sha256 == load_data(RECORDS).sha256
    others = [
        load_data(RECORDS[:-1]),
        load_data(RECORDS[::-1]),
        load_data(RECORDS, task="text"),
        load_data([*RECORDS[:-1], {"text": " spaces around ", "label": "6"}]),
    ]
    assert len({rows.sha256 for rows in [from_csv, *others]}) == 5


def test_any_table_survives_csv_and_jsonl(tmp_path: Path) -> None:
    draw = random.Random(0)
    pieces = ["a", "word", " ", ",", '"', "\n", "'", ";", "\\", "é", "日本", "😀", "\t", "{{ x }}", "null", "0"]
    records = [
        {"input": "x" + "".join(draw.choices(pieces, k=12)), "target": "".join(draw.choices(pieces, k=5)) + "y"}
        for _ in range(200)
    ]
    from_csv = load_data(write_csv(tmp_path / "rows.csv", records))
    from_jsonl = load_data(write_jsonl(tmp_path / "rows.jsonl", records))
    assert list(from_csv) == list(from_jsonl) == records


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    write_csv(tmp_path / "reviews.csv", RECORDS)
    with pytest.raises(DataError, match=r"no such file: .*revews\.csv \(did you mean 'reviews\.csv'\?\)"):
        load_data(tmp_path / "revews.csv")
    with pytest.raises(DataError, match=r"did you mean 'reviews\.csv'"):
        load_data(f"{tmp_path / 'reveiws.csv'}[:5]")
    with pytest.raises(DataError, match="no such file"):
        load_data(tmp_path / "no" / "folder" / "rows.csv")


def test_a_name_that_no_file_can_have_is_a_missing_file() -> None:
    with pytest.raises(DataError):
        load_data("the text itself instead of a file's name " * 20)


FAULTS = [
    ("rows.txt", "text\na\n", r"rows\.txt ends in '\.txt'; allowed are \.csv, \.jsonl"),
    ("rows", "text\na\n", r"ends in ''; allowed are \.csv"),
    ("rows.csv", "", "has no rows"),
    ("rows.jsonl", "\n\n", "has no rows"),
    ("rows.csv", "text,label\n", "has no rows"),
    ("rows.csv", "text,label\na,b\nc\n", r"line 3: 1 values where the first line names 2 columns"),
    ("rows.csv", "text,label\na,b\nc,d,e\n", r"line 3: 3 values where the first line names 2"),
    ("rows.csv", 'text,label\n"a\nb",c\nd\n', r"line 4: 1 values"),
    ("rows.csv", 'text,label\na,b\n"c"d,e\n', r"line 3: .*check the quotes"),
    ("rows.csv", 'text,label\na,b\n"c,d\n', r"line 3: .*check the quotes"),
    ("rows.csv", "text,label,text\na,b,c\n", r"names a column twice: text"),
    ("rows.jsonl", '{"text": "a"}\n\n{"text": "b",}\n', r"line 3: not JSON"),
    ("rows.jsonl", '{"text": "a"}\n["b"]\n', r"line 2: must be an object"),
    ("rows.jsonl", '{"text": "a"}\n{"text": "b"\n', r"line 2: not JSON"),
    ("rows.csv", "text,label\na,b\n  ,c\n", r"row 2: the column 'text' is empty"),
    ("rows.csv", 'text,label\na,""\n', r"row 1: the column 'label' is empty"),
    ("rows.jsonl", '{"text": "a", "label": null}\n', r"row 1: the column 'label' is empty"),
    ("rows.jsonl", '{"text": "a", "label": "b"}\n{"text": "c"}\n', r"row 2: the column 'label' is empty"),
    ("rows.csv", "review,stars\na,b\n", r"the columns review, stars: .*--map text=.*--map label=.*--map input="),
    ("rows.csv", "input,label\na,b\n", r"the columns input, label: say what is in them"),
]


@pytest.mark.parametrize(("name", "content", "message"), FAULTS)
def test_a_file_that_cannot_be_read_is_named_with_the_place(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as raised:
        load_data(path)
    assert str(path) in str(raised.value)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder; give a \.csv, \.jsonl or \.parquet file in it, or hub:"):
        load_data(tmp_path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_line_that_is_not_utf8_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    lines = ["text", "fine", "café"] if suffix == ".csv" else ['{"text": "a"}', '{"text": "b"}', '{"text": "é"}']
    write(path, "\n".join(lines), encoding="latin-1")
    with pytest.raises(DataError, match="line 3: not UTF-8"):
        load_data(path)


@pytest.mark.parametrize(
    ("mapping", "task", "message"),
    [
        ({"text": "reveiw"}, None, r"no column 'reveiw' \(did you mean 'review'\?\); it has review, stars"),
        ({"txt": "review"}, None, r"cannot map 'txt' \(did you mean 'text'\?\)"),
        ({"text": "review"}, "classification", r"needs a column 'label'.*add --map label="),
        ({}, "completion", r"needs a column 'input'"),
        ({"label": "stars"}, None, "say what is in them"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(mapping: dict[str, str], task: Task | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data([{"review": "a", "stars": "5"}], mapping, task)


def test_a_parquet_file_holds_what_a_csv_file_holds(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": [r["text"] for r in RECORDS], "stars": [1, 5, 1, 5]})
    frame.to_parquet(tmp_path / "rows.parquet")
    frame.to_csv(tmp_path / "rows.csv", index=False)
    read = load_data(tmp_path / "rows.parquet", {"label": "stars"})
    assert [row["text"] for row in read] == [r["text"] for r in RECORDS]
    assert read.labels == ["1", "5"]
    assert read.sha256 == load_data(tmp_path / "rows.csv", {"label": "stars"}).sha256
    assert [row["text"] for row in load_data(f"{tmp_path}/rows.parquet[1:3]", {"label": "stars"})] == [
        r["text"] for r in RECORDS[1:3]
    ]


def test_a_missing_value_of_a_parquet_file_is_an_empty_one(tmp_path: Path) -> None:
    pd.DataFrame({"text": ["a", None], "label": ["x", "y"]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet, row 2: the column 'text' is empty"):
        load_data(tmp_path / "rows.parquet")


def test_a_file_that_is_no_parquet_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", "text,label\n")
    with pytest.raises(DataError, match=r"rows\.parquet is not a Parquet file"):
        load_data(path)


@pytest.mark.parametrize(
    ("source", "package", "extra"), [("rows.parquet", "pyarrow", "parquet"), ("hub:team/set", "datasets", "hub")]
)
def test_a_package_that_is_missing_is_named(
    source: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "rows.parquet", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)  # it is then not found
    with pytest.raises(InputError, match=rf"package {package}: pip install 'softprompt\[{extra}\]'"):
        load_data(source)


def test_inputs_that_differ_in_spaces_and_capitals_are_one() -> None:
    rows = load_data([{"text": " A  fine\nfilm", "label": "1"}, {"text": "a fine film ", "label": "2"}])
    assert [rows.normalized_input(row) for row in rows] == ["a fine film", "a fine film"]
    asked = load_data([{"input": "What?", "target": "That."}])
    assert asked.normalized_input(asked[0]) == "what?"


def test_a_space_beside_a_label_is_no_other_label() -> None:
    rows = load_data([{"text": "a", "label": "billing"}, {"text": "b", "label": " billing "}])
    assert rows.labels == ["billing"]


def test_a_target_that_a_later_row_has_does_not_go_unnoticed(tmp_path: Path) -> None:
    records = [{"text": "a film"}, {"text": "a waste", "label": "bad"}]
    path = write_jsonl(tmp_path / "rows.jsonl", records)
    with pytest.raises(DataError, match="row 1: it has no 'label', which row 2 has"):
        load_data(path)
    assert load_data(path, task="text").task == "text"
    assert len(load_data([records[0], {**records[1], "label": ""}])) == 2


def test_bytes_of_a_parquet_file_are_texts(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["fine ☕".encode(), b"bad"], "label": [b"pos", b"neg"], "picture": [b"\xff", b"a"]})
    frame.to_parquet(tmp_path / "rows.parquet")
    rows = load_data(tmp_path / "rows.parquet")
    assert columns(rows, "text", "label") == [("fine ☕", "pos"), ("bad", "neg")]
    pd.DataFrame({"text": [b"\xff"], "label": [b"pos"]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="row 1: the text has half of a character, or a byte that is not UTF-8"):
        load_data(tmp_path / "rows.parquet")


def test_columns_may_be_called_by_numbers_and_rows_must_have_columns() -> None:
    rows = load_data(pd.DataFrame({"text": ["a", "b"], "label": ["x", "y"], 0: [1, 2]}))
    assert rows[1] == {"text": "b", "label": "y", "0": "2"}
    assert len(rows.sha256) == 64
    with pytest.raises(DataError, match="rows must be dictionaries, not 'train'"):
        load_data({"train": [{"text": "a"}]})


def test_a_range_beyond_all_numbers_is_none() -> None:
    with pytest.raises(DataError, match="no such file"):
        load_data("rows.csv[:99999999999999999999]")
