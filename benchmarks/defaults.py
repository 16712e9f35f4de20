"""The evidence for the default settings: prompts tuned with other settings, scored on rows that were not used.

Every variant is one run in a folder below `runs/defaults`, resumed if it was stopped. Its result is appended to
`results/defaults.jsonl`, and existing results are not computed again, so the program can be stopped at any time.
`results/defaults.md` is their table.

    python benchmarks/defaults.py support                   # the demo's messages
    python benchmarks/defaults.py --data FOLDER             # all cases

FOLDER holds, as rows of text and label, `sst2/{train,validation}.jsonl` (Stanford Sentiment Treebank, binary
sentences), `banking77/{train,validation,test}.jsonl` (Casanueva et al. 2020) and
`germeval18/{train,validation,test}.jsonl` (German tweets, insulting or not); as rows of input and target
`e2e/{train,validation,test}.jsonl` (Novikova et al. 2017); and `awesome-chatgpt-prompts/prompts.csv`
(github.com/f/awesome-chatgpt-prompts, March 2023).
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import softprompt as sp
from softprompt.cli.demo import demo_rows
from softprompt.training.run_folder import environment

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """A task: where its rows come from, the settings that are compared on it, by name, and its metric.

    The rows are training, test and validation rows (None: a part of the training rows).
    """

    rows: Callable[[Path], tuple[sp.Rows, sp.Rows, sp.Rows | None]]
    variants: dict[str, dict[str, Any]]
    metric: str = "accuracy"


def sst2(data: Path) -> tuple[sp.Rows, sp.Rows, None]:
    """Sentiment of film reviews: 2,000 rows to learn from, 872 to score."""
    return sp.load_data(f"{data}/sst2/train.jsonl[:2000]"), sp.load_data(data / "sst2/validation.jsonl"), None


def prompts(data: Path) -> tuple[sp.Rows, sp.Rows, None]:
    """The tutorial's plain text: 50 rows to learn from, the other 103 to score."""
    path, column = data / "awesome-chatgpt-prompts/prompts.csv", {"text": "prompt"}
    return sp.load_data(f"{path}[:50]", column), sp.load_data(f"{path}[50:]", column), None


def support(_data: Path) -> tuple[sp.Rows, sp.Rows, None]:
    """The demo's messages: 180 to learn from, 60 to score."""
    return demo_rows("train"), demo_rows("test"), None


def files(name: str, scored: int) -> Callable[[Path], tuple[sp.Rows, sp.Rows, sp.Rows]]:
    """A data set with rows of its own for validation; the first so many test rows are scored."""

    def read(data: Path) -> tuple[sp.Rows, sp.Rows, sp.Rows]:
        train, validation = (sp.load_data(data / name / f"{part}.jsonl") for part in ("train", "validation"))
        return train, sp.load_data(f"{data / name / 'test.jsonl'}[:{scored}]"), validation

    return read


def spaced(label: str) -> str:
    """A label as people would write it."""
    return label.replace("_", " ").strip("?").lower()


TUTORIAL = {
    "init": "random",
    "num_virtual_tokens": 4,
    "learning_rate": 0.005,
    "epochs": 5,
    "batch_size": 8,
    "eval_rows": 0,
    "warmup_ratio": 0,
    "schedule": "linear",
}
CASES = {
    "prompts": Case(
        prompts,
        {
            "as in the tutorial": TUTORIAL,
            "defaults": {},
            "learning rate 0.01": {"learning_rate": 0.01},
            "learning rate 0.1": {"learning_rate": 0.1},
            "200 steps": {"max_steps": 200},
            "vocabulary": {"init": "vocabulary"},
            "random": {"init": "random"},
        },
        "loss",
    ),
    "support": Case(
        support,
        {
            "as in the demo": {"max_steps": 80},
            "defaults": {},
            "from a row of every label": {"max_steps": 60, "init": "examples"},
            "from words": {"max_steps": 80, "init": "text"},  # in the same time
            "labels": {"init": "labels"},
            "random": {"init": "random"},
        },
    ),
    "sst2": Case(
        sst2,
        {
            "defaults": {},
            "10 tokens": {"num_virtual_tokens": 10},
            "125 steps": {"max_steps": 125},
            "learning rate 0.01": {"learning_rate": 0.01},
            "random": {"init": "random"},
            "template Sentiment:": {"template": "{{ text }}\nSentiment:"},
            "bfloat16": {"dtype": "bfloat16"},
            "float16": {"dtype": "float16"},
        },
    ),
    "e2e": Case(files("e2e", 500), {"defaults": {}}, "bleu"),
    "germeval18": Case(
        files("germeval18", 1000),
        {
            "defaults": {},
            "thorough": {"budget": "thorough"},
            "German text": {
                "template": "Tweet: {{ text }}\nDieser Tweet ist",
                "init_text": "Entscheide, ob der Tweet jemanden beleidigt oder harmlos ist:\n",
            },
        },
        "macro_f1",
    ),
    "banking77": Case(
        files("banking77", 500), {"defaults": {}, "labels with spaces": {"verbalizers": spaced}}, "accuracy"
    ),
}


@functools.cache
def base(dtype: str) -> sp.FrozenModel:
    """Load the base model in a precision."""
    return sp.load_model(dtype=dtype)


def run(case: str, variant: str, seed: int, data: Path) -> dict[str, Any]:
    """Tune once, or resume, and score the prompt on rows that were not used."""
    train, test, validation = CASES[case].rows(data)
    settings = {"seed": seed, **CASES[case].variants[variant]}
    model = base(settings.get("dtype", "auto"))
    if callable(settings.get("verbalizers")):
        settings["verbalizers"] = {label: settings["verbalizers"](label) for label in train.labels}
    folder = Path("runs/defaults") / re.sub(r"[^a-z0-9]+", "-", f"{case} {variant} {seed}".lower())
    config = sp.TuneConfig(**settings)
    result = sp.tune(model, train, config, eval_data=validation, out=folder, resume=folder.exists())
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    done = sp.evaluate(model, test, result.prompt)
    assert done.without_prompt is not None
    return {
        "case": case,
        "variant": variant,
        "seed": seed,
        "settings": settings,
        "steps": result.steps,
        "seconds": round(sum(record.get("step_seconds", 0) for record in logged), 1),
        "virtual_tokens": result.prompt.num_virtual_tokens,
        "best_step": result.best_step,
        "test": {name: metric.model_dump() for name, metric in done.metrics.items()},
        "without_prompt": {name: metric.model_dump() for name, metric in done.without_prompt.items()},
        "samples": samples(model, test, result.prompt, done) if test.task == "completion" else None,
        "date": date.today().isoformat(),
        "environment": environment(),
    }


def samples(model: sp.FrozenModel, test: sp.Rows, prompt: sp.SoftPrompt, done: sp.Evaluation) -> list[dict[str, str]]:
    """Return three inputs with the base model's output, the prompt's, and a right answer."""
    each = {
        row["input"]: {**row, "with_prompt": p["prediction"]} for row, p in zip(test, done.predictions, strict=True)
    }
    chosen = list(each.values())[:: max(1, len(each) // 3)][:3]
    config = sp.GenerateConfig(max_new_tokens=60)
    texts = sp.generate(model, [row["input"] for row in chosen], prompt, config, virtual_tokens=False)
    return [{**row, "without_prompt": text} for row, text in zip(chosen, texts, strict=True)]


def table(records: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Settings compared",
        "",
        "Made by `benchmarks/defaults.py`, SmolLM2-135M-Instruct, 2 cores. Scored on rows that played no part in "
        "training or in choosing the best prompt; in brackets the 95 % interval. Seconds are those of the training "
        "steps, on a shared machine, some of them beside other work: read them as an upper bound. Rows named "
        "*defaults* are with the defaults of their day, *best by accuracy* with an earlier rule.",
    ]
    for case, described in CASES.items():
        mine = [r for r in records if r["case"] == case]
        if not mine:
            continue
        name = described.metric
        lines += ["", f"## {case}: {name}", ""]
        lines += ["| settings | seed | P | steps | best | seconds | without a prompt | with |", "|---" * 8 + "|"]
        for r in mine:
            m, before = r["test"][name], r["without_prompt"][name]["value"]
            lines.append(
                f"| {r['variant']} | {r['seed']} | {r['virtual_tokens']} | {r['steps']} | {r['best_step']} | "
                f"{r['seconds']:.0f} | {before:.3f} | {m['value']:.3f} ({m['low']:.3f} to {m['high']:.3f}) |"
            )
        for sample in mine[0].get("samples") or ():
            lines += ["", *(f"- {part.replace('_', ' ')}: `{' '.join(text.split())}`" for part, text in sample.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is requested and missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="default: all")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the data sets")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--variants", nargs="*", help="default: all of the case")
    options = parser.parse_args()
    file = RESULTS / "defaults.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for case in options.cases or CASES:
        for seed in range(options.seeds):
            for variant in options.variants or CASES[case].variants:
                if any((r["case"], r["variant"], r["seed"]) == (case, variant, seed) for r in records):
                    continue
                began = time.monotonic()
                record = run(case, variant, seed, options.data)
                records.append(record)
                with file.open("a") as out:
                    out.write(json.dumps(record) + "\n")
                print(case, variant, seed, record["test"], f"{time.monotonic() - began:.0f} s", flush=True)
                (RESULTS / "defaults.md").write_text(table(records))
    (RESULTS / "defaults.md").write_text(table(records))


if __name__ == "__main__":
    main()
