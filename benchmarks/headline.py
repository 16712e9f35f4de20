"""Write the table of `docs/quality.md` from the files in `results/quality`; `results_page.py` calls it."""

from __future__ import annotations

import re
from pathlib import Path

from origins import OLDER, ON_GPU, Runs, machines, marks
from paired import differences, points
from quality import SETS, SHIPPED

QUALITY = Path(__file__).parents[1] / "docs" / "quality.md"
BEGIN, END = "<!-- Written by benchmarks/results_page.py. -->", "<!-- Until here. -->"
METHODS = {
    "zero-shot": "base model",
    "few-shot": "best few-shot prompt",
    SHIPPED: "PEFT's prompt tuning, with the settings of its guide",
    "prompt-tuning": "prompt tuning",
    "prefix-tuning": "prefix tuning",
    "lora": "LoRA",
}
TASKS = {
    "sst2": "SST-2, sentiment of film reviews",
    "rte": "RTE, does a text follow from another",
    "cb": "CB, the same of a clause",
    "boolq": "BoolQ, yes or no about a paragraph",
    "banking77": "Banking77, 77 intents of bank customers",
    "germeval18": "GermEval 2018, insults in German tweets",
    "e2e": "E2E, descriptions of restaurants",
}


def table(runs: Runs) -> list[str]:
    """Return the table: bold is what is best or not significantly worse."""
    lines = ["| task | " + " | ".join(METHODS.values()) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for name in SETS:
        best = max(METHODS, key=lambda method: points(runs[name][method]))
        cells = []
        for method in METHODS:
            alike = method == best or differences(runs, method, best, [name])[2] >= 0
            figure = f"{points(runs[name][method]):.1f}"
            cells.append((f"**{figure}**" if alike else figure) + marks(runs[name][method]))
        lines.append(f"| {TASKS[name]} | " + " | ".join(cells) + " |")
    return lines


def caption(runs: Runs) -> list[str]:
    """Return what is bold, and which runs differ in version or machine."""
    gpu, cpu = ("; ".join(machines(runs, gpu)) for gpu in (True, False))
    return [
        "Bold: the best, or not significantly worse (paired bootstrap, 95 %). Where a whole row is bold, the methods",
        "do not differ significantly on it. The best was picked on the same test rows, so it looks better than it is.",
        "",
        "The table mixes runs of different versions of the program and of different machines:",
        "",
        f"- {OLDER} at least one run is from before [prior matching](concepts.md#metrics) was tried.",
        f"- {ON_GPU} at least one run was made on a GPU ({gpu}), with the steps that fit into eight minutes of the CPU;"
        f" all others ran on a CPU ({cpu}).",
        "",
        "Which run is of which kind is in the [results](results.md#runs).",
    ]


def write_headline(runs: Runs) -> None:
    """Put the table and its caption into `docs/quality.md`, between two comments."""
    text = QUALITY.read_text(encoding="utf-8")
    block = "\n".join([BEGIN, "", *table(runs), "", *caption(runs), "", END])
    found, count = re.subn(f"{BEGIN}.*?{END}", lambda _: block, text, flags=re.DOTALL)
    assert count == 1, "docs/quality.md has no place for the table"
    QUALITY.write_text(found, encoding="utf-8")
