"""Lines of text files in UTF-8, and JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from softprompt.errors import DataError

Record = dict[str, Any]
BYTE_ORDER_MARK = "\ufeff"


def text_lines(path: Path) -> Iterator[str]:
    """Yield a file's lines with their line feeds, without byte order marks before the first.

    Raises:
        DataError: a line is not UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            # In UTF-16 most letters are a byte and a NUL; without a mark, that is valid UTF-8 too.
            if number == 1 and (line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in line):
                raise DataError(f"{path}: it is UTF-16 or no text at all, for it has NUL bytes; save the file as UTF-8")
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: not UTF-8; save the file as UTF-8") from error
            # Spreadsheets write a mark before the first column's name; some programs add a second one.
            yield text.lstrip(BYTE_ORDER_MARK) if number == 1 else text


def has_byte_order_mark(path: Path) -> bool:
    """Tell whether a file begins with the byte order mark of UTF-8."""
    with path.open("rb") as file:
        return file.read(3) == BYTE_ORDER_MARK.encode()


def json_lines(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield each line of a JSONL file that is not blank, and its record, see `parse_json_line`."""
    for number, line in enumerate(text_lines(path), start=1):
        record = parse_json_line(line, f"{path}, line {number}")
        if record is not None:
            yield line.lstrip(BYTE_ORDER_MARK), record


def parse_json_line(line: str, where: str) -> Record | None:
    """Return the record in a line of JSON; None if the line is blank.

    Raises:
        DataError: it is not a JSON object.
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
    except ValueError as error:  # Python refuses to parse numbers of more than 4,300 digits
        raise DataError(f"{where}: a number of too many digits; put it in quotes") from error
    if not isinstance(record, dict):
        raise DataError(f'{where}: must be an object such as {{"text": …}}, not {line[:40]!r}')
    return record
