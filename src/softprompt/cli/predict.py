"""`softprompt predict`: answer whole files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli import options
from softprompt.errors import InputError

if TYPE_CHECKING:
    from softprompt.config import Mode


@click.command()
@click.argument("prompt")
@click.argument("data")
@options.model_options
@options.map_option
@click.option(
    "--out", metavar="FILE", type=click.Path(path_type=Path), help="A .csv, .jsonl or .parquet file. Default: stdout."
)
@click.option("--probabilities", is_flag=True, help="Also write every label's probability.")
@click.option("--resume", is_flag=True, help="Continue --out where it was stopped.")
@options.mode_option
def predict(
    prompt: str,
    data: str,
    mapping: tuple[str, ...],
    out: Path | None,
    probabilities: bool,
    resume: bool,
    mode: Mode | None,
    assignments: tuple[str, ...],
    as_json: bool,
    **model_source: Any,
) -> None:
    """Predict labels or completions for the rows of DATA.

    PROMPT is a prompt's folder or registered name, or `none` for the base model; DATA a file as in tune, without
    targets, or `-` for JSON lines or plain lines on stdin. Every row is written with all its columns as they are, and
    with the columns `prediction` and, for labels, `probability`.
    """
    from softprompt.cli.progress import PredictionProgress
    from softprompt.cli.tables import print_json
    from softprompt.data.added_columns import STDIN, open_rows
    from softprompt.evaluation.predict_file import predict_file
    from softprompt.generation import answer_mode

    if as_json and out is None:
        raise InputError("--json prints one object about a file that is written; give it with --out")
    soft = options.load_named_prompt(prompt)
    model_config, config = options.read_generate_settings(assignments)
    mode = answer_mode(soft, mode, config)
    if probabilities and mode == "write":
        raise InputError("--probabilities are those of labels, and this prompt writes; leave them out")
    columns = options.parse_map(mapping)
    source = open_rows(data, options.stdin_lines() if data == STDIN else ())
    frozen = options.load(config=model_config, prompt=soft, **model_source)
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
                options.say(f"{progress.done} rows are in {out}; the same command with --resume goes on after them")
            raise
    if as_json:
        print_json({"rows": rows, "out": str(out), "seconds": round(time.monotonic() - began, 1)})
    elif out is not None:
        click.echo(f"{rows} rows: {out}")
