"""Files of rows that get columns: all else that a row holds is kept to the byte."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from softprompt.data.csv_reader import CsvFile
from softprompt.data.lines import BYTE_ORDER_MARK, text_lines
from softprompt.data.readers import Record, existing_file, json_record, read_records, split_range
from softprompt.errors import DataError
from softprompt.extras import require_package

Kind = Literal["csv", "jsonl", "parquet", "lines"]

OURS = "softprompt_"  # what a column of ours is called by where a row has one of its name
STDIN = "-"
_KINDS: dict[str, Kind] = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_LINE_END = re.compile(r"(\r\n|\n|\r)?\Z")


class SourceRow(NamedTuple):
    """A row as it was read.

    Attributes:
        record: its values by their columns.
        raw: how it stands in its text file, with the line end; empty where there is none.
        where: its place, for messages.
    """

    record: Record
    raw: str
    where: str


@dataclass(frozen=True)
class RowSource:
    """Rows that are read one after the other.

    Attributes:
        kind: of the file; `lines` are plain texts on stdin.
        name: for messages.
        rows: the rows.
        header: a CSV's first line as it stands there.
        columns: of a CSV.
    """

    kind: Kind
    name: str
    rows: Iterator[SourceRow]
    header: str = ""
    columns: tuple[str, ...] = ()


def with_columns(row: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with what was found for it; columns that it has already are kept, and ours called otherwise."""
    return {**row, **{_name(name, row): value for name, value in found.items()}}


def _name(name: str, taken: Iterable[str]) -> str:
    return f"{OURS}{name}" if name in taken else name


def kind_of(path: Path) -> Kind:
    """Return a file's kind by its ending.

    Raises:
        DataError: it is none that can be written.
    """
    if path.suffix.lower() not in _KINDS:
        raise DataError(f"{path} ends in {path.suffix!r}; allowed are {', '.join(_KINDS)}")
    return _KINDS[path.suffix.lower()]


def open_rows(source: str, stdin: Iterable[str] = ()) -> RowSource:
    """Open rows to be read one after the other.

    Args:
        source: what `load_data` takes, with or without targets; or `-` for JSON lines or plain lines.
        stdin: the lines that `-` means.

    Raises:
        DataError: no such file; or, when the rows are read, a line that cannot be.
    """
    if source == STDIN:
        return _open_lines(iter(stdin))
    name, start, stop = split_range(source)
    kind = "jsonl" if name.startswith("hub:") else kind_of(existing_file(name))
    if kind == "csv":
        table = CsvFile(Path(name))
        mark = BYTE_ORDER_MARK if _has_mark(Path(name)) else ""
        records: Iterator[tuple[str, Record]] = ((raw, record) for raw, record in table)
        header, columns = mark + table.header, tuple(table.names)
    else:
        header, columns = "", ()
        text = kind == "jsonl" and not name.startswith("hub:")
        records = _json_lines(name) if text else (("", record) for record in read_records(name))
    numbered = islice(enumerate(records, start=1), start, stop)
    rows = (SourceRow(record, raw, f"{name}, row {number}") for number, (raw, record) in numbered)
    return RowSource(kind, source, rows, header, columns)


def _has_mark(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(3) == BYTE_ORDER_MARK.encode()


def _json_lines(name: str) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(text_lines(Path(name)), start=1):
        record = json_record(line, f"{name}, line {number}")
        if record is not None:
            yield line.lstrip(BYTE_ORDER_MARK), record


def _open_lines(lines: Iterator[str]) -> RowSource:
    """Return what stands on stdin: JSON lines where the first one is an object, else a text a line."""
    filled = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    first = next(filled, None)
    every = filled if first is None else chain([first], filled)
    if first is None or not first[1].lstrip().startswith("{"):
        return RowSource(
            "lines", "stdin", (SourceRow({"text": line}, line, f"stdin, line {number}") for number, line in every)
        )

    def rows() -> Iterator[SourceRow]:
        for number, line in every:
            record = json_record(line, f"stdin, line {number}")
            assert record is not None
            yield SourceRow(record, f"{line}\n", f"stdin, line {number}")

    return RowSource("jsonl", "stdin", rows())


class RowText:
    """Writes rows with columns added as the lines of a file.

    Args:
        source: where the rows come from; of a file of the same kind they are written as they stand there.
        kind: of the file that is written.
        added: the names of the columns.
    """

    def __init__(self, source: RowSource, kind: Kind, added: Sequence[str]) -> None:
        self._kind, self._as_it_stands = kind, kind == source.kind
        self._source, self._added = source, added
        self._columns: list[str] | None = None  # of a CSV that is made from another kind

    def begin(self, first: SourceRow | None) -> str:
        """Return what stands before the first row: the first line of a CSV."""
        if self._kind != "csv":
            return ""
        if self._as_it_stands:
            body, end = _ended(self._source.header)
            self._width = len(next(csv.reader(io.StringIO(body, newline=""), skipinitialspace=True), []))
            return f"{body},{_csv_line([_name(name, self._source.columns) for name in self._added])}{end}"
        self._columns = list(first.record) if first is not None else []
        names = [*self._columns, *(_name(name, self._columns) for name in self._added)]
        return f"{_csv_line(names)}\n"

    def row(self, row: SourceRow, found: Mapping[str, Any]) -> str:
        """Return a row with what was found for it, and its line end."""
        if self._kind == "lines":
            return f"{_one_line(found)}\n"
        if self._kind == "csv":
            return self._csv_row(row, found)
        if not self._as_it_stands or not row.raw:
            return _json(with_columns(_plain(row.record), found)) + "\n"
        body, end = _ended(row.raw)
        own = _json({_name(name, row.record): value for name, value in found.items()})
        return f"{body.rstrip()[:-1].rstrip()}{', ' if row.record else ''}{own[1:]}{end or chr(10)}"

    def _csv_row(self, row: SourceRow, found: Mapping[str, Any]) -> str:
        values = ["" if found.get(name) is None else _cell(found[name]) for name in self._added]
        if self._columns is None:
            body, end = _ended(row.raw)
            given = len(next(csv.reader(io.StringIO(body, newline=""), skipinitialspace=True), []))
            return f"{body}{',' * (self._width - given)},{_csv_line(values)}{end or chr(10)}"
        unknown = next((column for column in row.record if column not in self._columns), None)
        if unknown is not None:
            raise DataError(
                f"{row.where}: it has a column {unknown!r}, which the first row has not, and a CSV has the same "
                "columns for all rows; give a file that ends in .jsonl"
            )
        return f"{_csv_line([*(_cell(row.record.get(column)) for column in self._columns), *values])}\n"


def write_parquet(path: Path, source: RowSource, found: Iterable[Mapping[str, Any]], aside: Path) -> None:
    """Write a Parquet file of rows with what was found for them; `aside` is renamed into place.

    Args:
        path: the file.
        source: where the rows come from; columns of a Parquet file keep their types.
        found: for each row to be written.
        aside: a file beside it.
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
        table = pa.Table.from_pylist([with_columns(row, result) for row, result in zip(rows, results, strict=False)])
    parquet.write_table(table, aside)
    aside.replace(path)


def complete_rows(path: Path, kind: Kind) -> list[int]:
    """Return where each complete row ends in a file that may break off, in bytes, after where its header ends."""
    ends, at = [], 0
    if kind == "csv":
        table = CsvFile(path)
        ends.append(at := len((BYTE_ORDER_MARK if _has_mark(path) else "").encode()) + len(table.header.encode()))
        raws: Iterator[str] = (raw for raw, _ in table)
    else:
        ends.append(0)
        raws = text_lines(path)
    try:
        for raw in raws:
            at += len(raw.encode())
            if raw.endswith(("\n", "\r")):
                ends.append(at)
    except DataError:  # a row that was written by half
        pass
    return ends


def _ended(line: str) -> tuple[str, str]:
    """Return a line and its end, each for itself."""
    end = _LINE_END.search(line)
    assert end is not None
    return line[: end.start()], end.group()


def _csv_line(values: Sequence[str]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\r\n").writerow(values)  # values with either character of it stand in quotes
    return text.getvalue().removesuffix("\r\n")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record whose bytes, as of pictures, are text."""
    texts = {name: v.decode("utf-8", "backslashreplace") for name, v in record.items() if isinstance(v, bytes)}
    return {**record, **texts}


def _one_line(found: Mapping[str, Any]) -> str:
    """Return the prediction alone, in one line."""
    return str(found["prediction"]).replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
