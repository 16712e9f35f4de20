"""The verbs that use a prompt on a few texts, or measure it: evaluate, generate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from softprompt.cli.options import (
    json_option,
    load_for,
    map_option,
    mode_option,
    model_option,
    parse_map,
    prompt_named,
    revision_option,
    say,
    set_option,
    stdin_lines,
    trust_option,
)
from softprompt.errors import InputError

if TYPE_CHECKING:
    from softprompt.config import Mode


@click.command()
@click.argument("prompt")
@click.argument("data")
@model_option
@map_option
@set_option
@click.option("--predictions", metavar="FILE", type=click.Path(path_type=Path), help="Where to write a record a row.")
@revision_option
@trust_option
@json_option
def evaluate(
    prompt: str,
    data: str,
    model: str | None,
    mapping: tuple[str, ...],
    assignments: tuple[str, ...],
    predictions: Path | None,
    revision: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Score rows with a prompt and without.

    PROMPT is a prompt's folder or kept name, or `none` for the untouched model; DATA as in tune. With `none`,
    --set template=… , chat_template=… , chat_date=… , verbalizers=… and max_length=… say how rows become text;
    calibration=contextual works with a prompt too.
    """
    from softprompt.cli.tables import evaluation_record, print_json, show_evaluation
    from softprompt.config import EvaluateConfig, FormatConfig, ModelConfig, read_settings
    from softprompt.data.rows import load_data
    from softprompt.evaluation.evaluate import evaluate as run
    from softprompt.storage import write_records

    soft = prompt_named(prompt)
    config, given = read_settings(EvaluateConfig, assignments=assignments)
    own = set(given) & set(FormatConfig.model_fields) - set(ModelConfig.model_fields)
    if soft is not None and own:
        raise InputError(f"the prompt brings its own {', '.join(sorted(own))}; leave --set {min(own)} out")
    rows = load_data(data, parse_map(mapping), soft.record.task if soft else None)
    if predictions is None:
        predictions = (Path() if soft is None else _beside(prompt)) / "test-predictions.jsonl"
    if not predictions.parent.is_dir():
        raise InputError(f"--predictions {predictions}: no such folder: {predictions.parent}")
    if predictions.is_dir():
        raise InputError(f"--predictions {predictions} is a folder; give a file")
    frozen = load_for(soft, model, config, revision, trust_remote_code)
    done = run(
        frozen,
        rows,
        soft,
        template=config.template,
        chat_template=bool(config.chat_template),
        chat_date=config.chat_date,
        verbalizers=config.verbalizers,
        max_length=config.max_length,
        calibration=config.calibration,
    )
    # They took minutes: neither a full disk nor a terminal that is gone may cost both predictions and figures.
    try:
        write_records(predictions, done.predictions)
    finally:
        if as_json:
            print_json({**evaluation_record(done), "predictions": str(predictions)})
        else:
            show_evaluation(done, data)
    if not as_json:
        click.echo(f"predictions: {predictions}")


@click.command()
@click.argument("prompt")
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@model_option
@click.option("--versus-base", is_flag=True, help="Also show what the base model answers.")
@mode_option
@click.option("--raw", is_flag=True, help="Read the texts as they are, without the prompt's template, and write.")
@set_option
@revision_option
@trust_option
@json_option
def generate(
    prompt: str,
    texts: tuple[str, ...],
    model: str | None,
    versus_base: bool,
    mode: Mode | None,
    raw: bool,
    assignments: tuple[str, ...],
    revision: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Answer texts with a prompt.

    PROMPT is a prompt's folder or kept name, or `none` for the base model. A prompt of labels chooses one of them; any
    other continues the text. Without TEXT, lines of stdin are answered. Decoding is greedy unless --set says otherwise;
    docs/settings.md has all settings.
    """
    from softprompt.cli.tables import out as console
    from softprompt.cli.tables import print_json, side_by_side
    from softprompt.config import GenerateConfig, ModelConfig, read_settings
    from softprompt.generation import answer_mode
    from softprompt.generation import generate as run

    soft = prompt_named(prompt)
    placing = [a for a in assignments if a.partition("=")[0].strip() in ModelConfig.model_fields]
    place, _ = read_settings(ModelConfig, assignments=placing)
    config, _ = read_settings(GenerateConfig, assignments=[a for a in assignments if a not in placing])
    mode = answer_mode(soft, mode, config, raw=raw)
    lines = [] if texts else stdin_lines()
    given = [*texts, *(line for line in lines if line.strip())]
    if len(given) < len(lines):
        say(f"{len(lines) - len(given)} of {len(lines)} lines of stdin are blank and are left out")
    if not given:
        raise InputError("no text to continue; give one or more, or lines on stdin")
    frozen = load_for(soft, model, place, revision, trust_remote_code)
    made = run(frozen, given, soft, config, mode=mode, raw=raw)
    compared = versus_base and soft is not None
    base = run(frozen, given, soft, config, mode=mode, raw=raw, virtual_tokens=False) if compared else None
    if as_json:
        outputs = [
            {"input": text, "text": new, "base": base[i] if base else None}
            for i, (text, new) in enumerate(zip(given, made, strict=True))
        ]
        print_json({"outputs": outputs})
    elif base is None and len(given) == 1:
        continued = soft is None or soft.record.task == "text" or raw
        click.echo(given[0] + made[0] if continued else made[0])
    else:
        console.print(side_by_side(given, base, made))


def _beside(prompt: str) -> Path:
    """Return where predictions go: beside a prompt's folder, of a member beside its ensemble; of a kept name, here."""
    from softprompt.prompt.registry import ENSEMBLE, find

    folder = find(prompt)
    if folder != Path(prompt):
        return Path()
    place = folder.resolve().parent
    return place.parent if (place / ENSEMBLE).is_file() else place
