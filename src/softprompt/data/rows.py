"""Rows of a task, read from files, data sets, data frames and dictionaries."""

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

from softprompt.data.columns import INPUT_COLUMN, TARGET_COLUMN, Layout, Task, find_layout
from softprompt.data.disk_rows import DiskRows, kept
from softprompt.data.labels import clean_label, is_blank, warn_of_labels
from softprompt.data.readers import Record, read_records
from softprompt.data.values import NoScalarError, loose_text, require_characters, scalar_text, spelled
from softprompt.errors import DataError

__all__ = [
    "INPUT_COLUMN",
    "TARGET_COLUMN",
    "Row",
    "Rows",
    "Source",
    "Task",
    "as_rows",
    "load_data",
    "require_characters",
]

Row = dict[str, str]
Source: TypeAlias = str | Path | Iterable[Mapping[str, Any]]


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
        inputs: the columns that make up a row's input; none where it is the task's own column alone.
        gaps: whether the task's own input column is empty somewhere, so that a template has to name others.
        nested: columns that hold lists or dictionaries, each with the number of the first such row.
    """

    rows: Sequence[Row]
    task: Task
    name: str
    known: tuple[str, ...] = ()
    numbers: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)
    inputs: tuple[str, ...] = field(default=(), compare=False, repr=False)
    gaps: bool = field(default=False, compare=False, repr=False)
    nested: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)

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
        """What a row asks, in lower case and with single spaces: rows that share one are the same question."""
        columns = self.inputs or (INPUT_COLUMN[self.task],)
        return " ".join(" ".join(row[column] for column in columns).lower().split())

    def pick(self, indices: Iterable[int]) -> Rows:
        """Return the rows at some indices, in that order."""
        places = np.fromiter(indices, np.int64)
        picked = self.rows.pick(places) if isinstance(self.rows, DiskRows) else tuple(self.rows[i] for i in places)
        return replace(self, rows=picked, numbers=places + 1 if self.numbers is None else self.numbers[places])

    def where(self, index: int) -> str:
        """Name a row in a message, by its number where it was read."""
        return f"{self.name}, row {index + 1 if self.numbers is None else self.numbers[index]}"

    def require_inputs(self, columns: Collection[str]) -> None:
        """Make sure that a template that names these columns makes text of every row.

        Raises:
            DataError: a row has nothing in any of them, or one of them holds something else than texts.
        """
        for column in columns:
            if column in self.nested:
                raise DataError(
                    f"{self.name}, row {self.nested[column]}: the column {column!r}, which the template names, holds a "
                    "list or a dictionary; give one text or one number"
                )
        for index, row in enumerate(self.rows) if self.gaps else ():
            there = [column for column in columns if column in row]
            if there and all(is_blank(row[column]) for column in there):
                which = f"the column {there[0]!r} is" if len(there) == 1 else f"the columns {', '.join(there)} are"
                raise DataError(f"{self.where(index)}: {which} empty, and the template names no other")

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


def load_data(source: Source, map: Mapping[str, str] | None = None, task: Task | None = None) -> Rows:
    """Read rows and find out which task they are for.

    Args:
        source: a `.csv`, `.jsonl`, `.ndjson` or `.parquet` file, `hub:ID[:SPLIT]` for a data set of the hub (or a
            folder that `datasets` can load), each with an optional row range as in `prompts.csv[:50]`; or dictionaries.
        map: the task's column names to the columns that hold them, `{"text": "review", "label": "stars"}`.
        task: `classification`, `completion` or `text`; found from the columns where it is not given.

    Returns:
        The rows, all values as text; labels are composed (NFC), and without characters that nobody sees.

    Raises:
        DataError: no such file, a line that cannot be read, a column that is missing, no rows, an empty value.
        StorageError: there are many rows, and no room for a temporary file.
    """
    name = str(source) if isinstance(source, (str, Path)) else "rows"
    records = read_records(source)
    first = next(records, None)
    if first is None:
        raise DataError(f"{name} has no rows; give at least one, with the column names in the first line of a CSV")
    layout = _layout(first, records, dict(map or {}), task, name)
    reading = _Reading(layout, name, list(first), told=task is not None)
    rows = kept(reading.rows(chain([first], records)))
    if layout.task == "classification":
        warn_of_labels(reading.labels, len(rows), name)
    inputs = layout.inputs if len(layout.inputs) > 1 else ()
    return Rows(rows, layout.task, name, inputs=inputs, gaps=reading.gaps, nested=reading.nested)


def as_rows(source: Source, task: Task | None = None) -> Rows:
    """Return rows as they are, and read what `load_data` reads: a file's name, dictionaries, a data frame."""
    return source if isinstance(source, Rows) else load_data(source, task=task)


def _layout(first: Record, records: Iterator[Record], mapping: dict[str, str], task: Task | None, name: str) -> Layout:
    """Find out what the rows are for, mostly from the first one's columns.

    Where those do not do, a column is there if any row has it, and then the first row lacks it.
    """
    try:
        return find_layout(list(first), mapping, task, name)
    except DataError:
        columns = dict.fromkeys(first, 1)
        for number, record in enumerate(records, start=2):
            new = [column for column, value in record.items() if column not in columns and _is_there(value)]
            columns.update(dict.fromkeys(new, number))
        if len(columns) == len(first):
            raise
        layout = find_layout(list(columns), mapping, task, name)
        late = next(c for c in (*layout.inputs, *layout.names.values()) if columns.get(c, 1) > 1)
        raise DataError(_lacks(name, late, columns[late])) from None


def _lacks(name: str, column: str, number: int) -> str:
    return f"{name}, row 1: it has no {column!r}, which row {number} has; give all rows the same columns"


class _Reading:
    """Turns records into rows, and notes on the way what is to be known of all of them.

    Attributes:
        labels: how many rows have each.
        gaps, nested: as in `Rows`.
    """

    def __init__(self, layout: Layout, name: str, columns: Sequence[str], *, told: bool) -> None:
        self.layout, self.name, self.told = layout, name, told
        self.columns = frozenset(columns)
        self.labels = Counter[str]()
        self.gaps = False
        self.nested: dict[str, int] = {}

    def rows(self, records: Iterable[Record]) -> Iterator[Row]:
        """Give a row of texts for each record."""
        for number, record in enumerate(records, start=1):
            if not record.keys() <= self.columns:
                self._require_known(record, number)
            row = self._row(record, f"{self.name}, row {number}", number)
            if "label" in self.layout.names:
                self.labels[row["label"]] += 1
            yield row

    def _require_known(self, record: Record, number: int) -> None:
        """Make sure that a column that the first row has not changes nothing of what the first row's said.

        Raises:
            DataError: it has a target, say, where all seemed to be plain text.
        """
        new = [column for column in record if column not in self.columns and _is_there(record[column])]
        self.layout.require_none_hidden(new, self.name)
        if self.told or self.layout.task != "text":
            return
        late = next((column for column in new if self.layout.alone or column in ("label", "target")), None)
        if late is not None:
            raise DataError(f"{_lacks(self.name, late, number)}, or say --task text")

    def _row(self, record: Record, where: str, number: int) -> Row:
        names = self.layout.names
        needed = set(names.values())
        row = {}
        for column, value in record.items():
            if type(value) is str:
                row[column] = value
            elif column in needed:
                row[column] = "" if not _is_there(value) else scalar_text(value, column, where)
            else:
                row[column], is_text = loose_text(value)
                if not is_text:
                    self.nested.setdefault(column, number)
        row.update({column: row.get(held, "") for column, held in names.items()})
        row.update({column: "" for column in self.layout.inputs if column not in row})
        require_characters(row, where)
        if "label" in names:
            row["label"] = clean_label(row["label"])
        self._require_values(row, where)
        return row

    def _require_values(self, row: Row, where: str) -> None:
        """Make sure that a row has a target, and something that a template can make its input of."""
        names = self.layout.names
        for column, held in names.items():
            if not is_blank(row[column]):
                continue
            taken = {*names, *names.values()}
            if column in ("label", "target") or all(is_blank(row[c]) for c in row.keys() - taken):
                inputs = ", ".join(self.layout.inputs)
                several = column == "input" and len(self.layout.inputs) > 1
                raise DataError(f"{where}: the column{f's {inputs} are' if several else f' {held!r} is'} empty")
            self.gaps = True
        if len(names) > 1 and all(row[column].strip() == held for column, held in names.items()):
            raise DataError(
                f"{where}: it has the column names for values, as where two tables were joined; leave it out"
            )


def _is_there(value: object) -> bool:
    """Tell whether a value is one: 0 and False are, an empty text and NaN are not."""
    if isinstance(value, str):
        return not is_blank(value)
    try:
        return spelled(value) is not None
    except NoScalarError:
        return True
