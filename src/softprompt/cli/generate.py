"""`softprompt generate`: answer texts with a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from softprompt.cli import options
from softprompt.errors import InputError

if TYPE_CHECKING:
    from softprompt.config import Mode


@click.command()
@click.argument("prompt")
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@options.model_options
@click.option("--versus-base", is_flag=True, help="Also show the base model's answer.")
@options.mode_option
@click.option("--raw", is_flag=True, help="Read the texts as they are, without the prompt's template, and write.")
def generate(
    prompt: str,
    texts: tuple[str, ...],
    versus_base: bool,
    mode: Mode | None,
    raw: bool,
    assignments: tuple[str, ...],
    as_json: bool,
    **model_source: Any,
) -> None:
    """Answer texts with a prompt.

    PROMPT is a prompt's folder or registered name, or `none` for the base model. A prompt with labels chooses one of
    them; any other continues the text. Without TEXT, each line of stdin is a text. Decoding is greedy unless --set says
    otherwise; docs/settings.md has all settings.
    """
    from softprompt.cli.tables import out as console
    from softprompt.cli.tables import print_json, side_by_side
    from softprompt.generation import answer_mode
    from softprompt.generation import generate as run

    soft = options.load_named_prompt(prompt)
    model_config, config = options.read_generate_settings(assignments)
    mode = answer_mode(soft, mode, config, raw=raw)
    lines = [] if texts else options.stdin_lines()
    inputs = [*texts, *(line for line in lines if line.strip())]
    if len(inputs) < len(lines):
        options.say(f"{len(lines) - len(inputs)} of {len(lines)} lines of stdin are blank and are left out")
    if not inputs:
        raise InputError("no text to continue; give one or more, or lines on stdin")
    frozen = options.load(config=model_config, prompt=soft, **model_source)
    made = run(frozen, inputs, soft, config, mode=mode, raw=raw)
    compared = versus_base and soft is not None
    base = run(frozen, inputs, soft, config, mode=mode, raw=raw, virtual_tokens=False) if compared else None
    if as_json:
        outputs = [
            {"input": text, "text": new, "base": base[i] if base else None}
            for i, (text, new) in enumerate(zip(inputs, made, strict=True))
        ]
        print_json({"outputs": outputs})
    elif base is None and len(inputs) == 1:
        continued = soft is None or soft.record.task == "text" or raw
        click.echo(inputs[0] + made[0] if continued else made[0])
    else:
        console.print(side_by_side(inputs, base, made))
