"""The task of rows, and the columns that it uses."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from softprompt.data.values import NO_CONVERSATIONS
from softprompt.errors import DataError, nearest, warn

Task = Literal["classification", "completion", "text"]

TARGET_COLUMN: dict[Task, str | None] = {"classification": "label", "completion": "target", "text": None}
INPUT_COLUMN: dict[Task, str] = {"classification": "text", "completion": "input", "text": "text"}
INSTRUCTED = ("instruction", "input")  # the inputs in Alpaca's format; the target is `output`, `input` may be empty
_ANSWER = "output"
_MAPPABLE = ("text", "label", "input", "target")
_CONVERSATIONS = ("messages", "conversations", "conversation")


@dataclass(frozen=True)
class Layout:
    """The columns that a task uses.

    Attributes:
        names: from the task's columns to those of the source.
        inputs: the columns of an input, by their names in `Rows`.
        alone: whether a column is the text because it is the only one.
    """

    task: Task
    names: Mapping[str, str]
    inputs: tuple[str, ...]
    alone: bool = False

    def require_none_hidden(self, columns: Collection[str], name: str) -> None:
        """Make sure that the map gives no name that an unused column has: a template would show the wrong one."""
        used = set(self.names.values())
        hidden = next((c for c, source in self.names.items() if c != source and c in columns and c not in used), None)
        if hidden is None:
            return
        cure = f"rename the column {hidden!r} in the file if it is needed, or delete it"
        if {*INSTRUCTED, _ANSWER} <= {*columns}:
            cure = "leave the map out: the columns instruction, input and output are read as they are"
        raise DataError(
            f"{name} has a column {hidden!r} of its own, which --map {hidden}={self.names[hidden]} would hide; {cure}"
        )


def find_layout(columns: Sequence[str], mapping: Mapping[str, str], task: Task | None, name: str) -> Layout:
    """Find the task of rows with these columns.

    Args:
        mapping: from the task's column names to other names in the source.
        task: None to derive it from the columns.

    Raises:
        DataError: a column is missing, or the task is ambiguous.
    """
    for target, column in mapping.items():
        if target not in _MAPPABLE:
            raise DataError(f"cannot map {target!r}{nearest(target, _MAPPABLE)}; allowed are {', '.join(_MAPPABLE)}")
        if column not in columns:
            raise DataError(f"{name} has no column {column!r}{nearest(column, columns)}; it has {_names(columns)}")
    names = {**{c: c for c in columns if c in _MAPPABLE}, **mapping}
    instructed = _is_instructed(columns, names, task)
    if instructed:
        names |= {"input": "input", "target": _ANSWER}
    alone = len(columns) == 1 and not names
    if alone:
        names["text"] = columns[0]
    if task is None:
        # The map decides; a target column with its own name need not be mapped.
        wanted = set(mapping) | ({"label", "target"} & set(names))
        task = (_task_of(wanted) if mapping else None) or _task_of(set(names))
    if task is None:
        raise DataError(
            f"{name} has the columns {_names(columns)}: "
            + (f"{NO_CONVERSATIONS}. Or " if set(_CONVERSATIONS) & set(columns) else "")
            + "say what is in them, with --map text=… --map label=… "
            "for classification, --map input=… --map target=… for completion, or --map text=… for plain text"
        )
    needed = [column for column in (INPUT_COLUMN[task], TARGET_COLUMN[task]) if column]
    for column in needed:
        if column not in names:
            raise DataError(f"{task} needs a column {column!r}: {name} has {_names(columns)}; add --map {column}=…")
    sources = {column: names[column] for column in needed}
    layout = Layout(task, sources, INSTRUCTED if instructed else (INPUT_COLUMN[task],), alone)
    layout.require_none_hidden(columns, name)
    if len(set(sources.values())) < len(sources):
        warn(
            f"{name}: the column {names[needed[0]]!r} is both {' and '.join(needed)}, so the input contains the "
            "answer; map another one"
        )
    return layout


def _is_instructed(columns: Sequence[str], names: Mapping[str, str], task: Task | None) -> bool:
    """Tell whether these are Alpaca's columns: instruction, input (optional) and output."""
    unmapped = names.get("input", "input") == "input" and names.get("target", _ANSWER) == _ANSWER
    fits = task == "completion" or (task is None and ("target" in names or not {"text", "label"} & set(names)))
    return {"instruction", _ANSWER} <= set(columns) and unmapped and fits


def _task_of(names: set[str]) -> Task | None:
    if {"text", "label"} <= names:
        return "classification"
    if {"input", "target"} <= names:
        return "completion"
    return "text" if "text" in names else None


def _names(columns: Sequence[str]) -> str:
    return ", ".join(column or "(one without a name)" for column in columns)
