"""What people see of a run before its first step: the settings that matter on one screen, or all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

from softprompt.config import TuneConfig

if TYPE_CHECKING:
    from softprompt.training.prepare import PreparedRun
    from softprompt.training.throughput import RenderedRow

RESUMED = "as the run was begun"  # where a resumed run's settings come from: which of them were given is not known

_SHAPING = (
    "method",
    "num_virtual_tokens",
    "init",
    "template",
    "loss",
    "learning_rate",
    "batch_size",
    "max_steps",
    "eval_every",
)
_PLACE = ("device", "dtype", "threads")
_IF_TRUE = ("chat_template", "gradient_checkpointing")  # decided for the user, and worth a line where they are on
_TEXTS = ("template", "init_text")  # white space matters in them
_LONGEST_VALUE = 60
_SHORTEST_VALUE = 20
_ARROW = " → "
_ROW_LINES, _BROKEN = 2, 6


def settings_screen(prepared: PreparedRun, origins: Mapping[str, str], width: int) -> Text:
    """Return a line for each setting that was given, or that was chosen and shapes the result.

    Args:
        prepared: every setting, decided.
        origins: where those that were given came from.
        width: of a line, in cells.
    """
    entries = [(name, _value(prepared, name), _origin(prepared, origins, name)) for name in _shown(prepared, origins)]
    given = [f"{name}: {origins[name]}" for name in _PLACE if _stands_out(prepared, origins, name)]
    entries.append(("runs on", _place(prepared), "; ".join(given)))
    return titled_lines("Settings", entries, width, hint="--verbose shows all of them")


def settings_table(prepared: PreparedRun, origins: Mapping[str, str]) -> Table:
    """Return a table of every setting in force and where it came from."""
    table = Table(title="Settings", title_justify="left")
    for column in ("setting", "value", "from"):
        table.add_column(column, overflow="fold")
    for name, value in prepared.config.model_dump().items():
        text = repr(value) if isinstance(value, str) else str(value)
        short = text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
        table.add_row(name, Text(short), Text(_origin(prepared, origins, name)))
    return table


def titled_lines(title: str, entries: Sequence[tuple[str, str, str]], width: int, hint: str) -> Text:
    """Return a title and a line for each entry: a name, a value and, in brackets, where that comes from."""
    lines = Text()
    lines.append(title, style="bold").append(f" ({hint})", style="dim")
    indent = 2 + max(len(name) for name, _, _ in entries) + 2
    room = max(width - indent, _SHORTEST_VALUE)
    for name, value, reason in entries:
        # A long value leaves a third of the line to its reason, a short one all that it does not need.
        left = max(room - cell_len(value), room // 3) - 3
        bracketed = f" ({shortened(reason, left)})" if reason else ""
        lines.append(f"\n{f'  {name}':<{indent}}{shortened(value, room - cell_len(bracketed))}")
        lines.append(bracketed, style="dim")
    return lines


def row_text(lm_head: str, row: RenderedRow, width: int | None = None) -> Text:
    """Show a row as the model reads it, with what is learned behind an arrow: in two lines of this width, or whole."""
    given, learned = repr(row.input), repr(row.target)
    if width is not None:
        # Lines break between words, so some cells of each stay empty.
        room = max(_ROW_LINES * (width - _BROKEN) - cell_len(lm_head), _SHORTEST_VALUE) - len(_ARROW)
        learned = shortened(learned, max(room // 2, room - cell_len(given)))
        given = shortened(given, room - cell_len(learned))
    return Text(f"{lm_head}{given}{_ARROW}{learned}")


def shortened(text: str, room: int) -> str:
    """Return a text with its middle left out where it takes more cells than there are: both ends tell something."""
    if cell_len(text) <= room:
        return text
    left = max(room, 3) - 1
    tail = set_cell_size(text[::-1], left // 2)[::-1]
    return set_cell_size(text, left - left // 2) + "…" + tail


def _shown(prepared: PreparedRun, origins: Mapping[str, str]) -> list[str]:
    """Return the names of the settings that have a line of their own."""
    shaping = [name for name in _SHAPING if name != "eval_every" or prepared.validation is not None]
    others = [
        name
        for name, value in prepared.config.model_dump().items()
        if name not in (*_SHAPING, *_PLACE) and (_stands_out(prepared, origins, name) or (name in _IF_TRUE and value))
    ]
    return shaping + others


def _stands_out(prepared: PreparedRun, origins: Mapping[str, str], name: str) -> bool:
    """Tell whether a setting was given; of a resumed run, whether it is another than the default."""
    if origins.get(name) != RESUMED:
        return name in origins
    default = TuneConfig.model_fields[name].default
    return default not in (None, "auto") and getattr(prepared.config, name) != default


def _origin(prepared: PreparedRun, origins: Mapping[str, str], name: str) -> str:
    return prepared.reasons.get(name) or origins.get(name, "default")


def _value(prepared: PreparedRun, name: str) -> str:
    value: Any = getattr(prepared.config, name)
    return repr(value) if name in _TEXTS and value is not None else str(value)


def _place(prepared: PreparedRun) -> str:
    config = prepared.config
    threads = [f"{config.threads} thread" + ("s" if config.threads != 1 else "")] if config.device == "cpu" else []
    return ", ".join([str(config.device), str(config.dtype), *threads])
