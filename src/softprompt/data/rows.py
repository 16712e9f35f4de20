"""The rows of a task, read from files, data sets, data frames and dictionaries."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from softprompt.data.columns import INPUT_COLUMN, Layout, Task, find_layout
from softprompt.data.disk_rows import DiskRows, store_rows
from softprompt.data.labels import clean_label, is_blank, warn_about_labels
from softprompt.data.readers import read_records
from softprompt.data.text_files import Record
from softprompt.data.values import NoScalarError, loose_text, require_characters, scalar_text, to_text
from softprompt.errors import DataError

__all__ = ["Row", "Rows", "Source", "Task", "as_rows", "load_data"]

Row = dict[str, str]
Source: TypeAlias = str | Path | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """Rows of one task.

    Attributes:
        rows: each a dictionary of strings; the task's own columns are named `text` and `label`, or `input` and
            `target`, or `text`. Many rows are on disk.
        task: what is learned from them.
        name: of their source, for messages and reports.
        known_labels: the labels of all rows that these are a part of.
        row_numbers: the numbers of these rows in their source, from 1; None if they are all of it.
        input_columns: the columns of an input; none if it is the task's own column alone.
        has_blank_inputs: whether the task's own input column is empty in some row, so that a template must name others.
        nested_columns: columns with lists or dictionaries, each with the number of the first such row.
    """

    rows: Sequence[Row]
    task: Task
    name: str
    known_labels: tuple[str, ...] = ()
    row_numbers: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)
    input_columns: tuple[str, ...] = field(default=(), compare=False, repr=False)
    has_blank_inputs: bool = field(default=False, compare=False, repr=False)
    nested_columns: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)

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

    def normalized_input(self, row: Row) -> str:
        """Return a row's input in lower case and with single spaces, by which duplicates are found."""
        columns = self.input_columns or (INPUT_COLUMN[self.task],)
        return " ".join(" ".join(row[column] for column in columns).lower().split())

    def pick(self, indices: Iterable[int]) -> Rows:
        """Return the rows at some indices, in that order."""
        chosen = np.fromiter(indices, np.int64)
        rows = self.rows.pick(chosen) if isinstance(self.rows, DiskRows) else tuple(self.rows[i] for i in chosen)
        numbers = chosen + 1 if self.row_numbers is None else self.row_numbers[chosen]
        return replace(self, rows=rows, row_numbers=numbers)

    def where(self, index: int) -> str:
        """Name a row in a message, by its number in the source."""
        return f"{self.name}, row {index + 1 if self.row_numbers is None else self.row_numbers[index]}"

    def require_inputs(self, columns: Collection[str]) -> None:
        """Make sure that a template with these columns gives a text for every row."""
        for column in columns:
            if column in self.nested_columns:
                raise DataError(
                    f"{self.name}, row {self.nested_columns[column]}: the column {column!r}, which the template names, "
                    "holds a list or a dictionary; give one text or one number"
                )
        for index, row in enumerate(self.rows) if self.has_blank_inputs else ():
            present = [column for column in columns if column in row]
            if present and all(is_blank(row[column]) for column in present):
                several = f"the columns {', '.join(present)} are"
                which = f"the column {present[0]!r} is" if len(present) == 1 else several
                raise DataError(f"{self.where(index)}: {which} empty, and the template names no other")

    @property
    def labels(self) -> list[str]:
        """The labels of these rows and the known ones, sorted; empty unless the task is classification."""
        if self.task != "classification":
            return []
        return sorted({row["label"] for row in self.rows}.union(self.known_labels))

    @property
    def sha256(self) -> str:
        """A hash of the content of the rows, whatever the file format."""
        encode = json.JSONEncoder(sort_keys=True).encode
        digest = hashlib.sha256(f"[{encode(self.task)}, [".encode())  # of [task, rows], row by row
        for number, row in enumerate(self.rows):
            digest.update(f"{', ' if number else ''}{encode(row)}".encode())
        digest.update(b"]]")
        return digest.hexdigest()


def load_data(source: Source, map: Mapping[str, str] | None = None, task: Task | None = None) -> Rows:
    """Read the rows of a task.

    Args:
        source: a `.csv`, `.jsonl`, `.ndjson` or `.parquet` file, `hub:ID[:SPLIT]` for a data set of the hub (or a
            folder that `datasets` can load), each with an optional row range as in `prompts.csv[:50]`; or dictionaries.
        map: the task's column names to the columns that hold them, `{"text": "review", "label": "stars"}`.
        task: `classification`, `completion` or `text`; None to derive it from the columns.

    Returns:
        The rows, all values as text; labels are normalized (NFC), without invisible characters.

    Raises:
        DataError: a missing file or column, a malformed line, no rows, an empty value.
        StorageError: there are many rows and no room for a temporary file.
    """
    name = str(source) if isinstance(source, (str, Path)) else "rows"
    records = read_records(source)
    first = next(records, None)
    if first is None:
        raise DataError(f"{name} has no rows; give at least one, with the column names in the first line of a CSV")
    layout = _find_layout(first, records, dict(map or {}), task, name)
    reader = _RowReader(layout, name, list(first), task_given=task is not None)
    rows = store_rows(reader.rows(chain([first], records)))
    if layout.task == "classification":
        warn_about_labels(reader.label_counts, len(rows), name)
    return Rows(
        rows,
        layout.task,
        name,
        input_columns=layout.inputs if len(layout.inputs) > 1 else (),
        has_blank_inputs=reader.has_blank_inputs,
        nested_columns=reader.nested_columns,
    )


def as_rows(source: Source, task: Task | None = None) -> Rows:
    """Return `Rows` unchanged, and load any other source of `load_data`."""
    return source if isinstance(source, Rows) else load_data(source, task=task)


def _find_layout(
    first: Record, records: Iterator[Record], mapping: dict[str, str], task: Task | None, name: str
) -> Layout:
    """Find the task and its columns from the columns of the first row.

    If a column is missing there, an error names the first row that has it.
    """
    try:
        return find_layout(list(first), mapping, task, name)
    except DataError:
        columns = dict.fromkeys(first, 1)
        for number, record in enumerate(records, start=2):
            new = [column for column, value in record.items() if column not in columns and _has_value(value)]
            columns.update(dict.fromkeys(new, number))
        if len(columns) == len(first):
            raise
        layout = find_layout(list(columns), mapping, task, name)
        late = next(c for c in (*layout.inputs, *layout.names.values()) if columns.get(c, 1) > 1)
        raise DataError(_missing_in_first(name, late, columns[late])) from None


def _missing_in_first(name: str, column: str, number: int) -> str:
    return f"{name}, row 1: it has no {column!r}, which row {number} has; give all rows the same columns"


class _RowReader:
    """Converts records into rows, and collects facts about them.

    Attributes:
        label_counts: the number of rows of each label.
        has_blank_inputs, nested_columns: as in `Rows`.
    """

    def __init__(self, layout: Layout, name: str, columns: Sequence[str], *, task_given: bool) -> None:
        self.layout, self.name, self.task_given = layout, name, task_given
        self.columns = frozenset(columns)
        self.label_counts = Counter[str]()
        self.has_blank_inputs = False
        self.nested_columns: dict[str, int] = {}

    def rows(self, records: Iterable[Record]) -> Iterator[Row]:
        """Yield a row of texts for each record."""
        for number, record in enumerate(records, start=1):
            if not record.keys() <= self.columns:
                self._check_new_columns(record, number)
            row = self._row(record, f"{self.name}, row {number}", number)
            if "label" in self.layout.names:
                self.label_counts[row["label"]] += 1
            yield row

    def _check_new_columns(self, record: Record, number: int) -> None:
        """Make sure that columns that the first row lacks do not change the task."""
        new = [column for column in record if column not in self.columns and _has_value(record[column])]
        self.layout.require_none_hidden(new, self.name)
        if self.task_given or self.layout.task != "text":
            return
        late = next((column for column in new if self.layout.alone or column in ("label", "target")), None)
        if late is not None:
            raise DataError(f"{_missing_in_first(self.name, late, number)}, or say --task text")

    def _row(self, record: Record, where: str, number: int) -> Row:
        names = self.layout.names
        needed = set(names.values())
        row = {}
        for column, value in record.items():
            if type(value) is str:
                row[column] = value
            elif column in needed:
                row[column] = "" if not _has_value(value) else scalar_text(value, column, where)
            else:
                row[column], is_text = loose_text(value)
                if not is_text:
                    self.nested_columns.setdefault(column, number)
        row.update({column: row.get(source, "") for column, source in names.items()})
        row.update({column: "" for column in self.layout.inputs if column not in row})
        require_characters(row, where)
        if "label" in names:
            row["label"] = clean_label(row["label"])
        self._require_values(row, where)
        return row

    def _require_values(self, row: Row, where: str) -> None:
        """Make sure that a row has a target, and a value that a template can use as input."""
        names = self.layout.names
        for column, source in names.items():
            if not is_blank(row[column]):
                continue
            own = {*names, *names.values()}
            if column in ("label", "target") or all(is_blank(row[c]) for c in row.keys() - own):
                inputs = ", ".join(self.layout.inputs)
                several = column == "input" and len(self.layout.inputs) > 1
                raise DataError(f"{where}: the column{f's {inputs} are' if several else f' {source!r} is'} empty")
            self.has_blank_inputs = True
        if len(names) > 1 and all(row[column].strip() == source for column, source in names.items()):
            raise DataError(
                f"{where}: it has the column names for values, as where two tables were joined; leave it out"
            )


def _has_value(value: object) -> bool:
    """Tell whether a cell has a value: 0 and False are values, an empty text and NaN are not."""
    if isinstance(value, str):
        return not is_blank(value)
    try:
        return to_text(value) is not None
    except NoScalarError:
        return True
