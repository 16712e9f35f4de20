"""The lines of a text file, as UTF-8; what is in another encoding is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from softprompt.errors import DataError

BYTE_ORDER_MARK = "\ufeff"


def text_lines(path: Path) -> Iterator[str]:
    """Give a file's lines, each with the line feed that ends it; byte order marks before the first are left out.

    Raises:
        DataError: a line is not UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            # A letter of UTF-16 is a byte and a NUL mostly; without a mark that is UTF-8 too, but no text.
            if number == 1 and (line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in line):
                raise DataError(f"{path}: it is UTF-16 or no text at all, for it has NUL bytes; save the file as UTF-8")
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: not UTF-8; save the file as UTF-8") from error
            # Spreadsheets put a mark before the first column's name, and programs that add one may find one there.
            yield text.lstrip(BYTE_ORDER_MARK) if number == 1 else text
