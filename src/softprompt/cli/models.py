"""`softprompt models`: the bundled models."""

from __future__ import annotations

import click

from softprompt.cli.options import json_option, quiet, say
from softprompt.errors import ModelError, nearest
from softprompt.model.bundled import BUNDLED, cached_folder, fetch


@click.group()
def models() -> None:
    """Bundled models: list them, fetch one."""


@models.command("list")
@json_option
def list_models(as_json: bool) -> None:
    """List the bundled models. --model also takes a folder, a .gguf file or a hub id."""
    from softprompt.cli.tables import print_json

    records = [
        {
            "name": model.name,
            "original": model.original,
            "license": model.license,
            "download_bytes": model.download,
            "folder": str(cached_folder(model)) if cached_folder(model).exists() else None,
        }
        for model in BUNDLED.values()
    ]
    if as_json:
        print_json({"models": records})
        return
    for model, record in zip(BUNDLED.values(), records, strict=True):
        where = record["folder"] or f"not fetched yet, {model.download / 1e6:.0f} MB"
        click.echo(f"{model.name}  ({model.original}, {model.license})  {where}")


@models.command("fetch")
@click.argument("name")
def fetch_model(name: str) -> None:
    """Download a bundled model."""
    if name not in BUNDLED:
        raise ModelError(f"no bundled model {name!r}{nearest(name, BUNDLED)}; there is {', '.join(BUNDLED)}")
    quiet()
    click.echo(fetch(BUNDLED[name], say))
