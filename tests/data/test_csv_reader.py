"""CSV files as spreadsheets and other programs make them: read as they are meant, or refused with the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from softprompt import load_data
from softprompt.errors import DataError

ROWS = [{"text": "a", "label": "x"}, {"text": "b, c", "label": "y"}]
MANY = "".join(f"row {i},x\n" for i in range(990))


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "rows.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [
        'text, label\n"a", "x"\n"b, c", "y"\n',
        '"text", "label"\n"a", "x"\n"b, c", "y"\n',
        'text, label\na, x\n"b, c", y\n',
        'text,  "label"\r\na,x\r\n"b, c",   "y"\r\n',
        'sep=,\ntext,label\na,x\n"b, c",y\n',
        '"sep=,"\r\ntext,label\r\na,x\r\n"b, c",y\r\n',
        '\ufeffSEP=,\ntext,label\na,x\n"b, c",y\n',
        'text,label,,\na,x,,\n"b, c",y, ,\n',
        'text,label,,\na,x\n"b, c",y\n',
        '\ufeff\ufefftext,label\na,x\n"b, c",y\n',
        '\n\ntext,label\na,x\n"b, c",y\n',
        '\u200btext,label\ufeff\na,x\n"b, c",y\n',
    ],
    ids=ascii,
)
def test_what_is_meant_is_read(tmp_path: Path, content: str) -> None:
    assert list(load_data(written(tmp_path, content))) == ROWS


def test_a_value_in_quotes_behind_a_blank_may_go_over_lines(tmp_path: Path) -> None:
    rows = load_data(written(tmp_path, 'text, label\n"one,\ntwo", "x"\n'))
    assert list(rows) == [{"text": "one,\ntwo", "label": "x"}]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (' a,x', " a"),
        ('" ""a"" ",x', ' "a" '),
        ('"said, ""no"", and,  ""x""",x', 'said, "no", and,  "x"'),
        (' "Great" film,x', ' "Great" film'),
        ('a "quoted" word,x', 'a "quoted" word'),
    ],
)  # fmt: skip
def test_blanks_and_quotes_that_belong_to_a_value_stay(tmp_path: Path, line: str, text: str) -> None:
    assert load_data(written(tmp_path, f"text,label\n{line}\n"))[0]["text"] == text


@pytest.mark.parametrize("row", ['"a", "x"', '"a", "x, y"', '"a", "x\ny"', ' "a",x', '"a",\t"x"', 'a, "x" '])
def test_a_blank_before_a_quote_is_refused_where_the_first_line_has_none(tmp_path: Path, row: str) -> None:
    with pytest.raises(DataError, match=r"rows\.csv, line 3: a space before the quote.*delete the spaces"):
        load_data(written(tmp_path, f"text,label\na,x\n{row}\n"))


@pytest.mark.parametrize(
    "again",
    ["text,label", "label,text", " Text , LABEL ", '"text","label"', "\ufefftext,label", "text,label\r"],
)
def test_the_column_names_again_in_a_later_line_are_refused(tmp_path: Path, again: str) -> None:
    with pytest.raises(DataError, match=r"line 4: it has the column names again, .*delete the line"):
        load_data(written(tmp_path, f"text,label\na,x\nb,y\n{again}\nc,x\n"))


def test_the_column_names_again_count_where_there_is_one_column_or_a_third(tmp_path: Path) -> None:
    for content in ("text\na\ntext\n", "id,text,label\n1,a,x\nid,text,label\n"):
        with pytest.raises(DataError, match=r"line 3: it has the column names again"):
            load_data(written(tmp_path, content))
    assert len(load_data(written(tmp_path, "text,label\na,x\ntext,x\na,label\n"))) == 3


@pytest.mark.parametrize("number", [1, 500])
def test_the_column_names_again_are_refused_in_any_table(number: int) -> None:
    rows = [{"text": f"a {i}", "label": "xy"[i % 2]} for i in range(number)]
    with pytest.raises(DataError, match=f"rows, row {number + 1}: it has the column names for values"):
        load_data([*rows, {"text": "text", "label": "label"}])
    mapped = [{"review": row["text"], "stars": row["label"]} for row in rows]
    with pytest.raises(DataError, match=f"row {number + 1}: it has the column names for values"):
        load_data([*mapped, {"review": "review", "stars": "stars"}], {"text": "review", "label": "stars"})


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("text,label\n" + "a,x\n" * 8 + f'"open,x\n{MANY}', 10),
        ('text,label\na,x\n"open,x\n"b",y\nc,z\n', 3),  # another quote seems to end it
        ('text,label\n"a\nb",x\nc,"open\nd,x\n', 4),
        ('text,label\n"a\nb","open\nd,x\n', 3),
        ('text,label\n"say ""no"", or","x"\n"open ""word""\nc,x\n', 3),
        ('text,label\r\na,x\r\n"open,x\r\nb,y\r\n', 3),
        ("text,label\ra,x\r\"open,x\rb,y\r", 3),
        ('"text,label\na,x\n', 1),
    ],
)  # fmt: skip
def test_an_open_quote_is_named_with_the_line_where_it_begins(tmp_path: Path, content: str, line: int) -> None:
    with pytest.raises(DataError, match=rf"rows\.csv, line {line}: the quote that opens here .*check the quotes"):
        load_data(written(tmp_path, content))


def test_a_row_that_a_quote_joined_is_named_with_its_lines(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 3 \(and on to line 5\): 1 values where the first line names 2"):
        load_data(written(tmp_path, 'text,label\na,x\n"open,x\nb,y\nc"\n'))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            "sep=;\ntext;label\na;x\n",
            "first line says that ';' separates the columns; save it with commas, and without",
        ),
        ("sep=\t\ntext\tlabel\n", r"first line says that '\\t' separates the columns"),
        ("text,label,,\na,x,,z\n", "line 2: 'z' is in a column without a name: the first line ends in 2 commas"),
        ("text,,label,,\na,1,x,,\n", "columns 2 and some at its end have no name, only commas"),
        (",,,\na,x,,\n", "all columns have no name"),
        ("text,label,\na,x\n", "2 values where the first line names 3 columns; the first line ends in a comma"),
        ("text,label\na,x,\n", "3 values where the first line names 2 columns; the line ends in a comma too many"),
        ("review,stars,\na,x,\n", r"columns review, stars, \(one without a name\)"),
        ("text,label\na,x\n".encode("utf-16"), "is UTF-16 or no text at all.*save the file as UTF-8"),
        ("text,label\na,x\n".encode("utf-16-le"), "is UTF-16"),
        ("text,label\na,x\n".encode("utf-16-be"), "is UTF-16"),
    ],
    ids=ascii,
)
def test_what_is_wrong_with_the_first_line_is_named(tmp_path: Path, content: str | bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load_data(written(tmp_path, content))


def test_marks_and_encodings_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff\ufeff{"text": "a"}\n\ufeff{"text": "b"}\n', encoding="utf-8")
    assert [row["text"] for row in load_data(path)] == ["a", "b"]
    path.write_text('{"text": "a"}\n', encoding="utf-16-le")
    with pytest.raises(DataError, match="is UTF-16"):
        load_data(path)


def test_an_index_without_a_name_is_a_column_as_before(tmp_path: Path) -> None:
    assert list(load_data(written(tmp_path, ",text,label\n0,a,x\n"))) == [{"": "0", "text": "a", "label": "x"}]
