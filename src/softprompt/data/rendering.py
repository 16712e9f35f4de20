"""Rendering: a checked template is run for a row, and every text that is made on the way is counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from jinja2 import nodes
from jinja2.filters import do_title

MOST_BYTES = 1_000_000  # of a rendered input, and of each text on the way to it
MOST_WORK = 10 * MOST_BYTES  # characters that all filters and comparisons of one rendering may go through
ROW = "row"  # `row["review text"]` is the column of that name; `row` by itself is a column that is called so
FILTERS: dict[str, tuple[str, ...]] = {  # with the names of their arguments
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
    """A rendering makes more text than is allowed."""


class MissingColumnError(Exception):
    """A column is used that the row lacks."""


class Piece(NamedTuple):
    """A part of a rendered text; `own` where the template itself says it, and not a column."""

    text: str
    own: bool


@dataclass(frozen=True)
class _Missing:
    """The value of a column that a row lacks."""

    column: str


_Value = str | int | float | None | _Missing


def column_of(node: nodes.Node | None) -> str | None:
    """Return the column that an expression is, `text` or `row["review text"]`, or None."""
    if isinstance(node, nodes.Name):
        return str(node.name)
    if not (isinstance(node, nodes.Getitem) and isinstance(node.node, nodes.Name) and node.node.name == ROW):
        return None
    return node.arg.value if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str) else None


class Rendering:
    """One row on its way through a template.

    Attributes:
        pieces: what has been written.
    """

    def __init__(self, row: Mapping[str, str]) -> None:
        self.pieces: list[Piece] = []
        self._row = row
        self._bytes = self._work = 0

    def run(self, body: Sequence[nodes.Node]) -> None:
        """Write some nodes.

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
        text = str(self._there(node))
        self._bytes += len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        if self._bytes > MOST_BYTES:
            raise TooMuchError(_TOO_MUCH)
        self.pieces.append(Piece(text, isinstance(node, nodes.TemplateData | nodes.Const)))

    def _value(self, node: nodes.Node) -> _Value:
        if (column := column_of(node)) is not None:
            return self._row[column] if column in self._row else _Missing(column)
        return self._VALUES[type(node)](self, node)

    def _there(self, node: nodes.Node) -> str | int | float | None:
        """Return the value of an expression that is no missing column."""
        value = self._value(node)
        if isinstance(value, _Missing):
            raise MissingColumnError(value.column)
        return value

    def _is_true(self, node: nodes.Node) -> bool:
        return bool(self._there(node))

    def _constant(self, node: nodes.TemplateData | nodes.Const) -> _Value:
        value: _Value = node.data if isinstance(node, nodes.TemplateData) else node.value
        return value

    def _negative(self, node: nodes.Neg) -> _Value:
        value = self._there(node.node)
        assert isinstance(value, int | float)
        return -value

    def _chosen(self, node: nodes.CondExpr) -> _Value:
        chosen = node.expr1 if self._is_true(node.test) else node.expr2
        return "" if chosen is None else self._value(chosen)

    def _deciding(self, node: nodes.And | nodes.Or) -> _Value:
        """Return the side that decides, as Python does."""
        left = self._there(node.left)
        return self._value(node.right) if bool(left) == isinstance(node, nodes.And) else left

    def _not(self, node: nodes.Not) -> _Value:
        return not self._is_true(node.node)

    def _defined(self, node: nodes.Test) -> _Value:
        return isinstance(self._value(node.node), _Missing) == (node.name == "undefined")

    def _compared(self, node: nodes.Compare) -> _Value:
        left = self._there(node.expr)
        for operand in node.ops:  # `a < b < c` is true where both are
            right = self._there(operand.expr)
            if isinstance(left, str) and isinstance(right, str):
                self._count(len(right) if operand.op in ("in", "notin") else min(len(left), len(right)))
            if not _COMPARE[operand.op](left, right):
                return False
            left = right
        return True

    def _filtered(self, node: nodes.Filter) -> _Value:
        assert node.node is not None
        given: dict[str, nodes.Node] = dict(zip(FILTERS[node.name], node.args, strict=False))
        given |= {str(pair.key): pair.value for pair in node.kwargs}
        if node.name == "default":
            return self._default(self._value(node.node), given)
        text = str(self._there(node.node))
        self._count(len(text))
        each = {name: self._there(argument) for name, argument in given.items()}
        if node.name == "trim":
            return self._trimmed(text, each.get("chars"))
        if node.name == "replace":
            return self._replaced(text, str(each["old"]), str(each["new"]), each.get("count"))
        return _bounded({"upper": str.upper, "lower": str.lower, "title": do_title}[node.name](text))

    def _default(self, value: _Value, given: Mapping[str, nodes.Node]) -> _Value:
        false_too = "boolean" in given and self._is_true(given["boolean"])
        if not (isinstance(value, _Missing) or (false_too and not value)):
            return value
        return self._value(given["default_value"]) if "default_value" in given else ""

    def _trimmed(self, text: str, chars: _Value) -> str:
        if chars is None:
            return text.strip()
        self._count(len(text) * len(str(chars)))  # each character is looked for among all of them
        return text.strip(str(chars))

    def _replaced(self, text: str, old: str, new: str, count: _Value) -> str:
        if not (count is None or isinstance(count, int)):
            raise TypeError("the count of |replace must be a whole number")
        times = text.count(old)
        if count is not None and count >= 0:
            times = min(times, count)
        length = len(text) + times * (len(new) - len(old))  # known before it is made
        if length > MOST_BYTES:
            raise TooMuchError(f"|replace makes more than {MOST_BYTES:,} characters; replace by less")
        self._count(length)
        return text.replace(old, new, times)

    def _count(self, characters: int) -> None:
        self._work += characters
        if self._work > MOST_WORK:
            raise TooMuchError(f"its filters and comparisons go through more than {MOST_WORK:,} characters; use fewer")

    _VALUES: ClassVar[dict[type[nodes.Node], Callable[..., _Value]]] = {
        nodes.TemplateData: _constant,
        nodes.Const: _constant,
        nodes.Neg: _negative,
        nodes.CondExpr: _chosen,
        nodes.And: _deciding,
        nodes.Or: _deciding,
        nodes.Not: _not,
        nodes.Test: _defined,
        nodes.Compare: _compared,
        nodes.Filter: _filtered,
    }


def _bounded(text: str) -> str:
    if len(text) > MOST_BYTES:
        raise TooMuchError(_TOO_MUCH)
    return text
