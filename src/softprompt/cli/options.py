"""Options that several verbs share."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from softprompt.errors import InputError

if TYPE_CHECKING:
    from softprompt.config import ModelConfig
    from softprompt.model.frozen import FrozenModel
    from softprompt.prompt.ensemble import Prompt

Verb = TypeVar("Verb", bound=Callable[..., Any])

TASKS = ("classification", "completion", "text")
model_option = click.option(
    "--model", metavar="M", help="Hub id, folder, .gguf file or bundled name; smollm2-135m, or the prompt's own model."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
verbose_option = click.option(
    "-v", "--verbose", is_flag=True, help="Show every setting and where it came from, not only those that matter."
)
set_option = click.option("--set", "assignments", metavar="NAME=VALUE", multiple=True, help="A setting; repeatable.")
map_option = click.option(
    "--map", "mapping", metavar="NAME=COLUMN", multiple=True, help="Which column is text, label, input or target."
)
task_option = click.option("--task", type=click.Choice(TASKS), help="Found from the columns where it is not given.")
revision_option = click.option("--revision", metavar="R", help="Branch, tag or commit of a hub id.")
trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run Python code that comes with the model. It can do whatever you can; read it first.",
)


mode_option = click.option(
    "--mode",
    type=click.Choice(("choose", "write")),
    help="choose one of a prompt's labels, which is what a prompt of labels does; or write freely.",
)


def tune_options(verb: Verb) -> Verb:
    """Add the options that `tune` and `check` have in common."""
    for option in reversed(
        (
            click.argument("data"),
            model_option,
            task_option,
            map_option,
            click.option("--eval-data", metavar="FILE", help="Validation rows; without it some of DATA are held back."),
            click.option(
                "--budget",
                type=click.Choice(("quick", "normal", "thorough")),
                help="How long to train; normal. thorough searches for settings first.",
            ),
            click.option(
                "--init", metavar="INIT", help="Where prompts start; in tune prompt:NAME goes on from another."
            ),
            click.option("--config", "file", type=click.Path(path_type=Path), help="A YAML file of settings."),
            set_option,
            revision_option,
            trust_option,
            json_option,
        )
    ):
        verb = option(verb)
    return verb


def say(message: str) -> None:
    """Print a line of progress on stderr."""
    click.echo(message, err=True)


def quiet() -> None:
    """Keep what transformers logs from the terminal: it is for developers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def stdin_lines() -> list[str]:
    """Return the lines of stdin as texts: without a byte order mark, and without what ends a line on any system.

    Raises:
        InputError: they are not UTF-8.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):  # whatever the terminal's encoding is
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    if sys.stdin.isatty():
        say("reading texts from the keyboard, one a line; end with Ctrl-D")
    try:
        text = sys.stdin.read().lstrip("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError("what comes on stdin is not UTF-8; convert it first") from error
    return re.split("\r\n|\n|\r", re.sub("(\r\n|\n|\r)$", "", text)) if text else []


def parse_map(mapping: tuple[str, ...]) -> dict[str, str]:
    """Read `--map` options."""
    found: dict[str, str] = {}
    for item in mapping:
        name, equals, column = item.partition("=")
        if not equals or not column:
            raise click.UsageError(f"--map {item}: write NAME=COLUMN, as in --map text=review")
        if found.get(name.strip(), column) != column:
            raise click.UsageError(f"--map {name.strip()} is given twice; one column holds it")
        found[name.strip()] = column
    return found


def load(
    name: str | None, config: ModelConfig, revision: str | None = None, trust_remote_code: bool = False
) -> FrozenModel:
    """Load a model for a verb: the bundled one where none is named."""
    from softprompt.model.bundled import DEFAULT_MODEL

    say(f"loading {name or DEFAULT_MODEL}")  # before the imports, which take seconds
    quiet()
    import torch

    from softprompt.model.load import load_model, resolve_threads

    torch.set_num_threads(resolve_threads(config.threads))
    return load_model(
        name or DEFAULT_MODEL,
        revision=revision,
        device=config.device,
        dtype=config.dtype,
        quantization=config.quantization,
        device_map=config.device_map,
        trust_remote_code=trust_remote_code,
        say=say,
    )


def require_named_code(trust_remote_code: bool) -> None:
    """Make sure that code is not run from a model that only a prompt names."""
    if trust_remote_code:
        raise InputError("--trust-remote-code needs --model: which code is run must not be the prompt's to say")


def prompt_named(name: str) -> Prompt | None:
    """Return the prompt that a verb was given, None for the base model."""
    from softprompt.prompt.ensemble import load_prompt
    from softprompt.prompt.registry import NO_PROMPT

    return None if name == NO_PROMPT else load_prompt(name)


def load_for(
    prompt: Prompt | None,
    name: str | None,
    config: ModelConfig,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> FrozenModel:
    """Load the model that was asked for, or the one that the prompt was trained on."""
    if name is None and prompt is not None:
        require_named_code(trust_remote_code)
        name, revision = prompt.record.base_model.here(), revision or prompt.record.base_model.revision
    return load(name, config, revision, trust_remote_code)
