"""`softprompt doctor`: versions, hardware, folders, and what is missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import click

from softprompt.cli.options import json_option

_LITTLE_MEMORY, _LITTLE_DISK = 2e9, 1e9  # bytes; the bundled model needs 0.6 GB of each


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show versions, hardware and folders, what is missing, and how to get it."""
    from softprompt.cli.tables import out, plain_table, print_json

    found = _findings()
    if as_json:
        print_json(found)
        return
    facts = found["versions"] | found["machine"] | found["kept"]
    out.print(plain_table(("", ""), [(name.replace("_", " "), str(value)) for name, value in facts.items()]))
    lines = [f"optional: {line}" for line in found["optional"]] + [f"problem: {line}" for line in found["problems"]]
    click.echo("\n".join(lines if found["problems"] else [*lines, "no problems found"]))


def _findings() -> dict[str, Any]:
    from softprompt.extras import OPTIONAL, installed
    from softprompt.model.bundled import SMOLLM2, cached_folder, describe_download
    from softprompt.model.free_memory import available_memory
    from softprompt.model.load import resolve_device, resolve_threads
    from softprompt.prompt.registry import names, registry_folder
    from softprompt.storage import home
    from softprompt.training.run_folder import environment

    device = resolve_device("auto")
    memory = available_memory(device)
    disk = shutil.disk_usage(_existing(home())).free
    bundled = cached_folder(SMOLLM2)
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    problems = []
    if not bundled.exists():
        problems.append(f"the bundled model {SMOLLM2.name} is not here yet: softprompt models fetch {SMOLLM2.name}")
    problems += machine_problems(str(device), memory, home(), disk, os.access(_existing(home()), os.W_OK))
    return {
        "versions": environment(),
        "machine": {
            "device": str(device),
            "threads": resolve_threads(None),
            "memory_free": f"{memory / 1e9:.1f} GB",
            "disk_free": f"{disk / 1e9:.1f} GB",
        },
        "kept": {
            "softprompt_home": str(home()),
            "bundled_model": str(bundled) if bundled.exists() else "not fetched",
            "bundled_models_through": describe_download(),
            "prompts": f"{len(names())} in {registry_folder()}",
            "hub_cache": str(hub) if hub.exists() else f"{hub} (nothing there)",
        },
        "optional": [
            f"{purpose} need {package}: pip install 'softprompt[{extra}]'"
            for package, (extra, purpose) in OPTIONAL.items()
            if not installed(package)
        ],
        "problems": problems,
    }


def machine_problems(device: str, memory: float, home: Path, disk: float, writable: bool) -> list[str]:
    """Return what is wrong with the machine: too few free bytes of memory or disk, a home folder that is read-only."""
    problems = []
    if memory < _LITTLE_MEMORY:
        problems.append(f"{memory / 1e9:.1f} GB of memory are free on {device}; close other programs")
    if disk < _LITTLE_DISK:
        problems.append(f"{disk / 1e9:.1f} GB of disk are free in {home}; free some, or set SOFTPROMPT_HOME")
    if not writable:
        problems.append(f"{home} cannot be written; set SOFTPROMPT_HOME to another folder")
    return problems


def _existing(path: Path) -> Path:
    """Return the nearest parent that exists: a cache folder is created at the first write."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
