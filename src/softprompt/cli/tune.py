"""The verbs that learn: tune, and its dry run, check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from softprompt.cli.options import load, parse_map, require_named_code, say, tune_options, verbose_option

if TYPE_CHECKING:
    from softprompt.config import TuneConfig
    from softprompt.data.rows import Rows, Task
    from softprompt.model.frozen import FrozenModel
    from softprompt.prompt.ensemble import Ensemble
    from softprompt.prompt.soft_prompt import SoftPrompt
    from softprompt.training.ensemble import EnsembleResult
    from softprompt.training.tune import TuneResult

_NOTHING_DONE = "no step was done yet; the same command begins anew"
ensemble_option = click.option(
    "--ensemble",
    metavar="K",
    type=click.IntRange(min=2),
    help="Train K prompts and average their predictions; takes K times as long, or max_minutes / K for each.",
)


@click.command()
@tune_options
@click.option("--out", metavar="RUN", required=True, type=click.Path(path_type=Path), help="The run's folder.")
@click.option("--resume", is_flag=True, help="Continue the run in --out.")
@click.option("--name", metavar="N", help="Also keep the prompt under a name: softprompt prompts list.")
@ensemble_option
@verbose_option
def tune(
    out: Path, resume: bool, name: str | None, ensemble: int | None, verbose: bool, as_json: bool, **options: Any
) -> None:
    """Learn a prompt from the rows of DATA.

    DATA is a .csv, .jsonl or .parquet file, or hub:ID[:SPLIT], and may end in a row range as in prompts.csv[:50].
    """
    from softprompt.cli.settings_tables import RESUMED
    from softprompt.cli.tables import TerminalCallback, print_json
    from softprompt.distributed.launch import rank
    from softprompt.training.run_folder import RunFolder

    first = rank() == 0
    if name is not None:
        from softprompt.prompt.registry import new_version, register

        new_version(name)  # a name that cannot be kept is said now, not after the night
    if first:
        RunFolder(out).require(resume)
    model, rows, held, config, origins = prepare(**options, begun=out / "config.yaml" if resume else None)
    if resume:
        origins = dict.fromkeys(type(config).model_fields, RESUMED)
    callback = TerminalCallback(origins, verbose=verbose)
    common: dict[str, Any] = {"eval_data": held, "out": out, "resume": resume, "callback": callback}
    say_preparing(rows, config)
    try:
        if ensemble is None:
            from softprompt.training.tune import tune as run

            result = run(model, rows, config, **common)
            made: SoftPrompt | Ensemble = result.prompt
            record = _run_record(result)
        else:
            from softprompt.training.ensemble import tune_ensemble

            several = tune_ensemble(model, rows, config, members=ensemble, **common)
            made, record = several.prompt, _ensemble_record(several)
    except KeyboardInterrupt as stop:
        begun = (out / "config.yaml").exists()
        stop.args = ("stopped; " + ("the same command with --resume goes on from here" if begun else _NOTHING_DONE),)
        raise
    kept = register(made, name) if first and name is not None else None
    if as_json:
        print_json({"run": str(out), "prompt": str(out / "prompt"), **({"registered": kept} if kept else {}), **record})
    else:
        _say_done(out, kept, record, biased=any(member.label_bias for member in made.members))


def _run_record(result: TuneResult) -> dict[str, Any]:
    """Return what `tune --json` prints of a run."""
    return {
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "best_step": result.best_step,
        "metrics": result.metrics,
        "settings": result.settings.model_dump(),
    }


def _ensemble_record(result: EnsembleResult) -> dict[str, Any]:
    """Return what `tune --json` prints of an ensemble: the steps of all runs, the ensemble's metrics, and the runs."""
    return {
        "steps": sum(run.steps for run in result.runs),
        "seconds": round(result.seconds, 1),
        "metrics": result.metrics,
        "members": [_run_record(run) for run in result.runs],
    }


def _say_done(out: Path, kept: str | None, record: dict[str, Any], *, biased: bool) -> None:
    """Say what was learned, and what can be done with it."""
    from softprompt.cli.tables import figures
    from softprompt.cli.tables import out as console

    of = (
        f"; {len(record['members'])} prompts" if "members" in record else f"; best after step {record.get('best_step')}"
    )
    how = ", with a label bias" if biased else ""
    best = f"{of}: validation {figures(record['metrics'])}{how}" if record["metrics"] else ""
    for line in (
        f"{record['steps']} steps in {record['seconds']:.0f} s{best}",
        f"prompt: {out / 'prompt'}" + (f", kept as {kept}" if kept else ""),
        f"next:   softprompt evaluate {kept or out / 'prompt'} TEST_DATA",
        f'        softprompt generate {kept or out / "prompt"} "some text" --versus-base',
    ):
        console.print(line, soft_wrap=True, markup=False)


@click.command()
@tune_options
@click.option("--out", metavar="RUN", type=click.Path(path_type=Path), help="Accepted, so that a tune command fits.")
@click.option("--resume", is_flag=True, hidden=True)
@click.option("--name", hidden=True)
@ensemble_option
@verbose_option
def check(
    out: Path | None,
    resume: bool,
    name: str | None,
    ensemble: int | None,
    verbose: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Dry run of tune: rows, tokens, memory, time.

    Nothing is written. One step is run, to measure its time.
    """
    from softprompt.cli.check_tables import show_check
    from softprompt.cli.tables import print_json
    from softprompt.training.prepare import prepare_run
    from softprompt.training.throughput import estimate_run

    model, rows, held, config, origins = prepare(**options)
    say(f"preparing {len(rows):,} rows, and timing a step")
    prepared = prepare_run(model, rows, config, held)
    if config.max_minutes:
        config = config.model_copy(update={"max_minutes": config.max_minutes / (ensemble or 1)})
    run_estimate = estimate_run(model, prepared, config)
    length = {
        "max_steps": run_estimate.steps,
        "eval_every": run_estimate.eval_every,
        "eval_rows": run_estimate.eval_rows,
    }
    fitting = {name: value for name, value in length.items() if getattr(prepared.config, name) != value}
    reasons = prepared.reasons | dict.fromkeys(fitting, "what fits in max_minutes")
    if fitting:  # fewer rows may be held back
        prepared = prepare_run(model, rows, config.model_copy(update=fitting), held)
    prepared = replace(prepared, reasons=reasons)
    if as_json:
        print_json({**run_estimate.model_dump(), "settings": prepared.config.model_dump()})
    else:
        show_check(prepared, run_estimate, origins, members=ensemble, verbose=verbose)


def say_preparing(rows: Rows, config: TuneConfig) -> None:
    """Say what happens before the first step: it can take minutes."""
    timed = ", and timing a few steps" if config.max_minutes else ""
    searched = "; then a search for settings" if config.budget == "thorough" else ""
    say(f"preparing {len(rows):,} rows{timed}{searched}")


def prepare(
    data: str,
    model: str | None,
    task: str | None,
    mapping: tuple[str, ...],
    eval_data: str | None,
    budget: str | None,
    init: str | None,
    file: Path | None,
    assignments: tuple[str, ...],
    revision: str | None,
    trust_remote_code: bool,
    begun: Path | None = None,
) -> tuple[FrozenModel, Rows, Rows | None, TuneConfig, dict[str, str]]:
    """Read what `tune`, `check` and `compare` were given: the cheap and fallible things first, the model last.

    `begun` are the settings of a run to be resumed: its device and precision are taken again.
    """
    from softprompt.config import PROMPT, TuneConfig, read_settings
    from softprompt.data.rows import load_data
    from softprompt.errors import SettingsError

    config, origins = read_settings(TuneConfig, file, assignments, budget=budget, init=init)
    if eval_data and config.eval_rows == 0:
        raise SettingsError("eval_rows=0 keeps the last prompt and reads no --eval-data; leave one of them out")
    rows = load_data(data, parse_map(mapping), cast("Task | None", task))
    held = load_data(eval_data, parse_map(mapping), rows.task) if eval_data else None
    place = config
    if begun is not None:
        from softprompt.distributed.collective import launched
        from softprompt.training.run_folder import RunFolder
        from softprompt.training.sync import broadcast_config

        processes = launched()  # the first one reads: the others may be on other machines
        place = broadcast_config(processes, RunFolder(begun.parent).settings() if processes.first else None)
    if model is None and place.init.startswith(PROMPT):
        from softprompt.prompt.soft_prompt import load_soft_prompt

        require_named_code(trust_remote_code)
        base = load_soft_prompt(place.init.removeprefix(PROMPT)).record.base_model
        model, revision = base.id, revision or base.revision
    return load(model, place, revision, trust_remote_code), rows, held, config, origins
