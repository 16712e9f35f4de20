"""What is printed before the first step: settings, the first row, the numbers of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

from softprompt.cli.tables import plain_table
from softprompt.config import TuneConfig

if TYPE_CHECKING:
    from softprompt.training.prepare import PreparedRun
    from softprompt.training.throughput import RenderedRow

RESUMED = "as in the resumed run"  # the origin of all settings of a resumed run: it does not record which were given

_MAIN = (
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
_HARDWARE = ("device", "dtype", "threads")
_IF_TRUE = ("chat_template", "gradient_checkpointing")  # chosen automatically; shown if they are on
_TEXTS = ("template", "init_text")  # white space matters in them
_LONGEST_VALUE = 60
_SHORTEST_VALUE = 20
_ARROW = " → "
_ROW_LINES, _MARGIN = 2, 6


def settings_screen(prepared: PreparedRun, origins: Mapping[str, str], width: int) -> Text:
    """Return a line of `width` cells for each main setting, and for each other one that was given (`origins`)."""
    config = prepared.config
    entries = [(name, _value(prepared, name), _origin(prepared, origins, name)) for name in _shown(prepared, origins)]
    threads = [f"{config.threads} thread" + ("s" if config.threads != 1 else "")] if config.device == "cpu" else []
    given = [f"{name}: {origins[name]}" for name in _HARDWARE if _is_notable(prepared, origins, name)]
    entries.append(("runs on", ", ".join([str(config.device), str(config.dtype), *threads]), "; ".join(given)))
    lines = Text()
    lines.append("Settings", style="bold").append(" (--verbose shows all of them)", style="dim")
    indent = 2 + max(len(name) for name, _, _ in entries) + 2
    room = max(width - indent, _SHORTEST_VALUE)
    for name, value, reason in entries:
        # A long value leaves a third of the line to its reason, a short one the rest.
        left = max(room - cell_len(value), room // 3) - 3
        bracketed = f" ({shortened(reason, left)})" if reason else ""
        lines.append(f"\n{f'  {name}':<{indent}}{shortened(value, room - cell_len(bracketed))}")
        lines.append(bracketed, style="dim")
    return lines


def settings_table(prepared: PreparedRun, origins: Mapping[str, str]) -> Table:
    """Return a table of every setting in force and where it came from."""
    rows = []
    for name, value in prepared.config.model_dump().items():
        text = repr(value) if isinstance(value, str) else str(value)
        short = text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
        rows.append((name, short, _origin(prepared, origins, name)))
    return plain_table(("setting", "value", "from"), rows, "Settings")


def row_text(start: str, row: RenderedRow, width: int | None = None) -> Text:
    """Write a row as the model reads it, its target after an arrow: in two lines of this width, or whole."""
    given, learned = repr(row.input), repr(row.target)
    if width is not None:
        # Lines break between words, so some cells at their ends stay empty.
        room = max(_ROW_LINES * (width - _MARGIN) - cell_len(start), _SHORTEST_VALUE) - len(_ARROW)
        learned = shortened(learned, max(room // 2, room - cell_len(given)))
        given = shortened(given, room - cell_len(learned))
    return Text(f"{start}{given}{_ARROW}{learned}")


def shortened(text: str, room: int) -> str:
    """Return a text without its middle if it is wider than `room` cells."""
    if cell_len(text) <= room:
        return text
    left = max(room, 3) - 1
    tail = set_cell_size(text[::-1], left // 2)[::-1]
    return set_cell_size(text, left - left // 2) + "…" + tail


def _shown(prepared: PreparedRun, origins: Mapping[str, str]) -> list[str]:
    """Return the names of the settings that have a line of their own."""
    main = [name for name in _MAIN if name != "eval_every" or prepared.validation is not None]
    for name, value in prepared.config:
        if name not in (*_MAIN, *_HARDWARE) and (_is_notable(prepared, origins, name) or (name in _IF_TRUE and value)):
            main.append(name)
    return main


def _is_notable(prepared: PreparedRun, origins: Mapping[str, str], name: str) -> bool:
    """Tell whether a setting was given; of a resumed run, whether it differs from the default."""
    if origins.get(name) != RESUMED:
        return name in origins
    default = TuneConfig.model_fields[name].default
    return default not in (None, "auto") and getattr(prepared.config, name) != default


def _origin(prepared: PreparedRun, origins: Mapping[str, str], name: str) -> str:
    return prepared.reasons.get(name) or origins.get(name, "default")


def _value(prepared: PreparedRun, name: str) -> str:
    value: Any = getattr(prepared.config, name)
    return repr(value) if name in _TEXTS and value is not None else str(value)


def rows_line(prepared: PreparedRun) -> str:
    """Write how many rows are used for training and validation."""
    encoder, used, shared = prepared.encoder, len(prepared.indices_seen), len(prepared.shared_text_ids)
    line = f"{len(prepared.train)} training rows"
    if used < len(prepared.train):
        line += f" ({used} of them used)"
    line += f", {'no' if prepared.validation is None else len(prepared.validation)} validation rows"
    if encoder.truncated:
        line += f", {encoder.truncated} cut to {encoder.max_length} tokens"
    if shared:
        line += f"; all begin with the same text ({shared} tokens), which is run once a step"
    return line
