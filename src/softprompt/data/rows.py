"""Reading rows: CSV, JSONL, Parquet, data sets of the hub, and lists of dictionaries."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from softprompt.data.spool import SpooledRows, kept
from softprompt.errors import DataError, nearest
from softprompt.packages import require_package

Task = Literal["classification", "completion", "text"]
Row = dict[str, str]

TARGET_COLUMN: dict[Task, str | None] = {"classification": "label", "completion": "target", "text": None}
INPUT_COLUMN: dict[Task, str] = {"classification": "text", "completion": "input", "text": "text"}
_MAPPABLE = ("text", "label", "input", "target")
_AT_ONCE = 1000  # rows of a table that are turned into dictionaries together
_SURROGATE = re.compile("[\ud800-\udfff]")  # no tokenizer takes one; JSON can name it, arguments hold odd bytes so
_RANGE = re.compile(r"^(?P<path>.+)\[(?P<start>\d{0,18}):(?P<stop>\d{0,18})\]$")


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """Rows of one task.

    Attributes:
        rows: each a dictionary of strings; the task's own columns are named `text` and `label`, or `input` and
            `target`, or `text`. Many rows lie in a temporary file.
        task: what is to be learned from them.
        name: where they come from, for messages and reports.
        known: labels that occur in what these rows are a part of.
        numbers: as which these rows were counted where they were read, from 1 on; None where they are all of them.
    """

    rows: Sequence[Row]
    task: Task
    name: str
    known: tuple[str, ...] = ()
    numbers: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        return self.pick(range(*index.indices(len(self)))) if isinstance(index, slice) else self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def question(self, row: Row) -> str:
        """What a row asks, in lower case and with single spaces: rows that share one are the same question."""
        return " ".join(row[INPUT_COLUMN[self.task]].lower().split())

    def pick(self, indices: Iterable[int]) -> Rows:
        """Return the rows at some indices, in that order."""
        places = np.fromiter(indices, np.int64)
        picked = self.rows.pick(places) if isinstance(self.rows, SpooledRows) else tuple(self.rows[i] for i in places)
        return replace(self, rows=picked, numbers=places + 1 if self.numbers is None else self.numbers[places])

    def where(self, index: int) -> str:
        """Name a row in a message, by its number where it was read."""
        return f"{self.name}, row {index + 1 if self.numbers is None else self.numbers[index]}"

    @property
    def labels(self) -> list[str]:
        """The labels that occur, or are known, sorted; empty unless this is classification."""
        return sorted({row["label"] for row in self.rows}.union(self.known)) if self.task == "classification" else []

    @property
    def sha256(self) -> str:
        """A hash of what the rows say, whichever file format they came in."""
        encode = json.JSONEncoder(sort_keys=True).encode
        digest = hashlib.sha256(f"[{encode(self.task)}, [".encode())  # of [task, rows], a row after the other
        for number, row in enumerate(self.rows):
            digest.update(f"{', ' if number else ''}{encode(row)}".encode())
        digest.update(b"]]")
        return digest.hexdigest()


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
        StorageError: there are many rows, and no room for a temporary file.
    """
    if isinstance(source, (str, Path)):
        name, start, stop = _split_range(str(source))
        records: Iterator[dict[str, Any]] = islice(_read(name), start, stop)
        name = str(source)
    else:
        name, records = "rows", _dictionaries(source)
    first = next(records, None)
    if first is None:
        raise DataError(f"{name} has no rows; give at least one, with the column names in the first line of a CSV")
    found, names = _named(list(first), dict(map or {}), task, name)
    # The first row's columns say what the task is, unless it was said: a later one's target must not go unnoticed.
    late = {"label", "target"} - set(first) if found == "text" and task is None else set[str]()
    return Rows(kept(_rows(chain([first], records), names, name, late)), found, name)


def _dictionaries(source: Any) -> Iterator[dict[str, Any]]:
    pandas = sys.modules.get("pandas")  # whoever has a data frame has imported it
    if pandas is not None and isinstance(source, pandas.DataFrame):
        for start in range(0, len(source), _AT_ONCE):
            yield from map(_named_by_texts, source.iloc[start : start + _AT_ONCE].to_dict("records"))
    else:
        for record in source:
            if not isinstance(record, Mapping):
                raise DataError(f"rows must be dictionaries, not {str(record)[:40]!r}; of a DatasetDict give a split")
            yield _named_by_texts(record)


def _named_by_texts(record: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a record whose columns are called by texts: a data frame's may be numbers."""
    return {str(column): value for column, value in record.items()}


def _split_range(source: str) -> tuple[str, int | None, int | None]:
    match = _RANGE.match(source)
    if not match:
        return source, None, None
    start, stop = (int(match[group]) if match[group] else None for group in ("start", "stop"))
    return match["path"], start, stop


def _read(source: str) -> Iterator[dict[str, Any]]:
    if source.startswith("hub:"):
        yield from _read_hub(source.removeprefix("hub:"))
        return
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
        yield from readers[path.suffix.lower()](path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _lines(path: Path) -> Iterator[str]:
    """Give a file's lines, each with the line feed that ends it."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                # utf-8-sig: spreadsheets put a byte order mark before the first column's name.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: not UTF-8; save the file as UTF-8") from error
            yield text


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    require_package("pyarrow", str(path))
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        with path.open("rb") as file:
            # As pyarrow sets these, a whole column of a row group is read at once.
            for batch in ParquetFile(file, buffer_size=2**16, pre_buffer=False).iter_batches(_AT_ONCE):
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # texts can be longer than the module's 131,072 characters
    # The module wants every line by itself, and a carriage return alone ends one too.
    lines = chain.from_iterable(io.StringIO(line, newline="") for line in _lines(path))
    reader = csv.reader(lines, strict=True)
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
            yield dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}; check the quotes") from error


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    for number, ended in enumerate(_lines(path), start=1):
        line = ended.removesuffix("\n")
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(record, dict):
            raise DataError(f'{path}, line {number}: must be an object such as {{"text": …}}, not {line[:40]!r}')
        yield record


def _read_hub(source: str) -> Iterator[dict[str, Any]]:
    require_package("datasets", f"hub:{source}")
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        yield from _dictionaries(load_dataset(name, split=split or "train"))
    except Exception as error:  # datasets raises many kinds, network errors among them; all mean the same here
        raise DataError(f"cannot load the data set {name!r}, split {split or 'train'!r}: {error}") from error


def _named(columns: list[str], mapping: dict[str, str], task: Task | None, name: str) -> tuple[Task, dict[str, str]]:
    """Return the task, and for each of its columns the one that holds it."""
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
    return task, {column: names[column] for column in needed}


def _rows(
    records: Iterable[dict[str, Any]], names: Mapping[str, str], name: str, late: Collection[str]
) -> Iterator[Row]:
    """Return rows of texts, of which `names` says where the task's columns are; no row may have one of `late`."""
    for number, record in enumerate(records, start=1):
        if new := next((column for column in late if record.get(column)), None):
            raise DataError(
                f"{name}, row {number}: it has a {new!r}, which the first row has not; give all rows the same columns"
            )
        row = {key: _text(value, key in names.values()) for key, value in record.items()}
        row.update({column: row.get(held, "") for column, held in names.items()})
        for column, held in names.items():
            if not row[column].strip():
                raise DataError(f"{name}, row {number}: the column {held!r} is empty")
        require_characters(row, f"{name}, row {number}")
        if "label" in names:
            row["label"] = row["label"].strip()  # a space that nobody sees is no other label
        yield row


def require_characters(row: Mapping[str, object], where: str) -> None:
    """Make sure that all characters of a row's texts are whole.

    Raises:
        DataError: one is not.
    """
    for column, value in row.items():
        if surrogate := _SURROGATE.search(str(value)):
            raise DataError(
                f"{where}: the {column} has half of a character, or a byte that is not UTF-8 ({surrogate.group()!a}); "
                "repair it where it comes from"
            )


def _text(value: Any, read: bool) -> str:
    missing = value is None or (isinstance(value, float) and math.isnan(value))  # data frames have NaN for nothing
    if isinstance(value, bytes):  # of a Parquet file whose texts are not declared as such; or a picture, which is none
        return value.decode("utf-8", "surrogateescape" if read else "backslashreplace")
    return "" if missing else str(value)


def _task_of(names: set[str]) -> Task | None:
    if {"text", "label"} <= names:
        return "classification"
    if {"input", "target"} <= names:
        return "completion"
    return "text" if "text" in names else None
