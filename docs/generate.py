"""Write the reference pages from the code: `commands.md` and `settings.md`."""

from __future__ import annotations

from pathlib import Path

import click
from pydantic import BaseModel

from softprompt.cli.main import softprompt
from softprompt.config import GenerateConfig, TuneConfig

HERE = Path(__file__).parent
NOTE = "<!-- Written by docs/generate.py (make docs). Do not edit. -->\n"


def commands() -> str:
    """Return the help of every verb."""
    parts = ["# Commands\n", NOTE]
    with click.Context(softprompt, info_name="softprompt", **softprompt.context_settings) as top:
        parts.append(f"```text\n{softprompt.get_help(top)}\n```\n")
        for name, verb in sorted(softprompt.commands.items()):
            parts.append(_help(name, verb, top))
            if isinstance(verb, click.Group):
                with click.Context(verb, info_name=name, parent=top) as inner:
                    parts.extend(_help(f"{name} {n}", v, inner) for n, v in sorted(verb.commands.items()))
    return "\n".join(parts)


def _help(name: str, verb: click.Command, parent: click.Context) -> str:
    with click.Context(verb, info_name=verb.name, parent=parent) as context:
        return f"## softprompt {name}\n\n```text\n{verb.get_help(context)}\n```\n"


def settings() -> str:
    """Return a table of all settings."""
    parts = [
        "# Settings\n",
        NOTE,
        "The same names work in a YAML file (`--config`), with `--set NAME=VALUE`, and in Python. Where the default\n"
        "is open, it is chosen from the data and the model; `softprompt check` shows every value and its origin.\n",
        "## Tuning: `TuneConfig`\n",
        _table(TuneConfig),
        "## Generation: `GenerateConfig`\n",
        _table(GenerateConfig),
    ]
    return "\n".join(parts)


def _table(kind: type[BaseModel]) -> str:
    lines = ["| setting | default | what it is |", "|---|---|---|"]
    for name, field in kind.model_fields.items():
        default = "open" if field.default in (None, "auto") else f"`{field.default}`"
        lines.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


PAGES = {"commands.md": commands, "settings.md": settings}


def main() -> None:
    """Write the pages."""
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
