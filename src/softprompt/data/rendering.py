"""Renders a checked template for a row, within limits on the text and the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jinja2 import nodes
from jinja2.filters import do_title

MOST_BYTES = 1_000_000  # of a rendered input, and of each intermediate text
MOST_WORK = 10 * MOST_BYTES  # characters that the filters and comparisons of one rendering may process
ROW = "row"  # `row["review text"]` is the column `review text`; `row` alone is the column `row`
FILTERS: dict[str, tuple[str, ...]] = {  # names of their arguments
    "default": ("default_value", "boolean"),
    "trim": ("chars",),
    "upper": (),
    "lower": (),
    "title": (),
    "replace": ("old", "new", "count"),
}
_COMPARE: dict[str, Callable[..., bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "gteq": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "lteq": lambda a, b: a <= b,
    "in": lambda a, b: a in b,
    "notin": lambda a, b: a not in b,
}
_TOO_MUCH = f"it makes more than {MOST_BYTES:,} bytes of text; shorten the row or the template"


class TooMuchError(Exception):
    """A rendering exceeds its limits."""


class MissingColumnError(Exception):
    """The row lacks a column that is used."""


class Piece(NamedTuple):
    """A part of a rendered text; `own` if it is from the template itself, not from a column."""

    text: str
    own: bool


@dataclass(frozen=True)
class _Missing:
    """The value of a column that a row lacks."""

    column: str


_Value = str | int | float | None | _Missing


def column_of(node: nodes.Node | None) -> str | None:
    """Return the column of an expression such as `text` or `row["review text"]`; None for other expressions."""
    if isinstance(node, nodes.Name):
        return str(node.name)
    if not (isinstance(node, nodes.Getitem) and isinstance(node.node, nodes.Name) and node.node.name == ROW):
        return None
    return node.arg.value if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str) else None


class Rendering:
    """The rendering of a template for one row."""

    def __init__(self, row: Mapping[str, str]) -> None:
        self.pieces: list[Piece] = []
        self._row = row
        self._bytes = self._work = 0

    def run(self, body: Sequence[nodes.Node]) -> None:
        """Render nodes.

        Raises:
            MissingColumnError, TooMuchError, TypeError: the row does not fit the template.
        """
        for node in body:
            if isinstance(node, nodes.Output):
                for part in node.nodes:
                    self._write(part)
            else:
                assert isinstance(node, nodes.If)
                branches = (branch.body for branch in (node, *node.elif_) if self._is_true(branch.test))
                self.run(next(branches, node.else_))

    def _write(self, node: nodes.Node) -> None:
        while isinstance(node, nodes.CondExpr):
            chosen = node.expr1 if self._is_true(node.test) else node.expr2
            if chosen is None:
                return
            node = chosen
        text = str(self._present_value(node))
        self._bytes += len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        if self._bytes > MOST_BYTES:
            raise TooMuchError(_TOO_MUCH)
        self.pieces.append(Piece(text, isinstance(node, nodes.TemplateData | nodes.Const)))

    def _value(self, node: nodes.Node) -> _Value:
        if (column := column_of(node)) is not None:
            return self._row[column] if column in self._row else _Missing(column)
        value: _Value
        match node:
            case nodes.TemplateData():
                value = node.data
            case nodes.Const():
                value = node.value
            case nodes.Neg():
                negated = self._present_value(node.node)
                assert isinstance(negated, int | float)
                value = -negated
            case nodes.CondExpr():
                chosen = node.expr1 if self._is_true(node.test) else node.expr2
                value = "" if chosen is None else self._value(chosen)
            case nodes.And() | nodes.Or():  # the operand that decides, as in Python
                left = self._present_value(node.left)
                value = self._value(node.right) if bool(left) == isinstance(node, nodes.And) else left
            case nodes.Not():
                value = not self._is_true(node.node)
            case nodes.Test():
                value = isinstance(self._value(node.node), _Missing) == (node.name == "undefined")
            case nodes.Compare():
                value = self._compare(node)
            case _:
                assert isinstance(node, nodes.Filter)
                value = self._filter(node)
        return value

    def _present_value(self, node: nodes.Node) -> str | int | float | None:
        """Return the value of an expression that must not be a missing column."""
        value = self._value(node)
        if isinstance(value, _Missing):
            raise MissingColumnError(value.column)
        return value

    def _is_true(self, node: nodes.Node) -> bool:
        return bool(self._present_value(node))

    def _compare(self, node: nodes.Compare) -> _Value:
        left = self._present_value(node.expr)
        for operand in node.ops:  # `a < b < c` is true if both are
            right = self._present_value(operand.expr)
            if isinstance(left, str) and isinstance(right, str):
                self._count(len(right) if operand.op in ("in", "notin") else min(len(left), len(right)))
            if not _COMPARE[operand.op](left, right):
                return False
            left = right
        return True

    def _filter(self, node: nodes.Filter) -> _Value:
        assert node.node is not None
        given: dict[str, nodes.Node] = dict(zip(FILTERS[node.name], node.args, strict=False))
        given |= {str(pair.key): pair.value for pair in node.kwargs}
        if node.name == "default":
            return self._default(self._value(node.node), given)
        text = str(self._present_value(node.node))
        self._count(len(text))
        each = {name: self._present_value(argument) for name, argument in given.items()}
        if node.name == "trim":
            chars = each.get("chars")
            self._count(0 if chars is None else len(text) * len(str(chars)))  # each is compared with all of them
            return text.strip(None if chars is None else str(chars))
        if node.name == "replace":
            return self._replace(text, str(each["old"]), str(each["new"]), each.get("count"))
        text = {"upper": str.upper, "lower": str.lower, "title": do_title}[node.name](text)
        if len(text) > MOST_BYTES:
            raise TooMuchError(_TOO_MUCH)
        return text

    def _default(self, value: _Value, given: Mapping[str, nodes.Node]) -> _Value:
        false_too = "boolean" in given and self._is_true(given["boolean"])
        if not (isinstance(value, _Missing) or (false_too and not value)):
            return value
        return self._value(given["default_value"]) if "default_value" in given else ""

    def _replace(self, text: str, old: str, new: str, count: _Value) -> str:
        if not (count is None or isinstance(count, int)):
            raise TypeError("the count of |replace must be a whole number")
        times = text.count(old)
        if count is not None and count >= 0:
            times = min(times, count)
        length = len(text) + times * (len(new) - len(old))  # known before the text is made
        if length > MOST_BYTES:
            raise TooMuchError(f"|replace makes more than {MOST_BYTES:,} characters; replace by less")
        self._count(length)
        return text.replace(old, new, times)

    def _count(self, characters: int) -> None:
        self._work += characters
        if self._work > MOST_WORK:
            raise TooMuchError(f"its filters and comparisons go through more than {MOST_WORK:,} characters; use fewer")
