"""`softprompt demo`: the whole path on the bundled model and data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.options import json_option, load, say, set_option

if TYPE_CHECKING:
    from softprompt.data.rows import Rows

_SHOWN = 6
_STEPS = 60  # what fits in a few minutes on two cores


@click.command()
@click.option("--out", metavar="RUN", type=click.Path(path_type=Path), help="The run's folder; runs/demo.")
@set_option
@json_option
def demo(out: Path | None, assignments: tuple[str, ...], as_json: bool) -> None:
    """Watch a small model learn to route support messages.

    Fetches the bundled model once (93 MB), tunes a prompt on 180 messages to an online shop, and compares it with the
    untouched model on 60 others. A few minutes on two cores.
    """
    from softprompt.cli.show import TerminalWatcher, metrics_table, print_json, side_by_side
    from softprompt.cli.show import out as console
    from softprompt.config import TuneConfig, read_settings
    from softprompt.evaluation.evaluate import evaluate
    from softprompt.generation import generate
    from softprompt.model.bundled import DEFAULT_MODEL
    from softprompt.training.tune import tune

    config, origins = read_settings(TuneConfig, assignments=assignments, max_steps=_STEPS)
    model = load(DEFAULT_MODEL, config)
    train, test = demo_rows("train"), demo_rows("test")
    run = out or _free_folder(Path("runs/demo"))
    say(f"\nTuning a prompt on {len(train)} messages to an online shop, labelled {', '.join(train.labels)}.\n")
    result = tune(model, train, config, out=run, watcher=TerminalWatcher(origins))
    say(f"\nScoring {len(test)} messages that were held back, without the prompt and with it.\n")
    done = evaluate(model, test, result.prompt)
    shown = [row["text"] for row in test[:_SHOWN]]
    base = generate(model, shown, result.prompt, virtual_tokens=False)
    texts = generate(model, shown, result.prompt)
    if as_json:
        print_json(_json(run, result.seconds, done, shown, base, texts))
        return
    console.print(metrics_table(done.metrics, done.without_prompt, f"{done.rows} messages held back, 95 % intervals"))
    console.print()
    console.print(side_by_side(shown, base, texts, [row["label"] for row in test[:_SHOWN]]))
    prompt = result.prompt
    console.print(
        f"\nThe model is as it was; what was learned are {prompt.num_virtual_tokens} virtual tokens, "
        f"{prompt.weights.numel():,} numbers, in {result.seconds:.0f} s.\n"
        f"They are in {run / 'prompt'}, a folder that PEFT reads too. Next:\n"
    )
    for line in (
        f'softprompt generate {run / "prompt"} "my parcel never came" --versus-base',
        "softprompt check YOUR.csv                    # columns text,label: a dry run",
        "softprompt tune YOUR.csv --out runs/mine     # your own task",
        "softprompt evaluate runs/mine/prompt TEST.csv",
    ):
        console.print(f"  {line}", markup=False, soft_wrap=True)


def demo_rows(part: str) -> Rows:
    """Return the demo's messages, `train` or `test`; they come with the package."""
    from importlib.resources import as_file, files

    from softprompt.data.rows import load_data

    with as_file(files("softprompt.demo") / f"support-{part}.csv") as path:
        return load_data(path)


def _free_folder(wanted: Path) -> Path:
    """Return a folder that does not exist yet: a second demo does not overwrite the first."""
    number, folder = 1, wanted
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def _json(run: Path, seconds: float, done: Any, shown: list[str], base: list[str], texts: list[str]) -> dict[str, Any]:
    outputs = [{"input": i, "text": t, "base": b} for i, t, b in zip(shown, texts, base, strict=True)]
    return {
        "run": str(run),
        "seconds": round(seconds, 1),
        "metrics": {name: metric.model_dump() for name, metric in done.metrics.items()},
        "without_prompt": {name: metric.model_dump() for name, metric in done.without_prompt.items()},
        "outputs": outputs,
    }
