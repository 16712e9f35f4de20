"""Starts and losses for many labels, tried on Banking77's validation rows alone.

Prompt tuning takes as many steps as fit into the eight minutes of `quality.py`; prefix tuning and LoRA a third of that,
enough to see the effect of a loss, or all of them where the name says how many. Of 500 validation rows, 200 choose the
best prompt and the label biases (prior matching); the other 300 are scored. Results are appended to
`results/many_labels.jsonl`, which also holds results of variants that are no longer in the program.

    python benchmarks/many_labels.py --data FOLDER                # what is missing
    python benchmarks/many_labels.py --data FOLDER "prefix-tuning*"

FOLDER is described in `quality.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import softprompt as sp
from quality import VALIDATION, apart, rows_of
from records import read_records
from softprompt.comparison.methods import METHODS
from softprompt.comparison.methods.base import MethodCallback
from softprompt.comparison.protocol import Protocol
from softprompt.evaluation.calibration import prior_matching
from softprompt.evaluation.scores import LabelScores, add_label_bias

FILE = Path(__file__).parent / "results" / "many_labels.jsonl"
SET = "banking77"
# Name to method and settings; those left open are the method's defaults.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt-tuning, list, target": ("prompt-tuning", {"init": "text", "loss": "target", "max_steps": 117}),
    "prompt-tuning, list, labels": ("prompt-tuning", {"init": "text", "loss": "labels", "max_steps": 117}),
    "prompt-tuning, rows, target": ("prompt-tuning", {"init": "examples", "loss": "target", "max_steps": 180}),
    "prompt-tuning, rows, labels": ("prompt-tuning", {"init": "examples", "loss": "labels", "max_steps": 180}),
    "prompt-tuning, rows, labels, rate 0.005": (
        "prompt-tuning",
        {"init": "examples", "loss": "labels", "max_steps": 180, "learning_rate": 0.005},
    ),
    "prompt-tuning, rows, labels, rate 0.02": (
        "prompt-tuning",
        {"init": "examples", "loss": "labels", "max_steps": 180, "learning_rate": 0.02},
    ),
    "prefix-tuning, target": ("prefix-tuning", {"loss": "target", "max_steps": 93}),
    "prefix-tuning, labels": ("prefix-tuning", {"loss": "labels", "max_steps": 93}),
    "lora, target": ("lora", {"loss": "target", "max_steps": 101}),
    "lora, labels": ("lora", {"loss": "labels", "max_steps": 101}),
    "prefix-tuning, list, 279 steps": ("prefix-tuning", {"loss": "target", "max_steps": 279}),
    "prefix-tuning, list, labels, 279 steps": ("prefix-tuning", {"loss": "labels", "max_steps": 279}),
    "lora, 302 steps": ("lora", {"loss": "target", "max_steps": 302}),
}


def run(model: sp.FrozenModel, variant: str, data: Path) -> dict[str, Any]:
    """Train once, and return the validation figures."""
    method, settings = VARIANTS[variant]
    train, validation, test = rows_of(SET, data)
    some, others = apart(validation)
    config = sp.TuneConfig(**settings, eval_rows=VALIDATION)
    began = time.monotonic()
    protocol = Protocol(model, train, some, test, config, "examples", search=False)
    fitting = METHODS[method](protocol, 0, MethodCallback())
    try:
        fitted = fitting.fit()
        predictor = fitted.predictor
        chosen_by, plain = (predictor.score(rows, predictor.micro_batch_tokens(rows)).plain for rows in (some, others))
    finally:
        fitting.close()
    assert isinstance(chosen_by, LabelScores)
    assert isinstance(plain, LabelScores)
    matched = add_label_bias(plain, prior_matching(chosen_by, train))
    return {
        "variant": variant,
        "set": SET,
        "method": method,
        "settings": {**settings, **{k: fitted.settings[k] for k in ("learning_rate", "batch_size", "seed")}},
        "validation_rows": [len(some), len(others)],
        "nats_a_label": round(float(plain.losses.mean()), 3),
        "accuracy": round(plain.values()["accuracy"], 4),
        "accuracy_prior_matching": round(matched.values()["accuracy"], 4),
        "seconds": round(time.monotonic() - began),
        "device": model.device.type,
    }


def main() -> None:
    """Run what is requested and missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=["*"], help="one that ends in * stands for all that begin so")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the data sets")
    options = parser.parse_args()
    done = {record.get("variant") for record in read_records(FILE)}
    model = sp.load_model(dtype="float32")
    for name in VARIANTS:
        requested = any(name == p or (p.endswith("*") and name.startswith(p[:-1])) for p in options.variants)
        if requested and name not in done:
            record = run(model, name, options.data)
            with FILE.open("a") as out:
                out.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
