"""The values of cells, and how they are written as text."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from numbers import Number
from pathlib import PurePath
from typing import Any
from uuid import UUID

import numpy as np

from softprompt.errors import DataError

SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: no tokenizer accepts one; JSON can contain it
_MAX_WITHOUT_EXPONENT = 1e21  # as in JSON
_SCALARS = (Number, date, time, timedelta, np.datetime64, np.timedelta64, UUID, PurePath)


class NoScalarError(Exception):
    """A value is not one text or one number; the message says what it is."""


def scalar_text(value: object, column: str, where: str) -> str:
    """Return a value as text. Equal values give the same text, whatever their type: `1` and `1.0`, `true`.

    Args:
        value: a text or a number, also in an enum, a NumPy scalar or a 0-dimensional tensor.
        column: its column, for the message.
        where: its row, for the message: `rows.csv, row 3`.

    Raises:
        DataError: it is missing (None, NaN, `pandas.NA`, NaT), not finite, or a list, a dictionary, an array.
    """
    try:
        text = to_text(value)
    except NoScalarError as error:
        raise DataError(f"{where}: the column {column!r} holds {error}") from error
    if text is None:
        raise DataError(f"{where}: the column {column!r} is empty")
    return text


def loose_text(value: object) -> tuple[str, bool]:
    """Return any value of a column that the task does not need as text, and whether a template may use it."""
    if isinstance(value, bytes):  # a picture, for example
        return value.decode("utf-8", "backslashreplace"), True
    try:
        return to_text(value) or "", True
    except NoScalarError:
        return str(value), False


def to_text(value: object) -> str | None:
    """Return a value as text, None if it is missing.

    Raises:
        NoScalarError: it is not one text or one number.
    """
    value = _unwrap(value)
    if _is_missing(value):
        return None
    if isinstance(value, str):
        return str(value)
    if isinstance(value, (bytes, bytearray)):  # of a Parquet file whose texts are not declared as texts
        return bytes(value).decode("utf-8", "surrogateescape")
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (float, np.floating, Decimal)):
        return _number(value)
    pandas = sys.modules.get("pandas")  # which has scalars such as periods and intervals
    of_pandas = pandas is not None and not isinstance(value, Iterable) and pandas.api.types.is_scalar(value)
    if isinstance(value, _SCALARS) or of_pandas:
        try:
            return str(value)
        except ValueError as error:  # Python refuses more than 4,300 digits
            raise NoScalarError("a number of too many digits; give it as text") from error
    raise NoScalarError(_describe(value))


def _unwrap(value: Any) -> Any:
    """Return the value of an enum, a NumPy scalar, or a 0-dimensional array or tensor."""
    while isinstance(value, Enum):
        value = value.value
    torch = sys.modules.get("torch")  # imported if the value is a tensor
    if torch is not None and isinstance(value, torch.Tensor) and value.dim() == 0:
        number = value.item()
        # Not more digits than its precision: 0.1, not 0.10000000149011612.
        return np.float32(number) if isinstance(number, float) and value.dtype != torch.float64 else number
    if isinstance(value, np.ndarray) and value.ndim == 0 and value is not np.ma.masked:
        return value[()]
    return value.item() if isinstance(value, np.integer) else value


def _is_missing(value: object) -> bool:
    if value is None or value is np.ma.masked:
        return True
    if isinstance(value, Decimal):
        return value.is_nan()
    if isinstance(value, (float, np.floating)):  # a missing value in a data frame is NaN
        return math.isnan(value)
    if isinstance(value, (np.datetime64, np.timedelta64)):
        return bool(np.isnat(value))
    pandas = sys.modules.get("pandas")
    return pandas is not None and (value is pandas.NA or value is pandas.NaT)


def _number(value: Any) -> str:
    """Write a number. Whole ones get no fraction: in a data frame, a column with a missing value has floats."""
    if not math.isfinite(value):
        raise NoScalarError(f"{value}, which is no number that can be learned; give it as text")
    if abs(value) < _MAX_WITHOUT_EXPONENT and value == int(value):
        return str(int(value))
    return format(value.normalize(), "f") if isinstance(value, Decimal) else str(value)


def _describe(value: object) -> str:
    if is_conversation(value):
        return f"a conversation, {_shorten(value)}; {NO_CONVERSATIONS}"
    kind = "a list" if isinstance(value, (list, tuple)) else "a dictionary" if isinstance(value, dict) else None
    kind = kind or f"a value of type {type(value).__name__}"
    return f"{kind}, {_shorten(value)}; give one text or one number"


NO_CONVERSATIONS = (
    "conversations are not supported yet: give the columns input and target, or text, with one text in each"
)


def is_conversation(value: object) -> bool:
    """Tell whether a value is a chat: a list of messages."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        return False
    return isinstance(value[0], Mapping) and (
        {"role", "content"} <= set(value[0]) or {"from", "value"} <= set(value[0])
    )


def _shorten(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}…"


def require_characters(row: Mapping[str, object], where: str) -> None:
    """Make sure that a row has no surrogates."""
    for column, value in row.items():
        if surrogate := SURROGATE.search(str(value)):
            raise DataError(
                f"{where}: the {column} has half of a character, or a byte that is not UTF-8 ({surrogate.group()!a}); "
                "repair it where it comes from"
            )
