"""`softprompt compare`: prompt engineering, prompts, LoRA and fine-tuning on the user's own rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from softprompt.cli.options import parse_map, read_tune_inputs, tune_options
from softprompt.comparison import USUAL


@click.command()
@tune_options
@click.option(
    "--methods", metavar="LIST", default=",".join(USUAL), show_default=True, help="Methods, separated by commas."
)
@click.option("--seeds", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="Runs per method.")
@click.option("--test-data", metavar="FILE", help="Test rows. Default: a fifth of DATA.")
@click.option(
    "--equal",
    type=click.Choice(("time", "examples")),
    default="time",
    show_default=True,
    help="What is equal for all methods: wall time (max_minutes) or examples seen (max_steps).",
)
@click.option(
    "--no-search",
    is_flag=True,
    help="Do not search for learning rates: use those of tune, 0.003 (LoRA) and 0.00005 (full).",
)
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
    --set max_minutes=M. Results in DIR are not computed again, so the same command goes on after an interruption.
    DIR/report.html is the report.
    """
    from softprompt.cli.compare_tables import TerminalComparison, comparison_table
    from softprompt.cli.tables import out as console
    from softprompt.cli.tables import print_json
    from softprompt.comparison.methods import resolve_methods
    from softprompt.comparison.protocol import require_comparison
    from softprompt.comparison.run import compare as run
    from softprompt.data.rows import load_data
    from softprompt.storage import require_unlocked

    names = resolve_methods([name.strip() for name in methods.split(",") if name.strip()])
    require_unlocked(out)
    require_comparison(out)
    test = load_data(test_data, parse_map(options["mapping"]), options["task"]) if test_data else None
    model, rows, eval_data, config, _ = read_tune_inputs(**options)
    try:
        done = run(
            model,
            rows,
            methods=names,
            seeds=seeds,
            out=out,
            eval_data=eval_data,
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
