"""Rows in a temporary file, if they are many: the memory of a data set does not grow with its rows."""

from __future__ import annotations

import gzip
import io
import json
import os
import tempfile
import threading
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from softprompt.errors import StorageError

Index = range | NDArray[np.int64]
MAX_IN_MEMORY = 2**24  # bytes of rows that stay in memory, estimated
_ROW_OVERHEAD = 400  # bytes that a row takes besides its characters
_encode = json.JSONEncoder(ensure_ascii=False).encode


def store_rows(rows: Iterable[dict[str, str]]) -> Sequence[dict[str, str]]:
    """Return rows as a tuple, or on disk if they are many.

    Raises:
        StorageError: there is no room for a temporary file.
    """
    rest, in_memory, size = iter(rows), [], 0
    for row in rest:
        in_memory.append(row)
        size += _ROW_OVERHEAD + sum(map(len, row.values()))
        if size > MAX_IN_MEMORY:
            return DiskRows.of(chain(in_memory, rest))
    return tuple(in_memory)


class DiskRows(Sequence[dict[str, str]]):
    """Rows in a temporary file, or some of them in any order; each is read when it is used.

    Slices and picks share the file. Several threads may read it at once. They are pickled as their content, compressed,
    since another machine cannot read the file; only the rows of a slice or pick are pickled. Few rows are unpickled as
    a tuple (`store_rows`).
    """

    def __init__(self, row_file: _RowFile, index: Index) -> None:
        self._row_file, self._index = row_file, index

    @classmethod
    def of(cls, rows: Iterable[dict[str, str]]) -> DiskRows:
        """Write rows to a temporary file."""
        row_file = _RowFile()
        for row in rows:
            row_file.append(row)
        row_file.flush()
        return cls(row_file, range(len(row_file.offsets) - 1))

    @overload
    def __getitem__(self, index: int) -> dict[str, str]: ...
    @overload
    def __getitem__(self, index: slice) -> DiskRows: ...
    def __getitem__(self, index: int | slice) -> dict[str, str] | DiskRows:
        if isinstance(index, slice):
            return DiskRows(self._row_file, self._index[index])
        return self._row_file.read(int(self._index[index]))

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[dict[str, str]]:
        return map(self._row_file.read, self._index)

    def __reduce__(self) -> tuple[Any, ...]:
        compressed = io.BytesIO()
        with gzip.GzipFile(fileobj=compressed, mode="wb", compresslevel=1, mtime=0) as file:
            file.writelines(map(self._row_file.read_line, self._index))
        return _unpickle, (compressed.getvalue(),)

    def pick(self, indices: Iterable[int]) -> DiskRows:
        """Return the rows at some indices, in that order."""
        return DiskRows(self._row_file, np.asarray(self._index)[np.fromiter(indices, np.int64)])


def _unpickle(compressed: bytes) -> Sequence[dict[str, str]]:
    with gzip.GzipFile(fileobj=io.BytesIO(compressed)) as lines:
        return store_rows(map(json.loads, lines))


class _RowFile:
    """A temporary file without a name, deleted with its last reader: a line of JSON per row.

    Attributes:
        offsets: where each row begins, and where the last one ends; 8 bytes per row.
    """

    def __init__(self) -> None:
        self.offsets = array("q", [0])
        self._lock = threading.Lock()
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
        except OSError as error:
            raise _no_room(error) from error
        weakref.finalize(self, self._file.close)

    def append(self, row: dict[str, str]) -> None:
        line = f"{_encode(row)}\n".encode()
        try:
            self._file.write(line)
        except OSError as error:
            self._fail(error)
        self.offsets.append(self.offsets[-1] + len(line))

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        with suppress(OSError):  # closing tries once more to write the buffer
            self._file.close()
        raise _no_room(error) from error

    def read(self, number: int) -> dict[str, str]:
        row: dict[str, str] = json.loads(self.read_line(number).decode())
        return row

    def read_line(self, number: int) -> bytes:
        start, end = self.offsets[number], self.offsets[number + 1]
        if hasattr(os, "pread"):  # does not move the file's position, which threads and forked processes share
            return os.pread(self._file.fileno(), end - start, start)
        with self._lock:  # Windows
            self._file.seek(start)
            return self._file.read(end - start)


def _no_room(error: OSError) -> StorageError:
    return StorageError(
        f"cannot keep the rows in a temporary file in {tempfile.tempdir or 'any folder'}: {error.strerror}; free some "
        "space, or set TMPDIR to a folder that has some"
    )
