"""Reading records: files by their ending, data sets of the hub, data frames and dictionaries."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from softprompt.data.csv_reader import read_csv
from softprompt.data.lines import BYTE_ORDER_MARK, text_lines
from softprompt.errors import DataError, nearest
from softprompt.extras import require_package

Record = dict[str, Any]

ENDINGS = (".csv", ".jsonl", ".ndjson", ".parquet")
_AT_ONCE = 1000  # rows of a table that are turned into dictionaries together
_RANGE = re.compile(r"^(?P<path>.+)\[(?P<start>\d{0,18}):(?P<stop>\d{0,18})\]$")


def read_records(source: Any) -> Iterator[Record]:
    """Give the records of a file, a data set or a list, as `load_data` takes them; their values are as they were.

    Raises:
        DataError: no such file, or a line that cannot be read.
    """
    if not isinstance(source, (str, Path)):
        return _dictionaries(source)
    name, start, stop = split_range(str(source))
    return islice(_read(name), start, stop)


def _dictionaries(source: Any) -> Iterator[Record]:
    pandas, datasets = sys.modules.get("pandas"), sys.modules.get("datasets")  # whoever has such a thing imported it
    if pandas is not None and isinstance(source, pandas.DataFrame):
        names = [str(column) for column in source.columns]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"the data frame has a column twice: {', '.join(twice)}")
        for start in range(0, len(source), _AT_ONCE):
            yield from map(_named_by_texts, source.iloc[start : start + _AT_ONCE].to_dict("records"))
        return
    if datasets is not None and isinstance(source, datasets.Dataset) and source.format["type"] not in (None, "custom"):
        source = source.with_format(None)  # values as they are kept, not tensors or tables
    if not isinstance(source, Iterable):
        raise DataError(
            f"rows are a file's name, a list of dictionaries, a data frame or a data set, not {str(source)[:40]!r}"
        )
    for record in source:
        if not isinstance(record, Mapping):
            raise DataError(f"rows must be dictionaries, not {str(record)[:40]!r}; of a DatasetDict give a split")
        yield _named_by_texts(record)


def _named_by_texts(record: Mapping[Any, Any]) -> Record:
    """Return a record whose columns are called by texts: a data frame's may be numbers."""
    return {str(column): value for column, value in record.items()}


def split_range(source: str) -> tuple[str, int | None, int | None]:
    """Return a source without its row range, and the range: `prompts.csv[:50]`."""
    match = _RANGE.match(source)
    if not match:
        return source, None, None
    start, stop = (int(match[group]) if match[group] else None for group in ("start", "stop"))
    return match["path"], start, stop


def _read(source: str) -> Iterator[Record]:
    if source.startswith("hub:"):
        yield from _read_hub(source.removeprefix("hub:"))
        return
    path = existing_file(source)
    readers = {".csv": read_csv, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".parquet": _read_parquet}
    try:
        yield from readers[path.suffix.lower()](path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def existing_file(source: str) -> Path:
    """Return a data file's path.

    Raises:
        DataError: there is no such file, or it is of a kind that is not read.
    """
    path = Path(source)
    try:
        missing = not path.exists()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise DataError(f"no such file: {source[:80]}…: {getattr(error, 'strerror', error)}") from error
    if missing:
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"no such file: {path}{nearest(path.name, there)}")
    if path.is_dir():
        raise DataError(f"{path} is a folder; give a .csv, .jsonl or .parquet file in it, or hub:{path}")
    if path.suffix.lower() not in ENDINGS:
        raise DataError(f"{path} ends in {path.suffix!r}; allowed are {', '.join(ENDINGS)}")
    return path


def _read_parquet(path: Path) -> Iterator[Record]:
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


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(text_lines(path), start=1):
        record = json_record(line, f"{path}, line {number}")
        if record is not None:
            yield record


def json_record(line: str, where: str) -> Record | None:
    """Return what a line of JSON says, None where it is blank.

    Raises:
        DataError: it is no object.
    """
    line = line.removesuffix("\n").lstrip(BYTE_ORDER_MARK)  # joined files have marks in the middle
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"{where}: lists or objects too deep in each other; give texts") from error
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise DataError(f"{where}: a number of too many digits; put it in quotes") from error
    if not isinstance(record, dict):
        raise DataError(f'{where}: must be an object such as {{"text": …}}, not {line[:40]!r}')
    return record


def _read_hub(source: str) -> Iterator[Record]:
    require_package("datasets", f"hub:{source}")
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        yield from _dictionaries(load_dataset(name, split=split or "train"))
    except Exception as error:  # datasets raises many kinds, network errors among them; all mean the same here
        raise DataError(f"cannot load the data set {name!r}, split {split or 'train'!r}: {error}") from error
