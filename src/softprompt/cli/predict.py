"""The verb that answers whole files: predict."""

from __future__ import annotations

import time
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
@click.option("--out", metavar="FILE", type=click.Path(path_type=Path), help="A .csv, .jsonl or .parquet file; stdout.")
@click.option("--probabilities", is_flag=True, help="Also write every label's probability.")
@click.option("--resume", is_flag=True, help="Go on with --out where it was stopped.")
@mode_option
@set_option
@revision_option
@trust_option
@json_option
def predict(
    prompt: str,
    data: str,
    model: str | None,
    mapping: tuple[str, ...],
    out: Path | None,
    probabilities: bool,
    resume: bool,
    mode: Mode | None,
    assignments: tuple[str, ...],
    revision: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Predict labels or completions for the rows of DATA.

    PROMPT is a prompt's folder or kept name, or `none` for the base model; DATA a file as in tune, without targets, or
    `-` for JSON lines or plain lines on stdin. Every row is written again, all its columns as they are, with the
    columns `prediction` and, of labels, `probability`.
    """
    from softprompt.cli.tables import PredictionProgress, print_json
    from softprompt.config import GenerateConfig, ModelConfig, read_settings
    from softprompt.data.added_columns import STDIN, open_rows
    from softprompt.evaluation.predict_file import predict_file
    from softprompt.generation import answer_mode

    if as_json and out is None:
        raise InputError("--json prints one object about a file that is written; give it with --out")
    soft = prompt_named(prompt)
    placing = [a for a in assignments if a.partition("=")[0].strip() in ModelConfig.model_fields]
    place, _ = read_settings(ModelConfig, assignments=placing)
    config, _ = read_settings(GenerateConfig, assignments=[a for a in assignments if a not in placing])
    mode = answer_mode(soft, mode, config)
    if probabilities and mode == "write":
        raise InputError("--probabilities are those of labels, and this prompt writes; leave them out")
    columns = parse_map(mapping)
    source = open_rows(data, stdin_lines() if data == STDIN else ())
    frozen = load_for(soft, model, place, revision, trust_remote_code)
    began = time.monotonic()
    with PredictionProgress(quiet=out is None) as progress:
        try:
            rows = predict_file(
                frozen,
                source,
                soft,
                out,
                map=columns,
                mode=mode,
                config=config,
                probabilities=probabilities,
                resume=resume,
                progress=progress.rows,
            )
        except (InputError, KeyboardInterrupt):
            if out is not None and progress.done:
                say(f"{progress.done} rows are in {out}; the same command with --resume goes on behind them")
            raise
    if as_json:
        print_json({"rows": rows, "out": str(out), "seconds": round(time.monotonic() - began, 1)})
    elif out is not None:
        click.echo(f"{rows} rows: {out}")
