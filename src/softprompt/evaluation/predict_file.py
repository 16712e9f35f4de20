"""Predicting a file: rows are written with their predictions, 256 at a time, and a run can be resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from softprompt.config import GenerateConfig, Mode
from softprompt.data.added_columns import RowSource, SourceRow
from softprompt.data.rows import Row
from softprompt.errors import DataError, InputError
from softprompt.evaluation.predict import AT_ONCE, predict_inputs
from softprompt.evaluation.prediction_writers import Columns, make_writer
from softprompt.generation import answer_mode, input_row, require_columns
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.ensemble import Prompt


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
        prompt: None for the base model.
        out: the file; None for stdout, in the source's kind.
        map, mode, config: as of `predict`.
        probabilities: whether to write every label's probability.
        resume: continue the file of a run that was stopped.

    Raises:
        InputError: a row cannot be predicted; those before it are in the file. Or the file cannot be continued.
        StorageError: the file cannot be written.
    """
    require_columns(prompt, map)
    added = ["prediction"]
    if answer_mode(prompt, mode, config) == "choose":
        added += ["probability", "probabilities"] if probabilities else ["probability"]
    identity = _identity(model, prompt, mode, config, added)
    writer = make_writer(source, out, added, identity, AT_ONCE, resume=resume)
    done = writer.begin()
    if done and next(islice(source.rows, done - 1, None), None) is None:
        raise InputError(
            f"{out} has {done} rows, and {source.name} has fewer; give another --out, and leave --resume out"
        )
    progress(done)

    def predict_rows(rows: Sequence[SourceRow]) -> list[Columns]:
        inputs: list[Row] = [input_row(prompt, row.record, row.where, map) for row in rows]
        predictions = predict_inputs(model, inputs, prompt, mode=mode, config=config)
        return [each.columns(probabilities=probabilities) for each in predictions]

    while True:
        rows, error = _next_rows(source.rows)
        try:
            columns = predict_rows(rows) if rows else []
        except InputError:
            rows, columns, error = _predict_until_error(rows, predict_rows)
        writer.write(rows, columns)
        done += len(rows)
        progress(done)
        if error is not None:
            writer.close(finished=False)
            raise error
        if len(rows) < AT_ONCE:
            break
    writer.close(finished=True)
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


def _predict_until_error(
    rows: Sequence[SourceRow], predict_rows: Callable[[Sequence[SourceRow]], list[Columns]]
) -> tuple[list[SourceRow], list[Columns], InputError | None]:
    """Return the rows before the first that cannot be predicted, their predictions, and that row's error."""
    good: list[SourceRow] = []
    columns: list[Columns] = []
    for row in rows:
        try:
            columns += predict_rows([row])
        except InputError as error:
            reason = str(error).removeprefix("texts, row 1: ").removeprefix("text 1: ")
            at = reason if reason.startswith(row.where) else f"{row.where}: {reason}"
            return good, columns, DataError(at)
        good.append(row)
    return good, columns, None


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
