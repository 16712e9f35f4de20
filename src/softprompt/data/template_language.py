"""The template language: a small part of Jinja, checked before anything is computed.

Templates are in prompt folders of other people. Jinja computes constants at compile time, even in its sandbox:
`{{ 'a' * 300000000 }}` would take its memory before the first row. So Jinja only parses; this module lists what its
tree may contain, and `rendering` evaluates it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, TemplateSyntaxError, nodes

from softprompt.data.rendering import FILTERS, ROW, MissingColumnError, Piece, Rendering, TooMuchError, column_of
from softprompt.data.values import SURROGATE
from softprompt.errors import SettingsError, nearest

MOST_CHARACTERS = 200_000  # of a template; they take about a second to parse
MOST_NESTED = 150  # nested expressions or conditions; Python's stack ends at about a thousand calls
_TOO_DEEP = f"it nests deeper than {MOST_NESTED} expressions or conditions; take it apart"
_PARSER = Environment(keep_trailing_newline=True)
_TESTS = ("defined", "undefined")
_ALLOWED = 'columns, row["column"], constants, if, comparisons, and, or, not, and the filters ' + ", ".join(FILTERS)
_INSTEAD = {  # the filter to use instead of a method of Python or another filter of Jinja
    **dict.fromkeys(("strip", "lstrip", "rstrip"), "trim"),
    **{name: name for name in ("upper", "lower", "title", "replace")},
    **dict.fromkeys(("capitalize", "capwords"), "title"),
    **dict.fromkeys(("casefold", "swapcase"), "lower"),
    **dict.fromkeys(("d", "get"), "default"),
}
_SIDE_BY_SIDE = "write the texts side by side, {{ a }}{{ b }}"
_BEFOREHAND = "compute it beforehand, in a column of its own"
_ODD_NAME = 'a column whose name has other characters than letters, digits and _ is written {{ row["review text"] }}'
_WITHOUT_CONDITIONS = (
    *(nodes.Output, nodes.If, nodes.CondExpr, nodes.Not, nodes.And, nodes.Or),
    *(nodes.Compare, nodes.Operand),
)
_REFUSED: dict[type[nodes.Node], tuple[str, str]] = {  # what it looks like, and the cure
    nodes.Add: ("+", _SIDE_BY_SIDE),
    nodes.Concat: ("~", _SIDE_BY_SIDE),
    nodes.Sub: ("-", f"{_BEFOREHAND}; {_ODD_NAME}"),
    nodes.Mul: ("*", _BEFOREHAND),
    nodes.Div: ("/", _BEFOREHAND),
    nodes.FloorDiv: ("//", _BEFOREHAND),
    nodes.Mod: ("%", _BEFOREHAND),
    nodes.Pow: ("**", _BEFOREHAND),
    nodes.Neg: ("-", _BEFOREHAND),
    nodes.Pos: ("+", _BEFOREHAND),
    nodes.List: ("a list […]", "compare with each by itself, a == 'x' or a == 'y'"),
    nodes.Tuple: ("a tuple (…, …)", "compare with each by itself, a == 'x' or a == 'y'"),
    nodes.Dict: ("a dictionary {…}", "choose with {% if %} and {% elif %}"),
    nodes.For: ("the loop {% for %}", "write the columns one after the other"),
    nodes.Macro: ("{% macro %}", "write its text where it is needed"),
    nodes.CallBlock: ("{% call %}", "write its text where it is needed"),
    nodes.FilterBlock: ("{% filter %}", "put the filter after each column, {{ text|upper }}"),
    nodes.Assign: ("{% set %}", "write the value where it is needed"),
    nodes.AssignBlock: ("{% set %}", "write the value where it is needed"),
    nodes.With: ("{% with %}", "write the value where it is needed"),
    nodes.Block: ("{% block %}", "leave it out and keep its text"),
    nodes.Extends: ("{% extends %}", "copy the other template's text"),
    nodes.Include: ("{% include %}", "copy the other template's text"),
    nodes.Import: ("{% import %}", "copy the other template's text"),
    nodes.FromImport: ("{% from %}", "copy the other template's text"),
    nodes.Scope: ("{% autoescape %}", "leave it out: nothing is escaped"),
}


@dataclass(frozen=True)
class ParsedTemplate:
    """A checked template."""

    source: str
    body: tuple[nodes.Node, ...]
    columns: tuple[str, ...]

    def render(self, row: Mapping[str, str]) -> list[Piece]:
        """Render the template for a row.

        Raises:
            SettingsError: the row lacks a column, cannot be compared, or exceeds the limits.
        """
        rendering = Rendering(row)
        try:
            rendering.run(self.body)
        except MissingColumnError as error:
            column = error.args[0]
            raise SettingsError(
                f"the template {quote_template(self.source)} names the column {column!r}{nearest(column, row)}; "
                f"the rows have {', '.join(row)}"
            ) from error
        except (TooMuchError, TypeError) as error:
            raise SettingsError(f"the template {quote_template(self.source)} fails on a row: {error}") from error
        return rendering.pieces


def parse_template(source: str) -> ParsedTemplate:
    """Parse a template and check it.

    Raises:
        SettingsError: a syntax error, or a construct that is not allowed; the message says what to write instead.
    """
    try:
        if len(source) > MOST_CHARACTERS:
            raise _RefusedError(f"it has {len(source):,} characters; at most {MOST_CHARACTERS:,} are allowed")
        body = _PARSER.parse(source).body
        columns = _check(body)
    except (_RefusedError, TemplateSyntaxError, RecursionError, ValueError, OverflowError) as error:
        raise SettingsError(f"the template {quote_template(source)} cannot be read: {_reason(error)}") from error
    return ParsedTemplate(source, tuple(body), tuple(sorted(columns)))


def _reason(error: Exception) -> str:
    if isinstance(error, TemplateSyntaxError):
        message = f"line {error.lineno}: {(error.message or '').removesuffix('.')}"
        return f"{message}; {_ODD_NAME}" if "expected token 'end of print statement'" in message else message
    if isinstance(error, _RefusedError):
        return str(error)
    # Python refuses integers of more than 4,300 digits.
    return _TOO_DEEP if isinstance(error, RecursionError) else "a number in it is too long"


def quote_template(source: str) -> str:
    """Quote a template for a message, shortened."""
    return repr(source) if len(source) <= 300 else f"{source[:300]!r}…"


class _RefusedError(Exception):
    """A template has a construct that is not allowed; the message says what to write instead."""


def _check(body: Sequence[nodes.Node]) -> set[str]:
    """Check a tree, without recursion, and return the columns that it uses."""
    columns: set[str] = set()
    waiting = [(node, 1) for node in reversed(body)]
    while waiting:
        node, depth = waiting.pop()
        if depth > MOST_NESTED:
            raise _RefusedError(_TOO_DEEP)
        if (column := column_of(node)) is not None:
            columns.add(column)
            continue
        try:
            children = list(_children(node))
        except _RefusedError as refused:
            raise _RefusedError(f"line {node.lineno}: {refused}" if node.lineno else str(refused)) from None
        waiting.extend((child, depth + 1) for child in reversed(children))
    return columns


def _children(node: nodes.Node) -> Iterator[nodes.Node]:
    """Yield the parts of an allowed construct, which are checked too."""
    if isinstance(node, nodes.TemplateData | nodes.Const):
        _require_constant(node.data if isinstance(node, nodes.TemplateData) else node.value)
    elif isinstance(node, nodes.Filter):
        yield from _filter_children(node)
    elif isinstance(node, nodes.Test):
        if node.name not in _TESTS or column_of(node.node) is None:
            raise _RefusedError(
                f"the test `is {node.name}` is not allowed; write `{_name(node.node)} is defined`, or =="
            )
        yield node.node
    elif isinstance(node, nodes.Neg) and isinstance(node.node, nodes.Const) and _is_number(node.node.value):
        yield node.node
    elif isinstance(node, _WITHOUT_CONDITIONS):
        yield from node.iter_child_nodes()
    else:
        raise _RefusedError("{} is not allowed; {}".format(*_describe(node)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_constant(value: object) -> None:
    if isinstance(value, str) and SURROGATE.search(value):
        raise _RefusedError("it has half of a character; write the whole one")
    if _is_number(value) and not (math.isfinite(value) and abs(value) < 2**63):  # type: ignore[arg-type]
        raise _RefusedError("a number is too large; at most 19 digits are allowed")


def _filter_children(node: nodes.Filter) -> Iterator[nodes.Node]:
    if node.name not in FILTERS:
        close = _INSTEAD.get(node.name)
        cure = f"; write |{close}" if close else nearest(node.name, FILTERS)
        raise _RefusedError(f"the filter |{node.name} is not allowed{cure}; a template may hold {_ALLOWED}")
    names = FILTERS[node.name]
    given = {pair.key for pair in node.kwargs}
    too_many = len(node.args) > len(names) or given - set(names[len(node.args) :])
    too_few = node.name == "replace" and not {"old", "new"} <= {*names[: len(node.args)], *given}
    if too_many or too_few or node.dyn_args or node.dyn_kwargs or node.node is None:
        raise _RefusedError(
            f"the filter |{node.name} takes {', '.join(names) or 'nothing'} in parentheses, and that alone"
        )
    yield node.node
    yield from node.args
    yield from (pair.value for pair in node.kwargs)


def _describe(node: nodes.Node) -> tuple[str, str]:
    """Return how a refused construct looks, and what to write instead."""
    if isinstance(node, nodes.Call):
        return _describe_call(node.node)
    if isinstance(node, nodes.Getattr):
        whole = node.attr if _name(node.node) == ROW else f"{_name(node.node)}.{node.attr}"
        return f"the attribute .{node.attr}", f"if it is a column's name, write {{{{ row[{_quoted(whole)}] }}}}"
    if isinstance(node, nodes.Getitem):
        if _name(node.node) == ROW:
            return "row[…] without a column's name in quotes", 'write {{ row["column"] }}'
        return f"a part of a text, {_name(node.node)}[…],", _BEFOREHAND
    return _REFUSED.get(type(node), (type(node).__name__.lower(), f"a template may hold {_ALLOWED}"))


def _describe_call(called: nodes.Node) -> tuple[str, str]:
    if not isinstance(called, nodes.Getattr):
        return f"the call {_name(called)}()", "leave it out, and write the columns that you want"
    instead = _INSTEAD.get(called.attr)
    if instead is None:
        return f"the call .{called.attr}()", f"of what calls do, there are the filters {', '.join(FILTERS)}"
    arguments = "(…)" if instead in ("replace", "default") else ""
    return f"the call .{called.attr}()", f"write {{{{ {_name(called.node)}|{instead}{arguments} }}}}"


def _name(node: nodes.Node | None) -> str:
    column = column_of(node)
    if column is None:
        return "text"
    return column if isinstance(node, nodes.Name) else f"row[{_quoted(column)}]"


def _quoted(text: str) -> str:
    return f'"{text}"' if '"' not in text else f"'{text}'"
