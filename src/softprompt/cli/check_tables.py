"""What people see of a dry run: settings, rows as the model reads them, and costs, on one screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from softprompt.cli.settings_tables import row_text, settings_screen, settings_table
from softprompt.cli.tables import out, rows_line

if TYPE_CHECKING:
    from softprompt.training.prepare import PreparedRun
    from softprompt.training.throughput import RunEstimate


def show_check(
    prepared: PreparedRun, run_estimate: RunEstimate, origins: Mapping[str, str], *, members: int | None, verbose: bool
) -> None:
    """Print what `check` found.

    Args:
        prepared: every setting, decided.
        run_estimate: what the run would do and cost.
        origins: where the settings that were given came from.
        members: prompts of the ensemble; None for a single prompt.
        verbose: show every setting, and rows whole.
    """
    out.print(settings_table(prepared, origins) if verbose else settings_screen(prepared, origins, out.width))
    out.print(rows_line(prepared))
    out.print()
    for number, row in enumerate(run_estimate.rendered, start=1):
        lm_head = f"row {number}: {row.tokens} tokens, {row.targets} learned: "
        out.print(row_text(lm_head, row, None if verbose else out.width))
    out.print()
    out.print(Text("Costs", style="bold"))
    out.print(_costs(prepared, run_estimate, members))


def _costs(prepared: PreparedRun, run_estimate: RunEstimate, members: int | None) -> Table:
    recomputed = (
        " (the layers run again in the backward pass to save some)" if prepared.config.gradient_checkpointing else ""
    )
    minutes = f"about {run_estimate.minutes:.0f}" if run_estimate.minutes >= 1 else "less than 1"
    searched = " and a search" if run_estimate.search_minutes else ""
    each = f", for each of {members} prompts" if members else ""
    table = Table.grid(padding=(0, 2))
    for name, text in {
        "tokens a row": f"{run_estimate.mean_tokens:.0f} on average, {run_estimate.longest} at most",
        "trainable parameters": f"{run_estimate.parameters:,} ({run_estimate.virtual_tokens} virtual tokens)",
        "memory": f"{_gigabytes(run_estimate.step_gigabytes)} for a step{recomputed}, "
        f"{_gigabytes(run_estimate.free_gigabytes)} free",
        "time": f"{_seconds(run_estimate.step_seconds)} a step, {minutes} min for {run_estimate.steps} steps "
        f"with evaluations{searched}{each}",
        "backend": run_estimate.backend,
    }.items():
        table.add_row(f"  {name}", text)
    return table


def _gigabytes(size: float) -> str:
    return f"{size:.1f} GB" if size >= 0.1 else "less than 0.1 GB"


def _seconds(time: float) -> str:
    return f"{time:.1f} s" if time >= 1 else f"{time:.2g} s"
