"""Where rows and their predictions are written: stdout, or a file that a stopped run can continue."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompt.data.added_columns import RowSource, RowWriter, SourceRow, complete_rows, open_rows, write_parquet
from softprompt.data.readers import Kind, kind_of
from softprompt.errors import InputError
from softprompt.storage import storage_errors, write_text

Columns = Mapping[str, Any]  # what is added to a row


def make_writer(
    source: RowSource, out: Path | None, added: Sequence[str], identity: str, group_size: int, *, resume: bool
) -> _StdoutWriter | _TextWriter:
    """Return what writes a file, or stdout.

    Args:
        out: the file; None for stdout, in the source's kind.
        identity: a hash of all that predictions depend on.
        group_size: how many rows are predicted together; a resumed run starts with the first row of a group.
        resume: whether to continue the file of a run that was stopped.

    Raises:
        InputError: `out` cannot be written.
    """
    if out is None:
        if source.kind == "parquet":
            raise InputError(f"{source.name} is a Parquet file, which no terminal can show; give --out FILE")
        if resume:
            raise InputError("--resume continues a file; give it with --out")
        return _StdoutWriter(source, added)
    kind = kind_of(out)
    if out.exists() and Path(source.name).exists() and out.samefile(source.name):
        raise InputError(f"--out {out} is the file that is read; give another one")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: no such folder: {out.parent}")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; give a file")
    return (_ParquetWriter if kind == "parquet" else _TextWriter)(
        source, added, out, kind, identity, group_size, resume
    )


class _StdoutWriter:
    def __init__(self, source: RowSource, added: Sequence[str]) -> None:
        self._rows, self._begun = RowWriter(source, source.kind, added), False

    def begin(self) -> int:
        return 0

    def write(self, rows: Sequence[SourceRow], added: Sequence[Columns]) -> None:
        if not rows:  # the first row may be at fault
            return
        if not self._begun:
            sys.stdout.write(self._rows.begin(rows[0]))
            self._begun = True
        sys.stdout.writelines(self._rows.row(row, each) for row, each in zip(rows, added, strict=True))
        sys.stdout.flush()

    def close(self, *, finished: bool) -> None:
        if finished and not self._begun:
            sys.stdout.write(self._rows.begin(None))


class _TextWriter:
    """Writes a CSV or JSONL file; until it is finished, a file beside it has the identity of the run."""

    def __init__(
        self,
        source: RowSource,
        added: Sequence[str],
        out: Path,
        kind: Kind,
        identity: str,
        group_size: int,
        resume: bool,
    ) -> None:
        self._source, self._out, self._kind = source, out, kind
        self._file, self._identity_file = out, out.with_name(f".{out.name}.unfinished")
        if kind == "parquet":  # which cannot be appended to: added columns are collected beside it
            self._file, self._kind = out.with_name(f".{out.name}.jsonl"), "jsonl"
        self._rows = RowWriter(source, self._kind, added)
        self._identity, self._group_size, self._resume = identity, group_size, resume
        self._begun = False

    def begin(self) -> int:
        """Begin the file or go on with it, and return how many rows it has already."""
        before = self._identity_file.read_text(encoding="utf-8").strip() if self._identity_file.exists() else None
        if self._resume:
            if before is None:
                raise InputError(f"{self._out} is not the beginning of a file that was stopped; leave --resume out")
            if before != self._identity:
                raise InputError(
                    f"{self._out} was begun with another prompt, precision or settings; give the same ones to go on, "
                    f"or delete it and {self._identity_file}"
                )
            return self._truncate()
        if before is not None and self._file.exists():
            raise InputError(
                f"{self._out} was begun and not finished; --resume continues it. To begin anew, delete "
                f"{self._identity_file}"
            )
        write_text(self._identity_file, f"{self._identity}\n")
        write_text(self._file, "")
        return 0

    def _truncate(self) -> int:
        """Truncate the file to whole groups of rows, and return how many rows are left."""
        with storage_errors(self._file):
            if not self._file.exists() or not self._file.stat().st_size:
                return 0
            ends = complete_rows(self._file, self._kind)
            done = (len(ends) - 1) // self._group_size * self._group_size
            os.truncate(self._file, ends[done] if done else 0)
        if not done:  # the header may be incomplete too
            return 0
        self._begun = True
        first = None if self._source.kind == self._kind else next(open_rows(self._source.name).rows, None)
        self._rows.begin(first)
        return done

    def write(self, rows: Sequence[SourceRow], added: Sequence[Columns]) -> None:
        text = "" if self._begun else self._rows.begin(rows[0] if rows else None)
        self._begun = True
        text += "".join(self._rows.row(row, each) for row, each in zip(rows, added, strict=True))
        with storage_errors(self._file), self._file.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def close(self, *, finished: bool) -> None:
        if finished:
            with storage_errors(self._identity_file):
                self._identity_file.unlink(missing_ok=True)


class _ParquetWriter(_TextWriter):
    """Writes a Parquet file at the end, from the rows and a JSONL file of added columns."""

    def write(self, rows: Sequence[SourceRow], added: Sequence[Columns]) -> None:
        text = "".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in added)
        with storage_errors(self._file), self._file.open("ab") as file:
            file.write(text.encode())

    def close(self, *, finished: bool) -> None:
        lines = self._file.read_text(encoding="utf-8").splitlines()
        temporary = self._out.with_name(f".{self._out.name}.tmp")
        with storage_errors(self._out):
            write_parquet(self._out, open_rows(self._source.name), map(json.loads, lines), temporary)
        if finished:
            with storage_errors(self._file):
                self._file.unlink(missing_ok=True)
        super().close(finished=finished)
