"""`softprompt prompts`: registered prompts, and what is in one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.options import TASKS, json_option, load, model_option, revision_option, say, set_option
from softprompt.errors import PromptError

if TYPE_CHECKING:
    from softprompt.prompt.ensemble import Prompt

_NEAREST = 5


@click.group()
def prompts() -> None:
    """Registered prompts: list, show, add, import, export, remove.

    Each name has numbered versions; NAME is the newest, NAME@2 the second.
    """


@prompts.command("list")
@json_option
def list_prompts(as_json: bool) -> None:
    """List the registered prompts."""
    from softprompt.cli.tables import out, plain_table, print_json
    from softprompt.formatting import metrics_line
    from softprompt.prompt.loading import load_prompt
    from softprompt.prompt.registry import names, registry_folder, versions

    found = [f"{name}@{version}" for name in names() for version in versions(name)]
    loaded = {}
    for name in found:
        try:
            loaded[name] = load_prompt(name)
        except PromptError as error:  # list the others all the same
            say(f"softprompt: {name}: {error}")
    if as_json:
        print_json({"prompts": [{"name": name, **_summary(prompt)} for name, prompt in loaded.items()]})
        return
    if not found:
        say(f"no prompts are registered in {registry_folder()}; tune --name N and prompts add register one")
        return
    rows = [
        (name, p.record.task, p.record.base_model.name, str(p.num_virtual_tokens), metrics_line(p.record.metrics))
        for name, p in loaded.items()
    ]
    out.print(plain_table(("name", "task", "base model", "virtual tokens", "validation"), rows))


@prompts.command("show")
@click.argument("prompt")
@model_option
@set_option
@json_option
def show_prompt(prompt: str, model: str | None, assignments: tuple[str, ...], as_json: bool) -> None:
    """Show a prompt: its task, the tokens nearest to its virtual tokens; with --json, how it was trained."""
    from softprompt.cli.tables import out, plain_table, print_json
    from softprompt.config import ModelConfig, read_settings
    from softprompt.formatting import metrics_line
    from softprompt.prompt.loading import load_prompt
    from softprompt.prompt.nearest_tokens import nearest_tokens
    from softprompt.prompt.soft_prompt import SoftPrompt

    model_config, _ = read_settings(ModelConfig, assignments=assignments)
    soft = load_prompt(prompt)
    # Only virtual tokens have nearest tokens.
    plain = soft if isinstance(soft, SoftPrompt) and soft.method == "prompt-tuning" else None
    near = nearest_tokens(load(model, model_config, prompt=soft), plain, _NEAREST) if plain else []
    if as_json:
        tokens = [[{"token": token, "cosine": cosine} for token, cosine in row] for row in near]
        print_json({**_summary(soft), "training": soft.record.training, "nearest_tokens": tokens})
        return
    facts = {name: value for name, value in _summary(soft).items() if value not in (None, {}, False)}
    if soft.record.metrics:
        facts["metrics"] = metrics_line(soft.record.metrics)
    texts = [(name.replace("_", " "), value if name == "metrics" else repr(value)) for name, value in facts.items()]
    out.print(plain_table(("", ""), texts))
    if plain is not None:
        lines = [
            (str(n), f"{norm:.2f}", "  ".join(f"{token!r} {cosine:.2f}" for token, cosine in row))
            for n, (norm, row) in enumerate(zip(plain.weights.norm(dim=1).tolist(), near, strict=True), start=1)
        ]
        out.print(plain_table(("token", "norm", "nearest in the vocabulary, with cosine similarity"), lines))


@prompts.command("add")
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
def add_prompt(name: str, folder: Path) -> None:
    """Register the prompt in FOLDER as the next version of NAME."""
    from softprompt.prompt.loading import load_prompt
    from softprompt.prompt.registry import new_version, register

    new_version(name)
    click.echo(register(load_prompt(_as_folder(folder)), name))


@prompts.command("import")
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
@model_option
@click.option("--task", type=click.Choice(TASKS), default="text", show_default=True)
@set_option
@revision_option
def import_prompt(
    name: str, folder: Path, model: str | None, task: str, assignments: tuple[str, ...], revision: str | None
) -> None:
    """Register a prompt that PEFT trained, with what PEFT's folder does not record.

    This is the task; --set template=… , chat_template=… , verbalizers=… ; and the base model's fingerprint, which is
    computed here, so that the prompt is never run on another model.
    """
    from softprompt.config import FormatConfig, read_settings
    from softprompt.prompt.loading import describe_prompt, load_soft_prompt
    from softprompt.prompt.registry import new_version, register

    new_version(name)
    config, _ = read_settings(FormatConfig, assignments=assignments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what the folder does not record: it is added here
        soft = load_soft_prompt(_as_folder(folder))
    frozen = load(model, config, revision, prompt=soft)
    trained_on = soft.record.base_model
    if not trained_on.may_be(frozen.source):
        say(
            f"softprompt: warning: {folder} names {trained_on.id} as its base model; it is now bound to "
            f"{frozen.source}, and useless if that is another model"
        )
    click.echo(register(describe_prompt(soft, frozen, task, config), name))  # type: ignore[arg-type]


@prompts.command("export")
@click.argument("prompt")
@click.argument("folder", type=click.Path(path_type=Path))
def export_prompt(prompt: str, folder: Path) -> None:
    """Write a registered prompt to FOLDER, which PEFT can read."""
    from softprompt.prompt.loading import load_prompt

    soft = load_prompt(prompt)
    click.echo(soft.save(folder))
    say(
        f"PEFT reads the virtual tokens; it does not know the template {soft.record.template!r}"
        + (", the chat template" if soft.record.chat_template else "")
        + (" or the labels" if soft.record.verbalizers else "")
        + ": put texts through them yourself, and pad on the right"
    )


@prompts.command("remove")
@click.argument("prompt")
@click.option("--yes", is_flag=True, help="Do not ask.")
def remove_prompt(prompt: str, yes: bool) -> None:
    """Remove a registered prompt: NAME with all its versions, or NAME@VERSION."""
    from softprompt.prompt.registry import matching, remove

    found = matching(prompt)
    if not yes:
        click.confirm(f"remove {', '.join(found)}?", abort=True, err=True)
    remove(found)
    click.echo(f"removed {', '.join(found)}")


def _as_folder(folder: Path) -> str:
    """Append "/", so that the path is not taken for a registered name."""
    return f"{folder}/"


def _summary(prompt: Prompt) -> dict[str, Any]:
    from softprompt.prompt.ensemble import Ensemble

    record = prompt.record
    return {
        "method": "ensemble" if isinstance(prompt, Ensemble) else prompt.method,
        "members": len(prompt.members),
        "task": record.task,
        "base_model": record.base_model.id,
        "revision": record.base_model.revision,
        "virtual_tokens": prompt.num_virtual_tokens,
        "parameters": sum(member.weights.numel() for member in prompt.members),
        "template": record.template,
        "chat_template": record.chat_template,
        "verbalizers": record.verbalizers,
        "metrics": record.metrics,
    }
