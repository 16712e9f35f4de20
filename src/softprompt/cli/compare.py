"""The verb that compares: prompt engineering, prompts, LoRA and fine-tuning on the user's own rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from softprompt.cli.options import parse_map, tune_options
from softprompt.cli.tune import prepare
from softprompt.comparison import USUAL
from softprompt.old_names import current_method


@click.command()
@tune_options
@click.option(
    "--methods", metavar="LIST", default=",".join(USUAL), show_default=True, help="Which, with commas between."
)
@click.option("--seeds", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="Runs of each.")
@click.option("--test-data", metavar="FILE", help="Rows that are scored; without it a fifth of DATA is held back.")
@click.option(
    "--equal",
    type=click.Choice(("time", "examples")),
    default="time",
    show_default=True,
    help="What all methods get alike: wall time (max_minutes each) or examples seen (max_steps each).",
)
@click.option("--no-search", is_flag=True, help="Train at the usual learning rates: tune's, LoRA 0.003, full 0.00005.")
@click.option("--out", metavar="DIR", required=True, type=click.Path(path_type=Path), help="Results and report.")
def compare(
    methods: str,
    seeds: int,
    test_data: str | None,
    equal: str,
    no_search: bool,
    out: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare prompts with prompt engineering, LoRA and fine-tuning on DATA.

    Every method gets the same rows and the same time: 5 minutes, with --budget 1 (quick) or 15 (thorough), or
    --set max_minutes=M. Methods are those of the default, prompt-tuning-ensemble and prefix-tuning-ensemble. What is
    finished in DIR is not run again, so the same command goes on after an interruption. DIR/report.html is the report.
    """
    from softprompt.cli.compare_tables import TerminalComparison, comparison_table
    from softprompt.cli.tables import out as console
    from softprompt.cli.tables import print_json
    from softprompt.comparison.run import compare as run
    from softprompt.comparison.run import require_methods, require_ours
    from softprompt.data.rows import load_data
    from softprompt.locks import require_free

    names = [current_method(name.strip()) for name in methods.split(",") if name.strip()]
    require_methods(names)  # what is cheap to check before the model is loaded
    require_free(out)
    require_ours(out)
    test = load_data(test_data, parse_map(options["mapping"]), options["task"]) if test_data else None
    model, rows, held, config, _ = prepare(**options)
    try:
        done = run(
            model,
            rows,
            methods=names,
            seeds=seeds,
            out=out,
            eval_data=held,
            test_data=test,
            config=config,
            equal=equal,  # type: ignore[arg-type]
            search=not no_search,
            callback=TerminalComparison(),
        )
    except KeyboardInterrupt as stop:
        stop.args = ("stopped; the same command goes on with the method that was interrupted",)
        raise
    if as_json:
        print_json(
            {
                "report": str(out / "report.html"),
                "metric": done.results[0].ranking,
                "results": [r.model_dump(exclude={"predictions", "statistics", "curve"}) for r in done.results],
            }
        )
        return
    console.print(comparison_table(done.results))
    console.print(f"report: {out / 'report.html'}", soft_wrap=True, markup=False)
