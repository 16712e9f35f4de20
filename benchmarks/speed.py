"""The speed of training, evaluation and generation, against PEFT and against the floating-point operations needed.

    python benchmarks/speed.py --data FOLDER            # all cases
    python benchmarks/speed.py --data FOLDER A1 C       # some

In training, PEFT runs in a plain PyTorch loop and, as in the tutorial, under `transformers.Trainer`. All sides run in
one process, a step each in turn, on the same rows in the same batches, from the same initial prompt, with the same
optimizer; a case fails if their losses or the first gradients differ. Peak memory is measured in a process of its own
for each side. A case's results replace the older ones in `results/speed.jsonl`; `results/speed.md` is their table.

FOLDER holds `sst2/{train,validation}.jsonl` (Stanford Sentiment Treebank, binary sentences; rows of text and label),
`banking77/test.jsonl` (Casanueva et al. 2020; likewise), `e2e/train.jsonl` (Novikova et al. 2017; rows of input and
target) and `awesome-chatgpt-prompts/prompts.csv` (github.com/f/awesome-chatgpt-prompts, March 2023).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

import inference
import start
import training
from softprompt.training.run_folder import environment

RESULTS = Path(__file__).parent / "results"
CASES: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    **{name: partial(training.measure, name) for name in training.CASES},
    "E-sst2": inference.sst2,
    "E-banking77": inference.banking77,
    "F": inference.generation,
    "start": start.measure,
}
TARGETS = {**{name: case.faster for name, case in training.CASES.items()}, "E-sst2": 3, "E-banking77": 10, "F": 1}


def table(records: dict[str, dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Speed",
        "",
        "Made by `benchmarks/speed.py`, which says how; seconds are medians, *faster* is the median of PEFT's time "
        "over ours, turn by turn.",
        "",
        "## Training, a step",
        "",
        "*Bound*: PEFT's floating-point operations divided by ours; *over needed*: our time divided by the time of "
        "the needed matrix products alone, at the rate measured in the same run. Memory is the peak above the loaded "
        "model.",
        "",
        "| case | PEFT | Trainer | ours | faster | target | bound | than Trainer | over needed | memory: PEFT | ours |",
        "|---" * 11 + "|",
    ]
    middle = {
        name: {side: statistics.median(each) for side, each in record["seconds"].items()}
        for name, record in records.items()
    }
    for name in training.CASES:
        if name in records:
            r, m, memory = records[name], middle[name], records[name]["memory_gigabytes"]
            lines.append(
                f"| {name} | {m['peft']:.1f} s | {m['trainer']:.1f} s | {m['softprompt']:.2f} s | "
                f"**{r['faster']:.2f}** | {TARGETS[name]} | {r['bound']:.1f} | {r['faster_than_trainer']:.2f} | "
                f"{r['over_needed']:.2f} | {memory['peft']:.1f} GB | {memory['softprompt']:.1f} GB |"
            )
    lines += ["", "## Evaluation and generation", "", "| case | PEFT | ours | faster | target |", "|---" * 5 + "|"]
    for name in ("E-sst2", "E-banking77", "F"):
        if name in records:
            m, faster = middle[name], records[name]["faster"]
            lines.append(
                f"| {name} | {m['peft']:.1f} s | {m['softprompt']:.2f} s | **{faster:.2f}** | {TARGETS[name]} |"
            )
    if "F" in records:
        m, over = middle["F"], records["F"]["first_token_over_base"]
        lines += [
            "",
            f"Time to the first token of 16 texts: {m['first']:.3f} s, **{over:.2f}** of the base model's "
            f"({m['base']:.3f} s through transformers, {m['plain']:.3f} s through ours without a prompt); target 1.15.",
        ]
    if "start" in records:
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in middle["start"].items())
        lines += ["", f"From the command to the end of the first step: {phases}; target 10 s in all."]
    last = max(records.values(), key=lambda r: str(r["date"]))
    versions = ", ".join(f"{name} {version}" for name, version in last["environment"].items())
    lines += ["", f"{last['date']}, {last['cores']} cores; {versions}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the requested cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="default: all")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the data sets")
    parser.add_argument("--repeats", type=int, default=3, help="that are timed, of each side")
    parser.add_argument("--memory-of", choices=("softprompt", "peft"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    disable_progress_bar()
    if options.memory_of:
        print(training.memory_of(options.cases[0], options.memory_of, options.data))
        return
    file = RESULTS / "speed.jsonl"
    records = {}
    if file.exists():
        records = {r["case"]: r for r in map(json.loads, file.read_text().splitlines())}
    for name in options.cases or CASES:
        records[name] = {
            "case": name,
            **CASES[name](options.data, options.repeats),
            "cores": os.cpu_count(),
            "date": date.today().isoformat(),
            "environment": environment(),
        }
        file.write_text("".join(json.dumps(r) + "\n" for r in records.values()))
        (RESULTS / "speed.md").write_text(table(records))
        print(json.dumps(records[name]), flush=True)
    print(table(records))


if __name__ == "__main__":
    main()
