"""Predicting a file: rows are written with their predictions, 256 at a time, and a run can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from softprompt.config import GenerateConfig, Mode
from softprompt.data.added_columns import (
    RowSource,
    RowWriter,
    SourceRow,
    complete_rows,
    open_rows,
    write_parquet,
)
from softprompt.data.readers import Kind, kind_of
from softprompt.data.rows import Row
from softprompt.errors import DataError, InputError
from softprompt.evaluation.predict import AT_ONCE, predict_inputs
from softprompt.generation import answer_mode, input_row, require_columns
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.ensemble import Prompt
from softprompt.storage import storage_errors, write_text

Found = Mapping[str, Any]


def predict_file(
    model: FrozenModel,
    source: RowSource,
    prompt: Prompt | None,
    out: Path | None,
    *,
    map: Mapping[str, str],
    mode: Mode | None = None,
    config: GenerateConfig | None = None,
    probabilities: bool = False,
    resume: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Predict rows and write each with its prediction; return how many there are.

    Rows are predicted and written in groups of 256, counted from the first row. A resumed run starts with the first row
    of a group, so that it ends with the same file as a run that was never stopped.

    Args:
        model: the frozen model.
        source: the rows.
        prompt: None for the base model.
        out: the file; None for stdout, in the source's kind.
        map, mode, config: as of `predict`.
        probabilities: whether to write every label's probability.
        resume: continue the file of a run that was stopped.
        progress: called with the number of rows that are written.

    Raises:
        InputError: a row cannot be predicted; those before it are in the file. Or the file cannot be
            continued.
        StorageError: the file cannot be written.
    """
    require_columns(prompt, map)
    chooses = answer_mode(prompt, mode, config) == "choose"
    added = [
        "prediction",
        *(["probability"] if chooses else []),
        *(["probabilities"] if chooses and probabilities else []),
    ]
    sink = _sink(source, out, added, _identity(model, prompt, mode, config, added), resume)
    done = sink.begin()
    if done and next(islice(source.rows, done - 1, None), None) is None:
        raise InputError(
            f"{out} has {done} rows, and {source.name} has fewer; give another --out, and leave --resume out"
        )
    progress(done)

    def predicted(rows: Sequence[SourceRow]) -> list[Found]:
        inputs: list[Row] = [input_row(prompt, row.record, row.where, map) for row in rows]
        made = predict_inputs(model, inputs, prompt, mode=mode, config=config)
        return [each.columns(probabilities=probabilities) for each in made]

    while True:
        rows, error = _next_rows(source.rows)
        try:
            found = predicted(rows) if rows else []
        except InputError:
            rows, found, error = _up_to_the_bad_one(rows, predicted)
        sink.write(rows, found)
        done += len(rows)
        progress(done)
        if error is not None:
            sink.stop()
            raise error
        if len(rows) < AT_ONCE:
            break
    sink.finish()
    return done


def _next_rows(rows: Iterator[SourceRow]) -> tuple[list[SourceRow], InputError | None]:
    """Return the next rows, and the error of the row after them if it cannot be read."""
    read: list[SourceRow] = []
    try:
        for row in islice(rows, AT_ONCE):
            read.append(row)
    except InputError as error:
        return read, error
    return read, None


def _up_to_the_bad_one(
    rows: Sequence[SourceRow], predicted: Callable[[Sequence[SourceRow]], list[Found]]
) -> tuple[list[SourceRow], list[Found], InputError | None]:
    """Return the rows before the first that cannot be predicted, their predictions, and that row's error."""
    good: list[SourceRow] = []
    found: list[Found] = []
    for row in rows:
        try:
            found += predicted([row])
        except InputError as error:
            reason = str(error).removeprefix("texts, row 1: ").removeprefix("text 1: ")
            at = reason if reason.startswith(row.where) else f"{row.where}: {reason}"
            return good, found, DataError(at)
        good.append(row)
    return good, found, None


def _identity(
    model: FrozenModel, prompt: Prompt | None, mode: Mode | None, config: GenerateConfig | None, added: Sequence[str]
) -> str:
    """Return a hash of all that predictions depend on."""
    digest = hashlib.sha256()
    for member in prompt.members if prompt is not None else ():
        digest.update(member.weights.numpy().tobytes())
    rest = {
        "prompt": prompt.record.model_dump(mode="json") if prompt is not None else None,
        "biases": [member.label_bias for member in prompt.members] if prompt is not None else None,
        "precision": str(model.hf_model.dtype),
        "mode": mode,
        "rules": (config or GenerateConfig()).model_dump(),
        "columns": list(added),
        "at_once": AT_ONCE,
    }
    digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()


def _sink(source: RowSource, out: Path | None, added: Sequence[str], identity: str, resume: bool) -> _Sink:
    if out is None:
        if source.kind == "parquet":
            raise InputError(f"{source.name} is a Parquet file, which no terminal can show; give --out FILE")
        if resume:
            raise InputError("--resume goes on with a file; give it with --out")
        return _Stdout(source, added)
    kind = kind_of(out)
    if out.exists() and Path(source.name).exists() and out.samefile(source.name):
        raise InputError(f"--out {out} is the file that is read; give another one")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: no such folder: {out.parent}")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; give a file")
    return (_ParquetFile if kind == "parquet" else _TextFile)(source, added, out, kind, identity, resume)


class _Sink(Protocol):
    """Where rows and their predictions are written."""

    def begin(self) -> int:
        """Open it, and return how many rows it has already."""

    def write(self, rows: Sequence[SourceRow], found: Sequence[Found]) -> None:
        """Write rows."""

    def stop(self) -> None:
        """Close it before the end of the rows: the next one cannot be predicted."""

    def finish(self) -> None:
        """Close it after the last row."""


class _Stdout:
    def __init__(self, source: RowSource, added: Sequence[str]) -> None:
        self._text, self._begun = RowWriter(source, source.kind, added), False

    def begin(self) -> int:
        return 0

    def write(self, rows: Sequence[SourceRow], found: Sequence[Found]) -> None:
        if not rows:  # the first row may be at fault
            return
        if not self._begun:
            sys.stdout.write(self._text.begin(rows[0]))
            self._begun = True
        sys.stdout.writelines(self._text.row(row, each) for row, each in zip(rows, found, strict=True))
        sys.stdout.flush()

    def stop(self) -> None: ...

    def finish(self) -> None:
        if not self._begun:
            sys.stdout.write(self._text.begin(None))


class _TextFile:
    """A CSV or JSONL file, and beside it, until it is finished, a file with the identity of the run."""

    def __init__(
        self, source: RowSource, added: Sequence[str], out: Path, kind: Kind, identity: str, resume: bool
    ) -> None:
        self._source, self._out, self._kind = source, out, kind
        self._text = RowWriter(source, kind, added)
        self._identity, self._resume = identity, resume
        self._grows, self._note = self._place(), out.with_name(f".{out.name}.unfinished")
        self._begun = False

    def _place(self) -> Path:
        """Return the file that is appended to."""
        return self._out

    def begin(self) -> int:
        before = self._note.read_text(encoding="utf-8").strip() if self._note.exists() else None
        if self._resume:
            if before is None:
                raise InputError(f"{self._out} is not the beginning of a file that was stopped; leave --resume out")
            if before != self._identity:
                raise InputError(
                    f"{self._out} was begun with another prompt, precision or settings; give the same ones to go on, "
                    f"or delete it and {self._note}"
                )
            return self._cut_back()
        if before is not None and self._grows.exists():
            raise InputError(
                f"{self._out} was begun and not finished; --resume goes on with it. To begin anew, delete {self._note}"
            )
        write_text(self._note, f"{self._identity}\n")
        write_text(self._grows, "")
        return 0

    def _cut_back(self) -> int:
        """Truncate the file to whole groups of rows, and return how many rows are left."""
        with storage_errors(self._grows):
            if not self._grows.exists() or not self._grows.stat().st_size:
                return 0
            ends = complete_rows(self._grows, self._kind)
            done = (len(ends) - 1) // AT_ONCE * AT_ONCE
            os.truncate(self._grows, ends[done] if done else 0)
        if not done:  # the header may be incomplete too
            return 0
        self._begun = True
        first = None if self._source.kind == self._kind else next(open_rows(self._source.name).rows, None)
        self._text.begin(first)
        return done

    def write(self, rows: Sequence[SourceRow], found: Sequence[Found]) -> None:
        text = "" if self._begun else self._text.begin(rows[0] if rows else None)
        self._begun = True
        text += "".join(self._text.row(row, each) for row, each in zip(rows, found, strict=True))
        with storage_errors(self._grows), self._grows.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def stop(self) -> None: ...

    def finish(self) -> None:
        with storage_errors(self._note):
            self._note.unlink(missing_ok=True)


class _ParquetFile(_TextFile):
    """A Parquet file, which cannot be appended to: predictions are collected in a JSON Lines file beside it."""

    def __init__(
        self, source: RowSource, added: Sequence[str], out: Path, kind: Kind, identity: str, resume: bool
    ) -> None:
        super().__init__(source, added, out, "jsonl", identity, resume)

    def _place(self) -> Path:
        return self._out.with_name(f".{self._out.name}.jsonl")

    def write(self, rows: Sequence[SourceRow], found: Sequence[Found]) -> None:
        text = "".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in found)
        with storage_errors(self._grows), self._grows.open("ab") as file:
            file.write(text.encode())

    def stop(self) -> None:
        self._make()

    def finish(self) -> None:
        self._make()
        with storage_errors(self._grows):
            self._grows.unlink(missing_ok=True)
        super().finish()

    def _make(self) -> None:
        lines = self._grows.read_text(encoding="utf-8").splitlines()
        aside = self._out.with_name(f".{self._out.name}.tmp")
        with storage_errors(self._out):
            write_parquet(self._out, open_rows(self._source.name), map(json.loads, lines), aside)
