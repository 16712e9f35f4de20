"""`softprompt demo`: tune and evaluate on the bundled model and data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from softprompt.cli.options import json_option, load, say, set_option, verbose_option

if TYPE_CHECKING:
    from softprompt.data.rows import Rows
    from softprompt.evaluation.evaluate import Evaluation
    from softprompt.evaluation.intervals import Metric
    from softprompt.model.frozen import FrozenModel
    from softprompt.prompt.soft_prompt import SoftPrompt
    from softprompt.training.tune import TuneResult

_SHOWN = 6
_STEPS = 60  # what fits in a few minutes on two cores
_NEW_TOKENS = 16  # of the text that is written freely


@click.command()
@click.option("--out", metavar="RUN", type=click.Path(path_type=Path), help="The run's folder. Default: runs/demo.")
@set_option
@verbose_option
@json_option
def demo(out: Path | None, assignments: tuple[str, ...], verbose: bool, as_json: bool) -> None:
    """Watch a small model learn to route support messages.

    Fetches the bundled model once (93 MB), tunes a prompt on 180 messages to an online shop, and compares it with the
    base model on 60 others. A few minutes on two cores.
    """
    from softprompt.config import TuneConfig, read_settings
    from softprompt.model.bundled import DEFAULT_MODEL

    config, origins = read_settings(TuneConfig, assignments=assignments, max_steps=_STEPS)
    model = load(DEFAULT_MODEL, config)

    from softprompt.cli.progress import TerminalCallback
    from softprompt.cli.tables import evaluation_record, print_json
    from softprompt.data.split import split_rows
    from softprompt.evaluation.evaluate import evaluate
    from softprompt.training.tune import tune

    train, test = demo_rows("train"), demo_rows("test")
    run = out or _free_folder(Path("runs/demo"))
    say(f"\nTuning a prompt on {len(train)} messages to an online shop, labelled\n{', '.join(train.labels)}.\n")
    result = tune(model, train, config, out=run, callback=TerminalCallback(origins, verbose=verbose))
    say(f"\nScoring {len(test)} test messages, without the prompt and with it.\n")
    learned, validation = split_rows(train, None, config.eval_rows, config.seed)  # as `tune` does
    done = evaluate(model, test, result.prompt, bias_rows=(learned, validation) if validation is not None else None)
    outputs, written = _answers(model, test, result.prompt, done.base_bias)
    if as_json:
        record = {key: value for key, value in evaluation_record(done).items() if key in ("metrics", "without_prompt")}
        print_json(
            {"run": str(run), "seconds": round(result.seconds, 1), **record, "outputs": outputs, "written": written}
        )
    else:
        _show(run, result, done, outputs, [row["label"] for row in test[:_SHOWN]], written)


def _answers(
    model: FrozenModel, test: Rows, prompt: SoftPrompt, base_bias: Mapping[str, float]
) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Choose labels for some rows, with the prompt (`text`) and without (`base`); write freely after the first."""
    from softprompt.config import GenerateConfig
    from softprompt.evaluation.label_scorer import choose
    from softprompt.evaluation.scores import add_label_bias
    from softprompt.generation import generate

    rows = test[:_SHOWN]
    messages = [row["text"] for row in rows]
    short = GenerateConfig(max_new_tokens=_NEW_TOKENS)
    chosen = add_label_bias(choose(model, prompt, rows, virtual_tokens=False), base_bias)
    base = [chosen.labels[best] for best in chosen.predicted]
    tuned = generate(model, messages, prompt)
    (base_text,), (tuned_text,) = (
        generate(model, messages[:1], prompt, short, mode="write", virtual_tokens=prompted)
        for prompted in (False, True)
    )
    each = zip(messages, tuned, base, strict=True)
    outputs = [{"input": message, "text": label, "base": base_label} for message, label, base_label in each]
    return outputs, {"input": messages[0], "text": tuned_text, "base": base_text}


def _show(
    run: Path,
    result: TuneResult,
    done: Evaluation,
    outputs: list[dict[str, str]],
    right: list[str],
    written: dict[str, str],
) -> None:
    """Print the scores, some answers, the prompt's folder and the gain."""
    from softprompt.cli.tables import metrics_table, out, plain_table, side_by_side

    out.print(metrics_table(done.metrics, done.without_prompt, f"{done.rows} messages held out, 95 % intervals"))
    out.print()
    inputs, tuned, base = ([output[name] for output in outputs] for name in ("input", "text", "base"))
    out.print(side_by_side(inputs, base, tuned, right))
    out.print()
    out.print(
        plain_table(
            ("", "label chosen", "writes freely"),
            [
                ("without prompt", base[0], repr(written["base"])),
                ("with prompt", tuned[0], repr(written["text"])),
            ],
            "The first message, once choosing a label and once writing freely",
            whole=2,
        )
    )
    tokens, parameters = result.prompt.num_virtual_tokens, result.prompt.weights.numel()
    out.print(
        f"\nThe base model is unchanged. The {tokens} virtual tokens that were trained\n"
        f"({parameters:,} parameters) are in {run / 'prompt'}, which PEFT reads too. Next:\n",
        soft_wrap=True,
        markup=False,
    )
    for line in (
        f'softprompt generate {run / "prompt"} "my parcel never came" --versus-base',
        "softprompt check YOUR.csv                    # columns text,label: a dry run",
        "softprompt tune YOUR.csv --out runs/mine     # your own task",
        "softprompt evaluate runs/mine/prompt TEST.csv",
    ):
        out.print(f"  {line}", markup=False, soft_wrap=True)
    assert done.without_prompt is not None
    effort = f"after {result.steps} steps in {result.seconds:.0f} s"
    out.print("\n" + gain(done.rows, done.metrics["accuracy"], done.without_prompt["accuracy"], effort))


def gain(rows: int, tuned: Metric, base: Metric, effort: str) -> str:
    """Write in one sentence what a prompt gained after `effort` (steps and seconds), on rows that it had not seen."""
    from softprompt.formatting import short_metric

    right, before = round(tuned.value * rows), round(base.value * rows)
    share, share_before = short_metric("accuracy", tuned.value), short_metric("accuracy", base.value)
    seen = f"f {rows} messages it had not seen, the model"
    if right > before:
        chance = "; so small a difference may be chance" if tuned.low <= base.high else ""
        shares = f"({share} instead of {share_before})"
        return f"O{seen} now routes {right} right instead of {before} {shares}, {effort}{chance}."
    than = f"as many as without it ({share})" if right == before else f"{before} without it ({share}, {share_before})"
    return f"Nothing was gained {effort}: o{seen} routes {right} right with the prompt, {than}."


def demo_rows(part: str) -> Rows:
    """Return the demo's messages, `train` or `test`."""
    from importlib.resources import as_file, files

    from softprompt.data.rows import load_data

    with as_file(files("softprompt.demo") / f"support-{part}.csv") as path:
        return load_data(path)


def _free_folder(wanted: Path) -> Path:
    """Return a folder that does not exist yet, so that a second demo does not overwrite the first."""
    number, folder = 1, wanted
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder
