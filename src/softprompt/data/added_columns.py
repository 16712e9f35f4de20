"""Adds columns to files of rows; everything else in a row stays the same to the byte."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from softprompt.data.csv_reader import CsvFile
from softprompt.data.readers import Kind, kind_of, read_records, require_file, split_range
from softprompt.data.text_files import Record, json_lines, parse_json_line, text_lines
from softprompt.errors import DataError
from softprompt.extras import require_package

PREFIX = "softprompt_"  # of an added column whose name a row already has
STDIN = "-"
_LINE_END = re.compile(r"(\r\n|\n|\r)?\Z")


class SourceRow(NamedTuple):
    """A row as it was read.

    Attributes:
        record: values by column.
        raw: its text in the file, with the line end; empty if the file is no text.
        where: its place, for messages.
    """

    record: Record
    raw: str
    where: str


@dataclass(frozen=True)
class RowSource:
    """Rows of a source, read one by one.

    Attributes:
        header: the first line of a CSV file, unchanged.
    """

    kind: Kind
    name: str
    rows: Iterator[SourceRow]
    header: str = ""
    columns: tuple[str, ...] = ()


def add_columns(row: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with more columns. Existing columns stay; an added one of the same name gets a prefix."""
    return {**row, **{_name(name, row): value for name, value in added.items()}}


def _name(name: str, taken: Iterable[str]) -> str:
    return f"{PREFIX}{name}" if name in taken else name


def open_rows(source: str, stdin: Iterable[str] = ()) -> RowSource:
    """Open a source of rows, to be read one by one.

    Args:
        source: what `load_data` takes, with or without targets; or `-` for JSON lines or plain lines.

    Raises:
        DataError: no such file; or, when the rows are read, a line that cannot be.
    """
    if source == STDIN:
        return _open_lines(iter(stdin))
    name, start, stop = split_range(source)
    kind = "jsonl" if name.startswith("hub:") else kind_of(require_file(name))
    if kind == "csv":
        table = CsvFile(Path(name))
        records = iter(table)
        header, columns = table.header, tuple(table.names)
    else:
        header, columns = "", ()
        text = kind == "jsonl" and not name.startswith("hub:")
        records = json_lines(Path(name)) if text else (("", record) for record in read_records(name))
    numbered = islice(enumerate(records, start=1), start, stop)
    rows = (SourceRow(record, raw, f"{name}, row {number}") for number, (raw, record) in numbered)
    return RowSource(kind, source, rows, header, columns)


def _open_lines(lines: Iterator[str]) -> RowSource:
    """Return the rows on stdin: JSON lines if the first one begins with a brace, else a text per line."""
    filled = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    first = next(filled, None)
    every = filled if first is None else chain([first], filled)
    if first is None or not first[1].lstrip().startswith("{"):
        return RowSource(
            "lines", "stdin", (SourceRow({"text": line}, line, f"stdin, line {number}") for number, line in every)
        )

    def rows() -> Iterator[SourceRow]:
        for number, line in every:
            record = parse_json_line(line, f"stdin, line {number}")
            assert record is not None
            yield SourceRow(record, f"{line}\n", f"stdin, line {number}")

    return RowSource("jsonl", "stdin", rows())


class RowWriter:
    """Writes rows with added columns as lines of a file.

    Args:
        source: the rows; those of a file of the same kind are written unchanged.
    """

    def __init__(self, source: RowSource, kind: Kind, added: Sequence[str]) -> None:
        self._kind, self._unchanged = kind, kind == source.kind
        self._source, self._added = source, added
        self._columns: list[str] | None = None  # of a CSV file, if the source is of another kind

    def begin(self, first: SourceRow | None) -> str:
        """Return the first line of a CSV file; an empty text for other kinds."""
        if self._kind != "csv":
            return ""
        if self._unchanged:
            body, end = _split_line_end(self._source.header)
            self._width = len(next(csv.reader(io.StringIO(body, newline=""), skipinitialspace=True), []))
            return f"{body},{_csv_line([_name(name, self._source.columns) for name in self._added])}{end}"
        self._columns = list(first.record) if first is not None else []
        names = [*self._columns, *(_name(name, self._columns) for name in self._added)]
        return f"{_csv_line(names)}\n"

    def row(self, row: SourceRow, found: Mapping[str, Any]) -> str:
        """Return a row with its added values, and the line end."""
        if self._kind == "lines":
            return f"{_one_line(found)}\n"
        if self._kind == "csv":
            return self._csv_row(row, found)
        if not self._unchanged or not row.raw:
            return _json(add_columns(_plain(row.record), found)) + "\n"
        body, end = _split_line_end(row.raw)
        own = _json({_name(name, row.record): value for name, value in found.items()})
        return f"{body.rstrip()[:-1].rstrip()}{', ' if row.record else ''}{own[1:]}{end or chr(10)}"

    def _csv_row(self, row: SourceRow, found: Mapping[str, Any]) -> str:
        values = ["" if found.get(name) is None else _cell(found[name]) for name in self._added]
        if self._columns is None:
            body, end = _split_line_end(row.raw)
            given = len(next(csv.reader(io.StringIO(body, newline=""), skipinitialspace=True), []))
            return f"{body}{',' * (self._width - given)},{_csv_line(values)}{end or chr(10)}"
        unknown = next((column for column in row.record if column not in self._columns), None)
        if unknown is not None:
            raise DataError(
                f"{row.where}: it has a column {unknown!r}, which the first row has not, and a CSV has the same "
                "columns for all rows; give a file that ends in .jsonl"
            )
        return f"{_csv_line([*(_cell(row.record.get(column)) for column in self._columns), *values])}\n"


def write_parquet(path: Path, source: RowSource, found: Iterable[Mapping[str, Any]], temporary: Path) -> None:
    """Write a Parquet file of rows with added columns, atomically.

    Args:
        source: the rows; columns of a Parquet file keep their types.
        found: the added values, for each row to write.
        temporary: a file beside it to write first, which is renamed to it.
    """
    require_package("pyarrow", str(path))
    import pyarrow as pa
    from pyarrow import parquet

    results = list(found)
    if source.kind == "parquet":
        name, start, _ = split_range(source.name)
        table = parquet.read_table(name).slice(start or 0, len(results))
        columns = {name: pa.array([result[name] for result in results]) for name in (results[0] if results else ())}
        for name, column in columns.items():
            table = table.append_column(_name(name, table.column_names), column)
    else:
        rows = (_plain(row.record) for row in source.rows)
        table = pa.Table.from_pylist([add_columns(row, result) for row, result in zip(rows, results, strict=False)])
    parquet.write_table(table, temporary)
    temporary.replace(path)


def complete_rows(path: Path, kind: Kind) -> list[int]:
    """Return the byte offsets of the ends of a file's header and complete rows; its last row may be cut off."""
    ends, at = [], 0
    if kind == "csv":
        table = CsvFile(path)
        at = len(table.header.encode())
        raws: Iterator[str] = (raw for raw, _ in table)
    else:
        raws = text_lines(path)
    ends.append(at)
    try:
        for raw in raws:
            at += len(raw.encode())
            if raw.endswith(("\n", "\r")):
                ends.append(at)
    except DataError:  # a row that is incomplete
        pass
    return ends


def _split_line_end(line: str) -> tuple[str, str]:
    """Split a line into its text and its line end."""
    end = _LINE_END.search(line)
    assert end is not None
    return line[: end.start()], end.group()


def _csv_line(values: Sequence[str]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\r\n").writerow(values)  # so values with \r or \n are quoted
    return text.getvalue().removesuffix("\r\n")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with bytes, of pictures for example, as text."""
    texts = {name: v.decode("utf-8", "backslashreplace") for name, v in record.items() if isinstance(v, bytes)}
    return {**record, **texts}


def _one_line(found: Mapping[str, Any]) -> str:
    """Return the prediction in one line."""
    return str(found["prediction"]).replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
