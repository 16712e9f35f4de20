"""`softprompt check`: a dry run of `tune`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.options import ensemble_option, read_tune_inputs, say, tune_options, verbose_option

if TYPE_CHECKING:
    from rich.table import Table

    from softprompt.training.prepare import PreparedRun
    from softprompt.training.throughput import RunEstimate


@click.command()
@tune_options
@click.option(
    "--out", metavar="RUN", type=click.Path(path_type=Path), expose_value=False, help="Ignored: accepted as in tune."
)
@click.option("--resume", is_flag=True, expose_value=False, hidden=True)
@click.option("--name", expose_value=False, hidden=True)
@ensemble_option
@verbose_option
def check(ensemble: int | None, verbose: bool, as_json: bool, **options: Any) -> None:
    """Dry run of tune: rows, tokens, memory, time.

    Nothing is written. One step is run, to measure its time.
    """
    from rich.text import Text

    from softprompt.cli.settings_tables import row_text, rows_line, settings_screen, settings_table
    from softprompt.cli.tables import out, print_json
    from softprompt.training.prepare import prepare_data, prepare_run
    from softprompt.training.throughput import estimate_run

    model, rows, eval_data, config, origins = read_tune_inputs(**options)
    say(f"preparing {len(rows):,} rows, and timing steps")
    prepared_data = prepare_data(model, rows, config, eval_data)
    prepared = prepare_run(prepared_data, config)
    if config.max_minutes:
        config = config.model_copy(update={"max_minutes": config.max_minutes / (ensemble or 1)})
    estimate = estimate_run(model, prepared, config)
    length = {"max_steps": estimate.steps, "eval_every": estimate.eval_every, "eval_rows": estimate.eval_rows}
    changed = {setting: value for setting, value in length.items() if getattr(prepared.config, setting) != value}
    reasons = prepared.reasons | dict.fromkeys(changed, "what fits in max_minutes")
    if changed:  # there may be fewer validation rows
        prepared = prepare_run(prepared_data, config.model_copy(update=changed))
    prepared = replace(prepared, reasons=reasons)
    if as_json:
        print_json({**estimate.model_dump(), "settings": prepared.config.model_dump()})
        return
    out.print(settings_table(prepared, origins) if verbose else settings_screen(prepared, origins, out.width))
    out.print(rows_line(prepared))
    out.print()
    for number, row in enumerate(estimate.rendered, start=1):
        start = f"row {number}: {row.tokens} tokens, {row.targets} learned: "
        out.print(row_text(start, row, None if verbose else out.width))
    out.print()
    out.print(Text("Costs", style="bold"))
    out.print(_costs(prepared, estimate, ensemble))


def _costs(prepared: PreparedRun, estimate: RunEstimate, members: int | None) -> Table:
    from rich.table import Table

    from softprompt.formatting import gigabytes, step_time

    activation_checkpointing = " (with activation checkpointing)" if prepared.config.gradient_checkpointing else ""
    minutes = f"about {estimate.minutes:.0f}" if estimate.minutes >= 1 else "less than 1"
    searched = " and a search" if estimate.search_minutes else ""
    each = f", for each of {members} prompts" if members else ""
    table = Table.grid(padding=(0, 2))
    for name, text in {
        "tokens a row": f"{estimate.mean_tokens:.0f} on average, {estimate.longest} at most",
        "trainable parameters": f"{estimate.parameters:,} ({estimate.virtual_tokens} virtual tokens)",
        "memory": f"{gigabytes(estimate.step_gigabytes)} for a step{activation_checkpointing}, "
        f"{gigabytes(estimate.free_gigabytes)} free",
        "time": f"{step_time(estimate.step_seconds)} a step, {minutes} min for {estimate.steps} steps "
        f"with evaluations{searched}{each}",
        "backend": estimate.backend,
    }.items():
        table.add_row(f"  {name}", text)
    return table
