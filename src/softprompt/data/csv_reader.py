"""CSV files with commas, quotes and column names, in the variants that spreadsheets and other programs write."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path

from softprompt.data.text_files import BYTE_ORDER_MARK, has_byte_order_mark, text_lines
from softprompt.errors import DataError

_NAMED_SEPARATOR = re.compile(r'"?sep=(.?)"?[\r\n]*', re.IGNORECASE)  # a first line for spreadsheets
_QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*"')
_BLANK_BEFORE_QUOTE = re.compile(r'(?:^|,)[^\S\r\n]+"')
_UNSEEN = f"{BYTE_ORDER_MARK}\u200b\u200e\u200f"


class _Lines(Iterator[str]):
    """The lines of a file for the csv module, which also remembers those of the current record."""

    def __init__(self, path: Path) -> None:
        # A carriage return alone ends a line too.
        self._lines = chain.from_iterable(io.StringIO(line, newline="") for line in text_lines(path))
        self.number, self.record = 0, list[str]()

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        self.record.append(line)
        return line

    @property
    def raw(self) -> str:
        """The record's text in the file."""
        return "".join(self.record)

    @property
    def place(self) -> str:
        """Name the record's lines."""
        first = self.number - len(self.record) + 1
        return f"line {self.number}" if first == self.number else f"line {first} (and on to line {self.number})"

    def unclosed_quote(self) -> str:
        """Name the line with the opening quote that is never closed."""
        ends, open_at = list(accumulate(map(len, self.record))), _open_quote(self.raw)
        after = sum(end > open_at for end in ends[:-1])  # lines of the record after that one
        if not after:
            return f"line {self.number}"
        return f"line {self.number - after}: the quote that opens here does not end before line {self.number}"


@dataclass(frozen=True)
class _Header:
    """The first line.

    Attributes:
        blanks: whether a space follows every comma, so that it belongs to no value.
        unnamed: the number of columns without names at the end, which some spreadsheets write.
    """

    names: list[str]
    raw: str = ""
    blanks: bool = False
    unnamed: int = 0

    def record(self, values: list[str], where: str) -> dict[str, str]:
        """Return the values of a row by column name."""
        width = len(self.names)
        over = [value for value in values[width:] if value.strip()]
        if len(values) not in (width, width + self.unnamed):
            hint = "put a value with a comma or a quote in it in quotes"
            if len(values) > width and not over:
                hint = "the line ends in a comma too many"
            elif len(values) < width and not self.names[-1]:
                hint = "the first line ends in a comma, as if there were one more"
            raise DataError(f"{where}: {len(values)} values where the first line names {width} columns; {hint}")
        if over:
            raise DataError(
                f"{where}: {over[0][:40]!r} is in a column without a name: the first line ends in "
                f"{self.unnamed} commas; name the column there"
            )
        if self._is_again(values[:width]):
            raise DataError(
                f"{where}: it has the column names again, as where two files were joined; delete the line, or give "
                "the columns other names if it is a row"
            )
        return dict(zip(self.names, values, strict=False))

    def _is_again(self, values: list[str]) -> bool:
        found = [_name(value).casefold() for value in values]
        names = [name.casefold() for name in self.names]
        return found == names or (len(names) > 1 and any(names) and sorted(found) == sorted(names))


class CsvFile:
    """A CSV file. Iterating over it gives each record's text in the file, and its values by column name.

    Raises:
        DataError: the file is malformed; the message names the line.
    """

    def __init__(self, path: Path) -> None:
        csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters
        self._path, self._lines = path, _Lines(path)
        with self._quotes_checked():
            self._header = _read_header(path, self._lines)
        mark = BYTE_ORDER_MARK if has_byte_order_mark(path) else ""
        self.header, self.names = mark + self._header.raw, self._header.names

    def __iter__(self) -> Iterator[tuple[str, dict[str, str]]]:
        lines, header = self._lines, self._header
        with self._quotes_checked():
            for values in csv.reader(lines, strict=True, skipinitialspace=header.blanks):
                if values:
                    where = f"{self._path}, {lines.place}"
                    _require_no_blank_before_quote(lines.raw, header.blanks, where)
                    yield lines.raw, header.record(values, where)
                lines.record.clear()

    @contextmanager
    def _quotes_checked(self) -> Iterator[None]:
        try:
            yield
        except csv.Error as error:
            raise DataError(f"{self._path}, {self._lines.unclosed_quote()}: {error}; check the quotes") from error


def _read_header(path: Path, lines: _Lines) -> _Header:
    values = _first_values(lines)
    if separator := _NAMED_SEPARATOR.fullmatch(lines.raw):
        if separator[1] not in ("", ","):
            raise DataError(
                f"{path}: its first line says that {separator[1]!r} separates the columns; save it with commas, and "
                "without that line"
            )
        values = _first_values(lines)
    blanks = len(values) > 1 and all(value.startswith(" ") for value in values[1:])
    _require_no_blank_before_quote(lines.raw, blanks, f"{path}, {lines.place}")
    if blanks:
        values = next(csv.reader(io.StringIO(lines.raw, newline=""), strict=True, skipinitialspace=True))
    raw = lines.raw
    lines.record.clear()
    names = [_name(value) for value in values]
    for separated in (";", "\t", "|"):
        if len(names) == 1 and separated in names[0]:
            raise DataError(f"{path}: its columns are separated by {separated!r}; save it with commas")
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: the first line names a column twice: {', '.join(twice)}")
    if names.count("") < 2:  # one is allowed: data frames are written with an index that has no name
        return _Header(names, raw, blanks)
    named = len(names)
    while named and not names[named - 1]:
        named -= 1
    without = [str(place) for place, name in enumerate(names[:named], start=1) if not name]
    if not named or without:
        which = f"columns {', '.join(without)} and some at its end have" if named else "all columns have"
        raise DataError(f"{path}: in the first line, {which} no name, only commas; give every column a name there")
    return _Header(names[:named], raw, blanks, len(names) - named)


def _first_values(lines: _Lines) -> list[str]:
    """Return the values of the next line that is not blank."""
    lines.record.clear()
    for values in csv.reader(lines, strict=True):
        if values:
            return values
        lines.record.clear()
    return []


def _name(value: str) -> str:
    """Return a column's name without spaces and invisible characters around it."""
    return value.strip().strip(_UNSEEN).strip()


def _require_no_blank_before_quote(raw: str, blanks: bool, where: str) -> None:
    """Make sure that no opening quote follows a space: it would be read as a part of the value.

    If a space follows every comma of the first line (`blanks`), other lines may have them too.
    """
    if not _BLANK_BEFORE_QUOTE.search(raw):
        return
    for start, end, quoted in _values(raw):
        value = raw[start:end].lstrip(" ") if blanks else raw[start:end]
        stripped = value.strip()
        if quoted or not value[:1].isspace():
            continue
        if stripped.startswith('"') and (stripped.endswith('"') or stripped.count('"') % 2):
            raise DataError(
                f"{where}: a space before the quote of {stripped[:40]} would become part of the value; "
                "delete the spaces after the commas, or put one after every comma, in the first line too"
            )


def _open_quote(raw: str) -> int:
    """Return where the first value begins whose opening quote is not closed at its end."""
    for start, _, quoted in _values(raw):
        if raw.startswith('"', start) and not (
            quoted and raw[quoted.end() : quoted.end() + 1] in (",", "\r", "\n", "")
        ):
            return start
    return 0


def _values(raw: str) -> Iterator[tuple[int, int, re.Match[str] | None]]:
    """Yield where each value of a record begins and ends, and its part in quotes."""
    start = 0
    while start < len(raw):
        quoted = _QUOTED.match(raw, start)
        end = raw.find(",", quoted.end() if quoted else start)
        end = len(raw) if end < 0 else end
        yield start, end, quoted
        start = end + 1
