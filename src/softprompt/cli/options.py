"""Options that several commands share, and what is read from them."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from softprompt.errors import InputError, SettingsError

if TYPE_CHECKING:
    from softprompt.config import GenerateConfig, ModelConfig, TuneConfig
    from softprompt.data.rows import Rows, Task
    from softprompt.model.frozen import FrozenModel
    from softprompt.prompt.ensemble import Prompt

CommandFunction = TypeVar("CommandFunction", bound=Callable[..., Any])

TASKS = ("classification", "completion", "text")
model_option = click.option(
    "--model",
    metavar="M",
    help="Hub id, folder, .gguf file or bundled name. Default: the prompt's base model, or smollm2-135m.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
verbose_option = click.option(
    "-v", "--verbose", is_flag=True, help="Show every setting and where it came from, not only those that matter."
)
set_option = click.option("--set", "assignments", metavar="NAME=VALUE", multiple=True, help="A setting; repeatable.")
map_option = click.option(
    "--map", "mapping", metavar="NAME=COLUMN", multiple=True, help="Which column is text, label, input or target."
)
revision_option = click.option("--revision", metavar="R", help="Branch, tag or commit of a hub id.")
trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run Python code that comes with the model. It can do whatever you can; read it first.",
)
mode_option = click.option(
    "--mode",
    type=click.Choice(("choose", "write")),
    help="choose: one of the prompt's labels (default if it has labels). write: any text.",
)
ensemble_option = click.option(
    "--ensemble",
    metavar="N",
    type=click.IntRange(min=2),
    help="Train N prompts and average their predictions. Takes N times as long; with max_minutes, each gets 1/N of it.",
)


def _all_of(*options: Callable[[CommandFunction], CommandFunction]) -> Callable[[CommandFunction], CommandFunction]:
    """Return a decorator that adds several options, in this order."""

    def decorate(command: CommandFunction) -> CommandFunction:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


# What evaluate, predict and generate share: a base model and settings.
model_options = _all_of(model_option, set_option, revision_option, trust_option, json_option)
# What tune, check and compare share.
tune_options = _all_of(
    click.argument("data"),
    model_option,
    click.option("--task", type=click.Choice(TASKS), help="Default: derived from the columns."),
    map_option,
    click.option("--eval-data", metavar="FILE", help="Validation rows. Default: a part of DATA."),
    click.option(
        "--budget",
        type=click.Choice(("quick", "normal", "thorough")),
        help="How long to train. Default: normal. thorough searches for settings first.",
    ),
    click.option(
        "--init", metavar="INIT", help="How virtual tokens are initialized; prompt:NAME trains another prompt further."
    ),
    click.option("--config", "file", type=click.Path(path_type=Path), help="A YAML file of settings."),
    set_option,
    revision_option,
    trust_option,
    json_option,
)


def say(message: str) -> None:
    """Print a line of progress on stderr."""
    click.echo(message, err=True)


def quiet() -> None:
    """Hide the log messages of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def stdin_lines() -> list[str]:
    """Return the lines of stdin, without byte order mark and line ends (of any system)."""
    if isinstance(sys.stdin, io.TextIOWrapper):  # whatever the terminal's encoding is
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    if sys.stdin.isatty():
        say("reading texts from the keyboard, one per line; end with Ctrl-D")
    try:
        text = sys.stdin.read().lstrip("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError("stdin is not UTF-8; convert it first") from error
    return re.split("\r\n|\n|\r", re.sub("(\r\n|\n|\r)$", "", text)) if text else []


def parse_map(mapping: tuple[str, ...]) -> dict[str, str]:
    """Read `--map` options."""
    found: dict[str, str] = {}
    for item in mapping:
        name, equals, column = item.partition("=")
        if not equals or not column:
            raise click.UsageError(f"--map {item}: write NAME=COLUMN, as in --map text=review")
        if found.get(name.strip(), column) != column:
            raise click.UsageError(f"--map {name.strip()} is given twice; it takes one column")
        found[name.strip()] = column
    return found


def read_generate_settings(assignments: tuple[str, ...]) -> tuple[ModelConfig, GenerateConfig]:
    """Read `--set` of a command that generates: the settings of the model, and those of decoding."""
    from softprompt.config import GenerateConfig, ModelConfig, read_settings

    of_model = [a for a in assignments if a.partition("=")[0].strip() in ModelConfig.model_fields]
    model_config, _ = read_settings(ModelConfig, assignments=of_model)
    config, _ = read_settings(GenerateConfig, assignments=[a for a in assignments if a not in of_model])
    return model_config, config


def load(
    model: str | None,
    config: ModelConfig,
    revision: str | None = None,
    trust_remote_code: bool = False,
    prompt: Prompt | None = None,
) -> FrozenModel:
    """Load the model that was given, or the one that the prompt was trained on, or the bundled one."""
    from softprompt.model.bundled import DEFAULT_MODEL

    if model is None and prompt is not None:
        _require_given_model(trust_remote_code)
        base = prompt.record.base_model
        model, revision = base.resolve(), revision or base.revision
    model = model or DEFAULT_MODEL
    say(f"loading {model}")  # before the imports, which take seconds
    quiet()
    import torch

    from softprompt.model.load import load_model, resolve_threads

    torch.set_num_threads(resolve_threads(config.threads))
    return load_model(
        model,
        revision=revision,
        device=config.device,
        dtype=config.dtype,
        quantization=config.quantization,
        device_map=config.device_map,
        trust_remote_code=trust_remote_code,
        say=say,
    )


def load_named_prompt(name: str) -> Prompt | None:
    """Return the prompt of this name or folder; None for the base model."""
    from softprompt.prompt.loading import load_prompt
    from softprompt.prompt.registry import NO_PROMPT

    return None if name == NO_PROMPT else load_prompt(name)


def _require_given_model(trust_remote_code: bool) -> None:
    """Make sure that a prompt's record does not decide which code is run."""
    if trust_remote_code:
        raise InputError("--trust-remote-code needs --model: a prompt must not decide which code is run")


def read_tune_inputs(
    data: str,
    model: str | None,
    task: str | None,
    mapping: tuple[str, ...],
    eval_data: str | None,
    budget: str | None,
    init: str | None,
    file: Path | None,
    assignments: tuple[str, ...],
    revision: str | None,
    trust_remote_code: bool,
    resumed: Path | None = None,  # a run, whose device and precision are used again
) -> tuple[FrozenModel, Rows, Rows | None, TuneConfig, dict[str, str]]:
    """Read the values of `tune_options`. The model is loaded last: everything else is quick, and may fail.

    Returns:
        The model, DATA, --eval-data, the settings, and where each setting that was given came from.
    """
    from softprompt.config import PROMPT, TuneConfig, read_settings
    from softprompt.data.rows import load_data

    config, origins = read_settings(TuneConfig, file, assignments, budget=budget, init=init)
    if eval_data and config.eval_rows == 0:
        raise SettingsError("eval_rows=0 keeps the last prompt and reads no --eval-data; leave one of them out")
    rows = load_data(data, parse_map(mapping), cast("Task | None", task))
    eval_rows = load_data(eval_data, parse_map(mapping), rows.task) if eval_data else None
    in_force = config
    if resumed is not None:
        from softprompt.distributed.collective import launched
        from softprompt.training.run_folder import RunFolder
        from softprompt.training.sync import broadcast_config

        processes = launched()  # the first one reads: the others may be on other machines
        in_force = broadcast_config(processes, RunFolder(resumed).settings() if processes.first else None)
    if model is None and in_force.init.startswith(PROMPT):
        from softprompt.prompt.loading import load_soft_prompt

        _require_given_model(trust_remote_code)
        base = load_soft_prompt(in_force.init.removeprefix(PROMPT)).record.base_model
        model, revision = base.id, revision or base.revision
    return load(model, in_force, revision, trust_remote_code), rows, eval_rows, config, origins
