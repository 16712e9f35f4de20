"""The tables of README, `docs/quality.md` and `docs/results.md` say what the result files say, and from which runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "results" / "quality"
SETS = ("sst2", "rte", "cb", "boolq", "banking77", "germeval18", "e2e")
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUALITY, RESULTS = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("quality.md", "results.md"))
SPEED = (ROOT / "benchmarks" / "results" / "speed.md").read_text(encoding="utf-8")
OLD_NAMES = {"prompt-tuning": "soft-prompt", "prefix-tuning": "deep-prefix"}  # of runs from before they were renamed


def runs(name: str, method: str) -> list[dict[str, Any]]:
    old = next((method.replace(new, before, 1) for new, before in OLD_NAMES.items() if method.startswith(new)), method)
    files = [sorted((FOLDER / name).glob(f"{called}-[0-9]*.json")) for called in (method, old)]
    return [json.loads(file.read_text()) for file in files[0] or files[1]]


def figure(of: list[dict[str, Any]]) -> float:
    if "right" in of[0]:
        return float(np.mean([100 * run["right"].count("1") / len(run["right"]) for run in of]))
    sums = [np.sum(run["statistics"], axis=0).tolist() for run in of]
    return float(np.mean([BLEU()._compute_score_from_stats(each).score for each in sums]))


def expected_marks(of: list[dict[str, Any]]) -> str:
    tries = [run for run in of if run["task"] == "classification" and run["method"] != "peft-prompt-tuning"]
    older = any("prior_matching" not in run["settings"] for run in tries)
    return "†" * older + "‡" * any("gpu" in run["environment"] for run in of)


def cells(text: str, start: str, end: str) -> list[list[str]]:
    part = text.split(start, 1)[1].split(end, 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    lines = [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]


def test_the_readme_s_table_has_the_figures_of_the_results() -> None:
    names = {"zero-shot: the template alone": "zero-shot", "few-shot: the best examples found": "few-shot"}
    names |= {"PEFT's prompt tuning, with the settings of its guide": "peft-prompt-tuning", "full fine-tuning": "full"}
    names |= {"lora, by PEFT, in our trainer": "lora"}
    (_, *methods), *by_set = cells(RESULTS, "\n## Quality\n", "\n## ")
    means = dict(zip(methods, [cell.strip("*") for cell in by_set[-1][1:]], strict=True))
    costs = {row[0]: row for row in cells(RESULTS, "\n## Costs\n", "\nSteps that")}
    _, *rows = cells(README, "\n## How it compares\n", "\n## ")
    assert len(rows) == 7
    for called, quality, stored, step, test_row, _ in rows:
        method = names.get(called, called)
        _, _, kept, per_step, _, per_row, *_ = costs[method]
        assert [quality, stored, step, test_row] == [means[method], kept, per_step, per_row], called
    faster = [float(row[4].strip("*")) for row in cells(SPEED, "\n## Training, a step\n", "\n## ")[1:]]
    assert {row[0]: row[5] for row in rows}["prompt-tuning"] == f"**{min(faster):.1f} to {max(faster):.1f}**"


def test_the_quality_table_has_the_figures_and_marks_of_the_result_files() -> None:
    head, *rows = cells(QUALITY, "<!-- Written by benchmarks/results_page.py. -->", "<!-- Until here. -->")
    assert len(head) == 7
    methods = ("zero-shot", "few-shot", "peft-prompt-tuning", "prompt-tuning", "prefix-tuning", "lora")
    assert len(rows) == len(SETS)
    for name, row in zip(SETS, rows, strict=True):
        plain = [cell.replace("*", "") for cell in row[1:]]
        assert plain == [f"{figure(of):.1f}{expected_marks(of)}" for of in (runs(name, method) for method in methods)]
        best = max(range(6), key=lambda place: figure(runs(name, methods[place])))
        assert row[1 + best].startswith("**"), name


@pytest.mark.parametrize("text", [QUALITY, RESULTS], ids=["docs/quality.md", "docs/results.md"])
def test_what_is_mixed_is_said(text: str) -> None:
    words = " ".join(text.split())
    for said in ("before", "prior matching", "NVIDIA H200", "AMD EPYC", "looks better than it is", "†", "‡", "mix"):
        assert said in words, said


def test_the_results_say_where_every_run_comes_from() -> None:
    (_, *methods), *rows = cells(RESULTS, "\n## Runs\n", "\n## ")
    for name, (found, *row) in zip(SETS, rows, strict=True):
        assert found == name
        for method, cell in zip(methods, row, strict=True):
            each = ["GPU" if "gpu" in run["environment"] else "CPU" for run in runs(name, method)]
            marks = [expected_marks([run]).replace("‡", "") for run in runs(name, method)]
            assert cell == ", ".join(map("".join, zip(each, marks, strict=True))), (name, method)
    quality = cells(RESULTS, "\n## Quality\n", "\n## ")
    for name, row in zip(SETS, quality[1:], strict=False):
        for method, cell in zip(quality[0][1:], row[1:], strict=True):
            match = re.match(r"[\d.]+([†‡]*) \(", cell)
            assert match, cell
            assert match[1] == expected_marks(runs(name, method)), (name, method)
