"""How the settings of each method were chosen: short runs on three tasks, compared on validation rows alone.

Every run takes the same rows in the same order; test rows are not used. Results are appended to
`results/choices.jsonl`, existing ones are not computed again, and `results/choices.md` is their table.

    python benchmarks/choices.py --data FOLDER                     # all variants on all three tasks
    python benchmarks/choices.py --data FOLDER sst2 --variants "prompt-tuning, learning rate 0.03" --steps 200

FOLDER is described in `quality.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import softprompt as sp
from quality import SETS, rows_of
from records import read_records
from softprompt.comparison.methods import METHODS
from softprompt.comparison.methods.base import MethodCallback
from softprompt.comparison.protocol import Protocol
from softprompt.training.run_folder import environment

RESULTS = Path(__file__).parent / "results"
CHOSEN_ON = ("sst2", "banking77", "e2e")


def rates(method: str, values: tuple[float, ...], **settings: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return variants of a method that differ in their learning rate."""
    more = "".join(f", {name.replace('_', ' ')} {value}" for name, value in settings.items())
    return {f"{method}{more}, learning rate {v:g}": (method, {"learning_rate": v, **settings}) for v in values}


# Name to method and settings; those left open are the method's defaults.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **rates("prompt-tuning", (0.01, 0.03, 0.1), init="text"),
    **rates("prefix-tuning", (0.003, 0.01, 0.03), init="text"),
    **rates("lora", (3e-4, 1e-3, 3e-3)),
    **rates("full", (1e-5, 5e-5, 2e-4)),
    **rates("prompt-tuning", (0.01, 0.03, 0.1), init="a list of all labels"),
    **rates("prefix-tuning", (0.01, 0.03, 0.1), init="a list of all labels"),
    **rates("prompt-tuning", (0.01, 0.03, 0.1), init="examples"),
    **rates("prefix-tuning", (0.003, 0.01, 0.03, 0.1), init="examples"),
    **rates("prompt-tuning", (0.03, 0.1), init="labels"),
    **rates("prefix-tuning", (0.01, 0.03), init="labels"),
    **rates("prompt-tuning", (0.03,), num_virtual_tokens=50),
    **rates("prefix-tuning", (0.01,), num_virtual_tokens=50),
}


def run(model: sp.FrozenModel, name: str, variant: str, seed: int, steps: int, data: Path) -> dict[str, Any]:
    """Train once, and return the validation figures."""
    method, settings = VARIANTS[variant]
    train, validation, test = rows_of(name, data)
    if settings.get("init") == "a list of all labels":
        listed = ", ".join(label.replace("_", " ") for label in train.labels)
        settings = {**settings, "init": "text", "init_text": f"Classify the text as one of: {listed}.\n"}
    config = sp.TuneConfig(**settings, max_steps=steps)
    protocol = Protocol(model, train, validation, test, config, "examples", search=False)
    fitting = METHODS[method](protocol, seed, MethodCallback())
    try:
        fitted = fitting.fit()
    finally:
        fitting.close()
    best = min(fitted.curve, key=lambda point: point.validation["loss"])
    return {
        "set": name,
        "variant": variant,
        "method": method,
        "seed": seed,
        "steps": steps,
        "learned": fitted.parameters,
        "best_step": best.step,
        "validation": best.validation,
        "seconds": round(fitted.effort.seconds, 1),
        "curve": [point.model_dump() for point in fitted.curve],
        "rows": [len(train), len(validation)],
        "date": date.today().isoformat(),
        "environment": environment(),
    }


def table(records: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# How the settings were chosen",
        "",
        "Made by `benchmarks/choices.py`, SmolLM2-135M-Instruct; at most 1,000 rows to learn from and 150 or 200 "
        "validation rows. The figures are those of the evaluation with the lowest validation loss. Test rows are "
        "not used. A star marks variants that are no longer in the program.",
    ]
    for name in dict.fromkeys(r["set"] for r in records):
        mine = sorted((r for r in records if r["set"] == name), key=lambda r: (r["steps"], r["variant"]))
        lines += [
            "",
            f"## {name}",
            "",
            "| variant | seed | steps | best | trainable parameters | loss | accuracy |",
            "|---" * 7 + "|",
        ]
        for r in mine:
            accuracy = r["validation"].get("accuracy")
            star = "" if r["variant"] in VARIANTS else " *"
            lines.append(
                f"| {r['variant']}{star} | {r['seed']} | {r['steps']} | {r['best_step']} | {r['learned']:,} | "
                f"{r['validation']['loss']:.3f} | {'' if accuracy is None else f'{accuracy:.1%}'} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is requested and missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", choices=[*SETS, []], help=f"default: {', '.join(CHOSEN_ON)}")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the data sets")
    parser.add_argument("--variants", nargs="*", help="default: all; one that ends in * stands for all that begin so")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    file = RESULTS / "choices.jsonl"
    records = read_records(file)
    patterns = options.variants or ["*"]
    chosen = [v for v in VARIANTS if any(v == p or (p.endswith("*") and v.startswith(p[:-1])) for p in patterns)]
    model = sp.load_model()
    for seed in range(options.seeds):
        for variant in chosen:
            for name in options.sets or CHOSEN_ON:
                key = (name, variant, seed, options.steps)
                if any((r["set"], r["variant"], r["seed"], r["steps"]) == key for r in records):
                    continue
                began = time.monotonic()
                record = run(model, name, variant, seed, options.steps, options.data)
                records.append(record)
                with file.open("a") as out:
                    out.write(json.dumps(record) + "\n")
                print(*key, record["best_step"], record["validation"], f"{time.monotonic() - began:.0f} s", flush=True)
                (RESULTS / "choices.md").write_text(table(records))


if __name__ == "__main__":
    main()
