"""Reads records from files, data sets of the hub, data frames and dictionaries."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from softprompt.data.csv_reader import CsvFile
from softprompt.data.text_files import Record, json_lines
from softprompt.errors import DataError, nearest
from softprompt.extras import require_package

Kind = Literal["csv", "jsonl", "parquet", "lines"]  # of data; `lines` are plain texts on stdin
_KINDS: dict[str, Kind] = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_CHUNK_ROWS = 1000  # rows of a table that are converted to dictionaries at once
_RANGE = re.compile(r"^(?P<path>.+)\[(?P<start>\d{0,18}):(?P<stop>\d{0,18})\]$")


def read_records(source: Any) -> Iterator[Record]:
    """Yield the records of a source of `load_data`, with their values unchanged.

    Raises:
        DataError: no such file, or a line that cannot be read.
    """
    if not isinstance(source, (str, Path)):
        return _dictionaries(source)
    name, start, stop = split_range(str(source))
    return islice(_read(name), start, stop)


def _dictionaries(source: Any) -> Iterator[Record]:
    pandas, datasets = sys.modules.get("pandas"), sys.modules.get("datasets")  # imported if the source is one of theirs
    if pandas is not None and isinstance(source, pandas.DataFrame):
        names = [str(column) for column in source.columns]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"the data frame has a column twice: {', '.join(twice)}")
        for start in range(0, len(source), _CHUNK_ROWS):
            yield from map(_with_text_names, source.iloc[start : start + _CHUNK_ROWS].to_dict("records"))
        return
    if datasets is not None and isinstance(source, datasets.Dataset) and source.format["type"] not in (None, "custom"):
        source = source.with_format(None)  # the stored values, not tensors or tables
    if not isinstance(source, Iterable):
        raise DataError(
            f"rows are a file's name, a list of dictionaries, a data frame or a data set, not {str(source)[:40]!r}"
        )
    for record in source:
        if not isinstance(record, Mapping):
            raise DataError(f"rows must be dictionaries, not {str(record)[:40]!r}; of a DatasetDict give a split")
        yield _with_text_names(record)


def _with_text_names(record: Mapping[Any, Any]) -> Record:
    """Return a record with texts as column names: a data frame may have numbers."""
    return {str(column): value for column, value in record.items()}


def split_range(source: str) -> tuple[str, int | None, int | None]:
    """Split `prompts.csv[:50]` into the source and its row range."""
    match = _RANGE.match(source)
    if not match:
        return source, None, None
    start, stop = (int(match[group]) if match[group] else None for group in ("start", "stop"))
    return match["path"], start, stop


def _read(source: str) -> Iterator[Record]:
    if source.startswith("hub:"):
        yield from _read_hub(source.removeprefix("hub:"))
        return
    path = require_file(source)
    try:
        match kind_of(path):
            case "csv":
                yield from (record for _, record in CsvFile(path))
            case "jsonl":
                yield from (record for _, record in json_lines(path))
            case _:
                yield from _read_parquet(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def require_file(source: str) -> Path:
    """Return the path of a data file."""
    path = Path(source)
    try:
        missing = not path.exists()
    except (OSError, ValueError) as error:  # an impossible file name
        raise DataError(f"no such file: {source[:80]}…: {getattr(error, 'strerror', error)}") from error
    if missing:
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"no such file: {path}{nearest(path.name, there)}")
    if path.is_dir():
        raise DataError(f"{path} is a folder; give a .csv, .jsonl or .parquet file in it, or hub:{path}")
    kind_of(path)
    return path


def kind_of(path: Path) -> Kind:
    """Return the kind of a file by its ending, which must be a supported one."""
    if path.suffix.lower() not in _KINDS:
        raise DataError(f"{path} ends in {path.suffix!r}; allowed are {', '.join(_KINDS)}")
    return _KINDS[path.suffix.lower()]


def _read_parquet(path: Path) -> Iterator[Record]:
    require_package("pyarrow", str(path))
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        with path.open("rb") as file:
            # With the defaults of these two, pyarrow reads a whole column of a row group at once.
            for batch in ParquetFile(file, buffer_size=2**16, pre_buffer=False).iter_batches(_CHUNK_ROWS):
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error


def _read_hub(source: str) -> Iterator[Record]:
    require_package("datasets", f"hub:{source}")
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        yield from _dictionaries(load_dataset(name, split=split or "train"))
    except Exception as error:  # of many types, network errors included
        raise DataError(f"cannot load the data set {name!r}, split {split or 'train'!r}: {error}") from error
