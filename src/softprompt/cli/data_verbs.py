"""The verbs that take data or texts: tune, check, evaluate, generate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from softprompt.cli.options import (
    json_option,
    load,
    map_option,
    model_option,
    parse_map,
    revision_option,
    say,
    set_option,
    trust_option,
    tune_options,
)
from softprompt.errors import InputError

if TYPE_CHECKING:
    from softprompt.config import TuneConfig
    from softprompt.data.rows import Rows, Task
    from softprompt.model.frozen import FrozenModel
    from softprompt.prompt.soft_prompt import SoftPrompt


@click.command()
@tune_options
@click.option("--out", metavar="RUN", required=True, type=click.Path(path_type=Path), help="The run's folder.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
def tune(out: Path, resume: bool, as_json: bool, **options: Any) -> None:
    """Learn a prompt from the rows of DATA.

    DATA is a .csv or .jsonl file, or hub:ID[:SPLIT], and may end in a row range as in prompts.csv[:50].
    """
    from softprompt.cli.show import TerminalWatcher, figure, print_json
    from softprompt.cli.show import out as console
    from softprompt.training.loop import tune as run
    from softprompt.training.run_folder import RunFolder

    folder = RunFolder(out)
    if resume:
        folder.require_begun()
    else:
        folder.require_new()
    model, rows, held, config, origins = _prepare(**options, begun=out / "config.yaml" if resume else None)
    if resume:
        origins = dict.fromkeys(type(config).model_fields, "as the run was begun")
    try:
        result = run(model, rows, config, eval_data=held, out=out, resume=resume, watcher=TerminalWatcher(origins))
    except KeyboardInterrupt:
        say(f"\nstopped; to go on, run the same command with --resume (the last saved state is in {out / 'state'})")
        raise
    if as_json:
        print_json(
            {
                "run": str(out),
                "prompt": str(out / "prompt"),
                "steps": result.steps,
                "seconds": round(result.seconds, 1),
                "best_step": result.best_step,
                "metrics": result.metrics,
                "settings": result.settings.model_dump(),
            }
        )
        return
    figures = ", ".join(f"{name.replace('_', ' ')} {figure(name, value)}" for name, value in result.metrics.items())
    best = f"; best after step {result.best_step}: validation {figures}" if figures else ""
    console.print(f"{result.steps} steps in {result.seconds:.0f} s{best}")
    console.print(f"prompt: {out / 'prompt'}", soft_wrap=True, markup=False)
    console.print(f"next:   softprompt evaluate {out / 'prompt'} TEST_DATA", soft_wrap=True, markup=False)
    console.print(
        f'        softprompt generate {out / "prompt"} "some text" --versus-base', soft_wrap=True, markup=False
    )


@click.command()
@tune_options
@click.option("--out", metavar="RUN", type=click.Path(path_type=Path), help="Accepted, so that a tune command fits.")
@click.option("--resume", is_flag=True, hidden=True)
def check(out: Path | None, resume: bool, as_json: bool, **options: Any) -> None:
    """Dry run of tune: rows, tokens, memory, time.

    Nothing is written. One step is run, to measure its time.
    """
    from softprompt.cli.show import out as console
    from softprompt.cli.show import print_json, rows_line, settings_table
    from softprompt.training.forecast import make_forecast
    from softprompt.training.plan import make_plan

    model, rows, held, config, origins = _prepare(**options)
    plan = make_plan(model, rows, config, held)
    forecast = make_forecast(model, plan)
    if as_json:
        print_json({**forecast.model_dump(), "settings": plan.config.model_dump()})
        return
    console.print(settings_table(plan, origins))
    console.print(rows_line(plan))
    for number, rendered in enumerate(forecast.rendered, start=1):
        console.print(f"\nrow {number}: {rendered.tokens} tokens, {rendered.targets} of them learned", markup=False)
        console.print(f"{rendered.input!r} → {rendered.target!r}", markup=False)
    console.print(
        f"\ntokens a row: {forecast.mean_tokens:.0f} on average, {forecast.longest} at most\n"
        f"way: {forecast.way}; learned: {forecast.parameters:,} numbers "
        f"({forecast.virtual_tokens} virtual tokens of {forecast.width})\n"
        f"memory: about {forecast.step_gigabytes:.1f} GB for a step, {forecast.free_gigabytes:.1f} GB free\n"
        f"time: {forecast.step_seconds:.1f} s a step, about {forecast.minutes:.0f} min for "
        f"{plan.config.max_steps} steps with evaluations"
    )


@click.command()
@click.argument("prompt")
@click.argument("data")
@model_option
@map_option
@set_option
@click.option("--predictions", metavar="FILE", type=click.Path(path_type=Path), help="Where to write a record a row.")
@revision_option
@trust_option
@json_option
def evaluate(
    prompt: str,
    data: str,
    model: str | None,
    mapping: tuple[str, ...],
    assignments: tuple[str, ...],
    predictions: Path | None,
    revision: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Score rows with a prompt and without.

    PROMPT is a prompt's folder, or `none` for the untouched model; DATA as in tune. With `none`, --set template=… ,
    verbalizers=… and max_length=… say how rows become text.
    """
    from softprompt.cli.show import metrics_table, print_json
    from softprompt.cli.show import out as console
    from softprompt.config import TuneConfig, read_settings
    from softprompt.data.rows import load_data
    from softprompt.evaluation.evaluate import evaluate as run
    from softprompt.training.run_folder import write_predictions

    soft = _prompt(prompt)
    config, given = read_settings(TuneConfig, assignments=assignments)
    own = {"template", "verbalizers", "max_length"} & set(given)
    dropped = set(given) - own - {"device", "dtype"}
    if dropped:
        raise InputError(f"evaluate does not train: --set {min(dropped)} has no meaning here; leave it out")
    if soft is not None and own:
        raise InputError(f"the prompt brings its own {', '.join(sorted(own))}; leave --set {min(own)} out")
    rows = load_data(data, parse_map(mapping), soft.record.task if soft else None)
    if predictions is None:
        predictions = (Path() if soft is None else Path(prompt).resolve().parent) / "test-predictions.jsonl"
    if not predictions.parent.is_dir():
        raise InputError(f"--predictions {predictions}: no such folder: {predictions.parent}")
    frozen = _model_for(soft, model, revision, config.device, config.dtype, trust_remote_code)
    done = run(
        frozen, rows, soft, template=config.template, verbalizers=config.verbalizers, max_length=config.max_length
    )
    write_predictions(predictions, done.predictions)
    if as_json:
        print_json(
            {
                "task": done.task,
                "rows": done.rows,
                "metrics": {name: metric.model_dump() for name, metric in done.metrics.items()},
                "without_prompt": done.without_prompt
                and {name: metric.model_dump() for name, metric in done.without_prompt.items()},
                "seconds": round(done.seconds, 1),
                "predictions": str(predictions),
            }
        )
        return
    cut = f", {done.truncated} cut to fit" if done.truncated else ""
    console.print(metrics_table(done.metrics, done.without_prompt, f"{data}: {done.rows} rows{cut}, 95 % intervals"))
    console.print(f"predictions: {predictions}", soft_wrap=True, markup=False)


@click.command()
@click.argument("prompt")
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@model_option
@click.option("--versus-base", is_flag=True, help="Also show what the untouched model writes.")
@click.option("--raw", is_flag=True, help="Read the texts as they are, without the prompt's template.")
@set_option
@revision_option
@trust_option
@json_option
def generate(
    prompt: str,
    texts: tuple[str, ...],
    model: str | None,
    versus_base: bool,
    raw: bool,
    assignments: tuple[str, ...],
    revision: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Continue texts with a prompt.

    PROMPT is a prompt's folder, or `none` for the untouched model. Without TEXT, lines of stdin are continued.
    Decoding is greedy unless --set says otherwise: max_new_tokens, max_length, repetition_penalty, do_sample,
    temperature, top_k, top_p, no_repeat_ngram_size, seed; device and dtype place the model.
    """
    from softprompt.cli.show import out as console
    from softprompt.cli.show import print_json, side_by_side
    from softprompt.config import GenerateConfig, TuneConfig, read_settings
    from softprompt.generation import generate as run

    soft = _prompt(prompt)
    place = [a for a in assignments if a.startswith(("device=", "dtype="))]
    where, _ = read_settings(TuneConfig, assignments=place)
    config, _ = read_settings(GenerateConfig, assignments=[a for a in assignments if a not in place])
    if not texts and sys.stdin.isatty():
        say("reading texts from the keyboard, one a line; end with Ctrl-D")
    given = list(texts) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not given:
        raise InputError("no text to continue; give one or more, or lines on stdin")
    frozen = _model_for(soft, model, revision, where.device, where.dtype, trust_remote_code)
    made = run(frozen, given, soft, config, raw=raw)
    base = run(frozen, given, soft, config, raw=raw, virtual_tokens=False) if versus_base and soft else None
    if as_json:
        outputs = [
            {"input": text, "text": new, "base": base[i] if base else None}
            for i, (text, new) in enumerate(zip(given, made, strict=True))
        ]
        print_json({"outputs": outputs})
    elif base is None and len(given) == 1:
        click.echo(given[0] + made[0] if soft is None or soft.record.task == "text" or raw else made[0])
    else:
        console.print(side_by_side(given, base, made))


def _prompt(name: str) -> SoftPrompt | None:
    from softprompt.prompt.soft_prompt import load_prompt

    return None if name == "none" else load_prompt(name)


def _model_for(
    soft: SoftPrompt | None, name: str | None, revision: str | None, device: str, dtype: str, trust: bool
) -> FrozenModel:
    """Load the model that was asked for, or the one that the prompt was trained on."""
    from softprompt.model.bundled import DEFAULT_MODEL

    if name is None and soft is not None:
        if trust:
            raise InputError("--trust-remote-code needs --model: which code is run must not be the prompt's to say")
        name, revision = soft.record.base_model.id, revision or soft.record.base_model.revision
    return load(name or DEFAULT_MODEL, device=device, dtype=dtype, revision=revision, trust=trust)


def _prepare(
    data: str,
    model: str | None,
    task: str | None,
    mapping: tuple[str, ...],
    eval_data: str | None,
    budget: str | None,
    file: Path | None,
    assignments: tuple[str, ...],
    revision: str | None,
    trust_remote_code: bool,
    begun: Path | None = None,
) -> tuple[FrozenModel, Rows, Rows | None, TuneConfig, dict[str, str]]:
    """Read what `tune` and `check` were given: the cheap and fallible things first, the model last.

    `begun` are the settings of a run to be resumed: its device and precision are taken again.
    """
    from softprompt.config import TuneConfig, read_settings
    from softprompt.data.rows import load_data

    config, origins = read_settings(TuneConfig, file, assignments, budget=budget)
    rows = load_data(data, parse_map(mapping), cast("Task | None", task))
    held = load_data(eval_data, parse_map(mapping), rows.task) if eval_data else None
    place = read_settings(TuneConfig, begun)[0] if begun is not None else config
    frozen = _model_for(None, model, revision, place.device, place.dtype, trust_remote_code)
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    return frozen, rows, held, config, origins
