"""Reading the `.jsonl` files of results; records of earlier versions get today's names of methods and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from softprompt.old_names import current_method

_RENAMED = {"recompute": "activation_checkpointing"}


def read_records(file: Path) -> list[dict[str, Any]]:
    """Return the records of a file; none where it does not exist."""
    if not file.exists():
        return []
    return [_current(json.loads(line)) for line in file.read_text().splitlines()]


def _current(record: dict[str, Any]) -> dict[str, Any]:
    record = {_RENAMED.get(name, name): value for name, value in record.items()}
    if "method" in record:
        record["method"] = current_method(record["method"], quiet=True)
    if "variant" in record:  # `soft-prompt, learning rate 0.03`, `deep prefix, target`
        name, comma, rest = record["variant"].partition(",")
        if name in ("soft prompt", "deep prefix", "soft-prompt", "deep-prefix"):
            record["variant"] = current_method(name.replace(" ", "-"), quiet=True) + comma + rest
    return record
