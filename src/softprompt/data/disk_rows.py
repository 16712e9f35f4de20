"""Many rows, kept in a temporary file: a data file of a million rows does not need memory in proportion."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import overload

import numpy as np
from numpy.typing import NDArray

from softprompt.errors import StorageError

Index = range | NDArray[np.int64]
_MOST_HELD = 2**24  # bytes of rows that stay in memory, by a rough count
_EACH = 400  # bytes that a row takes besides its characters
_encode = json.JSONEncoder(ensure_ascii=False).encode


def kept(rows: Iterable[dict[str, str]]) -> Sequence[dict[str, str]]:
    """Return rows that are read one after the other as a sequence: a tuple, or spooled where they are many.

    Raises:
        StorageError: there is no room for a temporary file.
    """
    rest, held, size = iter(rows), [], 0
    for row in rest:
        held.append(row)
        size += _EACH + sum(map(len, row.values()))
        if size > _MOST_HELD:
            return DiskRows.of(chain(held, rest))
    return tuple(held)


class DiskRows(Sequence[dict[str, str]]):
    """Rows in a temporary file, or some of them in some order; they are read when they are asked for.

    Rows that came out of a slice or a pick share the file. It may be read from several threads at once.
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

    def pick(self, indices: Iterable[int]) -> DiskRows:
        """Return the rows at some indices, in that order."""
        return DiskRows(self._row_file, np.asarray(self._index)[np.fromiter(indices, np.int64)])


class _RowFile:
    """A temporary file without a name, gone with its last reader: a line of JSON a row.

    Attributes:
        offsets: where each row begins, and where the last one ends; 8 bytes a row.
    """

    def __init__(self) -> None:
        self.offsets = array("q", [0])
        self._turn = threading.Lock()
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
            self._give_up(error)
        self.offsets.append(self.offsets[-1] + len(line))

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        with suppress(OSError):  # closing tries to write what is left once more
            self._file.close()
        raise _no_room(error) from error

    def read(self, number: int) -> dict[str, str]:
        start, end = self.offsets[number], self.offsets[number + 1]
        if hasattr(os, "pread"):  # leaves the file's position alone, which threads and forked processes share
            line = os.pread(self._file.fileno(), end - start, start)
        else:  # Windows
            with self._turn:
                self._file.seek(start)
                line = self._file.read(end - start)
        row: dict[str, str] = json.loads(line.decode())
        return row


def _no_room(error: OSError) -> StorageError:
    return StorageError(
        f"cannot keep the rows in a temporary file in {tempfile.tempdir or 'any folder'}: {error.strerror}; free some "
        "space, or set TMPDIR to a folder that has some"
    )
