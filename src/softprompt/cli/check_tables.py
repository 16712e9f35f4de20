"""What people see of a dry run: settings, rows as the model reads them, and costs, on one screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from softprompt.cli.settings_tables import row_text, settings_screen, settings_table
from softprompt.cli.tables import out, rows_line

if TYPE_CHECKING:
    from softprompt.training.prepare import Plan
    from softprompt.training.throughput import Forecast


def show_check(
    plan: Plan, forecast: Forecast, origins: Mapping[str, str], *, members: int | None, verbose: bool
) -> None:
    """Print what `check` found.

    Args:
        plan: every setting, decided.
        forecast: what the run would do and cost.
        origins: where the settings that were given came from.
        members: prompts of the ensemble; None for a single prompt.
        verbose: show every setting, and rows whole.
    """
    out.print(settings_table(plan, origins) if verbose else settings_screen(plan, origins, out.width))
    out.print(rows_line(plan))
    out.print()
    for number, row in enumerate(forecast.rendered, start=1):
        head = f"row {number}: {row.tokens} tokens, {row.targets} learned: "
        out.print(row_text(head, row, None if verbose else out.width))
    out.print()
    out.print(Text("Costs", style="bold"))
    out.print(_costs(plan, forecast, members))


def _costs(plan: Plan, forecast: Forecast, members: int | None) -> Table:
    recomputed = (
        " (the layers run again in the backward pass to save some)" if plan.config.gradient_checkpointing else ""
    )
    minutes = f"about {forecast.minutes:.0f}" if forecast.minutes >= 1 else "less than 1"
    searched = " and a search" if forecast.search_minutes else ""
    each = f", for each of {members} prompts" if members else ""
    table = Table.grid(padding=(0, 2))
    for name, text in {
        "tokens a row": f"{forecast.mean_tokens:.0f} on average, {forecast.longest} at most",
        "trainable parameters": f"{forecast.parameters:,} ({forecast.virtual_tokens} virtual tokens)",
        "memory": f"{_gigabytes(forecast.step_gigabytes)} for a step{recomputed}, "
        f"{_gigabytes(forecast.free_gigabytes)} free",
        "time": f"{_seconds(forecast.step_seconds)} a step, {minutes} min for {forecast.steps} steps "
        f"with evaluations{searched}{each}",
        "backend": forecast.way,
    }.items():
        table.add_row(f"  {name}", text)
    return table


def _gigabytes(size: float) -> str:
    return f"{size:.1f} GB" if size >= 0.1 else "less than 0.1 GB"


def _seconds(time: float) -> str:
    return f"{time:.1f} s" if time >= 1 else f"{time:.2g} s"
