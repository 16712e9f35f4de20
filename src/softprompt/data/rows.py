"""Reading rows: CSV, JSONL, Parquet, data sets of the hub, and lists of dictionaries."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

from softprompt.errors import DataError, nearest

Task = Literal["classification", "completion", "text"]
Row = dict[str, str]

TARGET_COLUMN: dict[Task, str | None] = {"classification": "label", "completion": "target", "text": None}
INPUT_COLUMN: dict[Task, str] = {"classification": "text", "completion": "input", "text": "text"}
_MAPPABLE = ("text", "label", "input", "target")
_RANGE = re.compile(r"^(?P<path>.+)\[(?P<start>\d*):(?P<stop>\d*)\]$")


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """Rows of one task.

    Attributes:
        rows: each a dictionary of strings; the task's own columns are named `text` and `label`, or `input` and
            `target`, or `text`.
        task: what is to be learned from them.
        name: where they come from, for messages and reports.
    """

    rows: tuple[Row, ...]
    task: Task
    name: str

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return replace(self, rows=self.rows[index])
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def inputs(self) -> list[str]:
        """What each row asks, in lower case and with single spaces: rows that share one are the same question."""
        return [" ".join(row[INPUT_COLUMN[self.task]].lower().split()) for row in self.rows]

    def pick(self, indices: Iterable[int]) -> Rows:
        """Return the rows at some indices, in that order."""
        return replace(self, rows=tuple(self.rows[i] for i in indices))

    @property
    def labels(self) -> list[str]:
        """The labels that occur, sorted; empty unless this is classification."""
        return sorted({row["label"] for row in self.rows}) if self.task == "classification" else []

    @property
    def sha256(self) -> str:
        """A hash of what the rows say, whichever file format they came in."""
        return hashlib.sha256(json.dumps([self.task, self.rows], sort_keys=True).encode()).hexdigest()


def load_data(
    source: str | Path | Iterable[Mapping[str, Any]], map: Mapping[str, str] | None = None, task: Task | None = None
) -> Rows:
    """Read rows and find out which task they are for.

    Args:
        source: a `.csv`, `.jsonl`, `.ndjson` or `.parquet` file, `hub:ID[:SPLIT]` for a data set of the hub (or a
            folder that `datasets` can load), each with an optional row range as in `prompts.csv[:50]`; or dictionaries.
        map: the task's column names to the columns that hold them, `{"text": "review", "label": "stars"}`.
        task: `classification`, `completion` or `text`; found from the columns where it is not given.

    Returns:
        The rows, all values as text.

    Raises:
        DataError: no such file, a line that cannot be read, a column that is missing, no rows, an empty value.
    """
    if isinstance(source, (str, Path)):
        name, window = _split_range(str(source))
        records = _read(name)[window]
        name = str(source)
    else:
        name, records = "rows", _dictionaries(source)
    if not records:
        raise DataError(f"{name} has no rows; give at least one, with the column names in the first line of a CSV")
    return _named(records, dict(map or {}), task, name)


def _dictionaries(source: Any) -> list[dict[str, Any]]:
    pandas = sys.modules.get("pandas")  # whoever has a data frame has imported it
    if pandas is not None and isinstance(source, pandas.DataFrame):
        return list(source.to_dict("records"))
    return [dict(record) for record in source]


def _split_range(source: str) -> tuple[str, slice]:
    match = _RANGE.match(source)
    if not match:
        return source, slice(None)
    start, stop = (int(match[group]) if match[group] else None for group in ("start", "stop"))
    return match["path"], slice(start, stop)


def _read(source: str) -> list[dict[str, Any]]:
    if source.startswith("hub:"):
        return _read_hub(source.removeprefix("hub:"))
    path = Path(source)
    try:
        missing = not path.exists()
    except OSError as error:  # a name that no file can have
        raise DataError(f"no such file: {source[:80]}…: {error.strerror}") from error
    if missing:
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"no such file: {path}{nearest(path.name, there)}")
    if path.is_dir():
        raise DataError(f"{path} is a folder; give a .csv, .jsonl or .parquet file in it, or hub:{path}")
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path} ends in {path.suffix!r}; allowed are {', '.join(readers)}")
    try:
        return readers[path.suffix.lower()](path, path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _decoded(path: Path, content: bytes) -> str:
    try:
        # utf-8-sig: spreadsheets put a byte order mark before the first column's name.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from error


def _read_parquet(path: Path, content: bytes) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, BufferReader
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise DataError(f"{path} needs the package pyarrow: pip install 'softprompt[parquet]'") from error
    try:
        records: list[dict[str, Any]] = read_table(BufferReader(content)).to_pylist()
    except ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error
    return records


def _read_csv(path: Path, content: bytes) -> list[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # texts can be longer than the module's 131,072 characters
    reader = csv.reader(io.StringIO(_decoded(path, content), newline=""), strict=True)
    records = []
    try:
        header = [name.strip() for name in next(reader, [])]
        for separator in (";", "\t", "|"):
            if len(header) == 1 and separator in header[0]:
                raise DataError(f"{path}: its columns are separated by {separator!r}; save it with commas")
        if len(set(header)) != len(header):
            twice = sorted({name for name in header if header.count(name) > 1})
            raise DataError(f"{path}: the first line names a column twice: {', '.join(twice)}")
        for values in reader:
            if not values:
                continue
            if len(values) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(values)} values where the first line names "
                    f"{len(header)} columns; a value with a comma or a quote in it must stand in quotes"
                )
            records.append(dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}; check the quotes") from error
    return records


def _read_jsonl(path: Path, content: bytes) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(_decoded(path, content).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(record, dict):
            raise DataError(f'{path}, line {number}: must be an object such as {{"text": …}}, not {line[:40]!r}')
        records.append(record)
    return records


def _read_hub(source: str) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"hub:{source} needs the package datasets: pip install 'softprompt[hub]'") from error
    name, _, split = source.partition(":")
    try:
        return [dict(record) for record in load_dataset(name, split=split or "train")]
    except Exception as error:  # datasets raises many kinds, network errors among them; all mean the same here
        raise DataError(f"cannot load the data set {name!r}, split {split or 'train'!r}: {error}") from error


def _named(records: list[dict[str, Any]], mapping: dict[str, str], task: Task | None, name: str) -> Rows:
    columns = list(records[0])
    for target, column in mapping.items():
        if target not in _MAPPABLE:
            raise DataError(f"cannot map {target!r}{nearest(target, _MAPPABLE)}; allowed are {', '.join(_MAPPABLE)}")
        if column not in columns:
            raise DataError(f"{name} has no column {column!r}{nearest(column, columns)}; it has {', '.join(columns)}")
    names = {**{c: c for c in columns if c in _MAPPABLE}, **mapping}
    if len(columns) == 1 and not names:
        names["text"] = columns[0]
    if task is None:
        # What the user maps says what is wanted; a target column that bears its own name need not be mapped.
        wanted = set(mapping) | ({"label", "target"} & set(names))
        task = (_task_of(wanted) if mapping else None) or _task_of(set(names))
    if task is None:
        raise DataError(
            f"{name} has the columns {', '.join(columns)}: say what is in them, with --map text=… --map label=… "
            "for classification, --map input=… --map target=… for completion, or --map text=… for plain text"
        )
    needed = [column for column in (INPUT_COLUMN[task], TARGET_COLUMN[task]) if column]
    for column in needed:
        if column not in names:
            raise DataError(f"{task} needs a column {column!r}: {name} has {', '.join(columns)}; add --map {column}=…")
    rows = []
    for number, record in enumerate(records, start=1):
        row = {key: _text(value) for key, value in record.items()}
        row.update({column: row.get(names[column], "") for column in needed})
        for column in needed:
            if not row[column].strip():
                raise DataError(f"{name}, row {number}: the column {names[column]!r} is empty")
        rows.append(row)
    return Rows(tuple(rows), task, name)


def _text(value: Any) -> str:
    missing = value is None or (isinstance(value, float) and math.isnan(value))  # data frames have NaN for nothing
    return "" if missing else str(value)


def _task_of(names: set[str]) -> Task | None:
    if {"text", "label"} <= names:
        return "classification"
    if {"input", "target"} <= names:
        return "completion"
    return "text" if "text" in names else None
