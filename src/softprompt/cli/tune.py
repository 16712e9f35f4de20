"""`softprompt tune`: learn a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.options import ensemble_option, read_tune_inputs, say, tune_options, verbose_option

if TYPE_CHECKING:
    from softprompt.prompt.ensemble import Prompt
    from softprompt.training.tune import TuneResult

_NOTHING_SAVED = "no step was done yet; the same command starts again"


@click.command()
@tune_options
@click.option("--out", metavar="RUN", required=True, type=click.Path(path_type=Path), help="The run's folder.")
@click.option("--resume", is_flag=True, help="Continue the run in --out.")
@click.option("--name", metavar="N", help="Also register the prompt under this name (softprompt prompts list).")
@ensemble_option
@verbose_option
def tune(
    out: Path, resume: bool, name: str | None, ensemble: int | None, verbose: bool, as_json: bool, **options: Any
) -> None:
    """Learn a prompt from the rows of DATA.

    DATA is a .csv, .jsonl or .parquet file, or hub:ID[:SPLIT], and may end in a row range as in prompts.csv[:50].
    """
    from softprompt.cli.progress import TerminalCallback
    from softprompt.cli.settings_tables import RESUMED
    from softprompt.cli.tables import print_json
    from softprompt.distributed.launch import rank
    from softprompt.training.run_folder import RunFolder

    first = rank() == 0
    if name is not None:
        from softprompt.prompt.registry import new_version, register

        new_version(name)  # an invalid name is refused now, not after the training
    if first:
        RunFolder(out).require(resume)
    model, rows, eval_data, config, origins = read_tune_inputs(**options, resumed=out if resume else None)
    if resume:
        origins = dict.fromkeys(type(config).model_fields, RESUMED)
    callback = TerminalCallback(origins, verbose=verbose)
    common: dict[str, Any] = {"eval_data": eval_data, "out": out, "resume": resume, "callback": callback}
    timed = ", and timing a few steps" if config.max_minutes else ""
    searched = "; then a search for settings" if config.budget == "thorough" else ""
    say(f"preparing {len(rows):,} rows{timed}{searched}")
    try:
        if ensemble is None:
            from softprompt.training.tune import tune as run

            result = run(model, rows, config, **common)
            prompt: Prompt = result.prompt
            record = _run_record(result)
        else:
            from softprompt.training.ensemble import tune_ensemble

            several = tune_ensemble(model, rows, config, members=ensemble, **common)
            prompt = several.prompt
            record = {
                "steps": sum(each.steps for each in several.runs),
                "seconds": round(several.seconds, 1),
                "metrics": several.metrics,
                "members": [_run_record(each) for each in several.runs],
            }
    except KeyboardInterrupt as stop:
        saved = (out / "config.yaml").exists()
        stop.args = ("stopped; " + ("the same command with --resume goes on from here" if saved else _NOTHING_SAVED),)
        raise
    registered = register(prompt, name) if first and name is not None else None
    if as_json:
        paths = {"run": str(out), "prompt": str(out / "prompt")}
        print_json({**paths, **({"registered": registered} if registered else {}), **record})
    else:
        _say_done(out, registered, record, biased=any(member.label_bias for member in prompt.members))


def _run_record(result: TuneResult) -> dict[str, Any]:
    return {
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "best_step": result.best_step,
        "metrics": result.metrics,
        "settings": result.settings.model_dump(),
    }


def _say_done(out: Path, registered: str | None, record: dict[str, Any], *, biased: bool) -> None:
    """Print the result, where the prompt is, and the next commands."""
    from softprompt.cli.tables import out as console
    from softprompt.formatting import metrics_line

    best = ""
    if record["metrics"]:
        of = f"{len(record['members'])} prompts" if "members" in record else f"best after step {record['best_step']}"
        bias = ", with a label bias" if biased else ""
        best = f"; {of}: validation {metrics_line(record['metrics'])}{bias}"
    for line in (
        f"{record['steps']} steps in {record['seconds']:.0f} s{best}",
        f"prompt: {out / 'prompt'}" + (f", registered as {registered}" if registered else ""),
        f"next:   softprompt evaluate {registered or out / 'prompt'} TEST_DATA",
        f'        softprompt generate {registered or out / "prompt"} "some text" --versus-base',
    ):
        console.print(line, soft_wrap=True, markup=False)
