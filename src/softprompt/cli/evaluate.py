"""`softprompt evaluate`: score rows with a prompt and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from softprompt.cli import options
from softprompt.errors import InputError


@click.command()
@click.argument("prompt")
@click.argument("data")
@options.model_options
@options.map_option
@click.option("--predictions", metavar="FILE", type=click.Path(path_type=Path), help="A JSONL file: one line per row.")
def evaluate(
    prompt: str,
    data: str,
    mapping: tuple[str, ...],
    assignments: tuple[str, ...],
    predictions: Path | None,
    as_json: bool,
    **model_source: Any,
) -> None:
    """Score rows with a prompt and without.

    PROMPT is a prompt's folder or registered name, or `none` for the base model; DATA as in tune. With `none`,
    --set template=… , chat_template=… , chat_date=… , verbalizers=… and max_length=… say how rows become text.
    calibration=contextual works with a prompt too.
    """
    from softprompt.cli.tables import evaluation_record, print_json, show_evaluation
    from softprompt.config import EvaluateConfig, FormatConfig, ModelConfig, read_settings
    from softprompt.data.rows import load_data
    from softprompt.evaluation.evaluate import evaluate as run
    from softprompt.storage import write_records

    soft = options.load_named_prompt(prompt)
    config, origins = read_settings(EvaluateConfig, assignments=assignments)
    of_prompt = set(origins) & set(FormatConfig.model_fields) - set(ModelConfig.model_fields)
    if soft is not None and of_prompt:
        raise InputError(f"the prompt brings its own {', '.join(sorted(of_prompt))}; leave --set {min(of_prompt)} out")
    rows = load_data(data, options.parse_map(mapping), soft.record.task if soft else None)
    if predictions is None:
        predictions = (Path() if soft is None else _predictions_folder(prompt)) / "test-predictions.jsonl"
    if not predictions.parent.is_dir():
        raise InputError(f"--predictions {predictions}: no such folder: {predictions.parent}")
    if predictions.is_dir():
        raise InputError(f"--predictions {predictions} is a folder; give a file")
    frozen = options.load(config=config, prompt=soft, **model_source)
    how = config.model_dump(include={"template", "chat_date", "verbalizers", "max_length", "calibration"})
    done = run(frozen, rows, soft, chat_template=bool(config.chat_template), **how)
    # They took minutes: a full disk must not cost the metrics, nor a closed terminal the predictions.
    try:
        write_records(predictions, done.predictions)
    finally:
        if as_json:
            print_json({**evaluation_record(done), "predictions": str(predictions)})
        else:
            show_evaluation(done, data)
    if not as_json:
        click.echo(f"predictions: {predictions}")


def _predictions_folder(prompt: str) -> Path:
    """Return the folder beside a prompt's, or beside its ensemble's; of a registered name, the working directory."""
    from softprompt.prompt.layout import ENSEMBLE
    from softprompt.prompt.registry import find

    folder = find(prompt)
    if folder != Path(prompt):
        return Path()
    parent = folder.resolve().parent
    return parent.parent if (parent / ENSEMBLE).is_file() else parent
