"""The quality of an ensemble whose members share the time of one run, on validation rows alone.

Every variant takes about as many steps as fit into the eight minutes of `quality.py`. Of 500 validation rows, 200
select the prompt, and the other 300 are scored. Results are appended to `results/ensembles.jsonl`, which also holds
results of variants that are no longer in the program.

    python benchmarks/ensembles.py --data FOLDER                               # what is missing
    python benchmarks/ensembles.py --data FOLDER sst2 --methods prompt-tuning --variants one "60 % together"

FOLDER is described in `quality.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import softprompt as sp
from quality import MEMBERS, apart, rows_of, timed
from records import read_records
from softprompt.config import MANY_LABELS
from softprompt.data.encoder import Encoder
from softprompt.data.rows import Rows
from softprompt.evaluation.calibration import make_scorer
from softprompt.evaluation.scores import average_scores
from softprompt.evaluation.token_scorer import TokenScorer
from softprompt.prompt.ensemble import make_ensemble

FILE = Path(__file__).parent / "results" / "ensembles.jsonl"
# Name to the share of the steps that members have in common, with a constant learning rate.
VARIANTS: dict[str, float | None] = {"one": None, "three": 0.0, "60 % together": 0.6, "80 % together": 0.8}


def learned(
    model: sp.FrozenModel, variant: str, settings: dict[str, Any], train: Rows, some: Rows
) -> list[sp.SoftPrompt]:
    """Return the members of an ensemble, or a single prompt."""
    together, steps = VARIANTS[variant], settings["max_steps"]
    if together is None:
        return [sp.tune(model, train, sp.TuneConfig(**settings), eval_data=some).prompt]
    start, common = {}, round(together * steps)
    with tempfile.TemporaryDirectory() as scratch:
        if common:
            constant = {**settings, "max_steps": common, "schedule": "constant"}
            config = sp.TuneConfig(**constant, eval_rows=0)
            start["init"] = f"prompt:{sp.tune(model, train, config).prompt.save(Path(scratch) / 'common')}"
        own = (steps - common) // MEMBERS
        each = {**settings, **start, "max_steps": own, "eval_every": math.ceil(own / 3)}
        configs = [sp.TuneConfig(**each, seed=seed) for seed in range(bool(common), MEMBERS + bool(common))]
        return [sp.tune(model, train, config, eval_data=some).prompt for config in configs]


def run(model: sp.FrozenModel, name: str, method: str, variant: str, data: Path) -> dict[str, Any]:
    """Train, and return the figures on the rows that nothing was chosen by."""
    train, validation, _ = rows_of(name, data)
    some, others = apart(validation)
    steps = timed()[name][method].length(method)["max_steps"]
    began = time.monotonic()
    prompts = learned(model, variant, {"method": method, "max_steps": steps}, train, some)
    seconds = time.monotonic() - began
    made = make_ensemble(prompts, {})
    encoder = Encoder(model.tokenizer, made.format, made.record.max_length)
    kind = TokenScorer if len(made.format.verbalizers) > MANY_LABELS else make_scorer
    each = kind(encoder, others).score_members(model, made)
    return {
        "variant": variant,
        "set": name,
        "method": method,
        "max_steps": steps,
        "validation_rows": [len(some), len(others)],
        "members": [{key: round(value, 4) for key, value in scores.values().items()} for scores in each],
        "together": {key: round(value, 4) for key, value in average_scores(each).values().items()},
        "seconds": round(seconds),
    }


def main() -> None:
    """Run what is requested and missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=["sst2", "banking77", "e2e"], help="default: all three")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the data sets")
    parser.add_argument("--methods", nargs="*", choices=["prompt-tuning", "prefix-tuning"], default=["prefix-tuning"])
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    options = parser.parse_args()
    found = read_records(FILE)
    done = {(record.get("variant"), record["set"], record.get("method")) for record in found}
    model = sp.load_model(dtype="float32")
    requested = [(v, s, m) for s in options.sets for m in options.methods for v in options.variants]
    for variant, name, method in requested:
        if (variant, name, method) in done:
            continue
        record = run(model, name, method, variant, options.data)
        with FILE.open("a") as out:
            out.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
