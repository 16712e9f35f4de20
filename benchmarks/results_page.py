"""Write `docs/results.md` and the table of `docs/quality.md` from the results of `quality.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from headline import write_headline
from origins import OLDER, Runs, marks, matched, mixture, runs_table
from paired import differences, points
from quality import EARLY, FOLDER, LEARNING, MINUTES, ORDER, SETS, SHIPPED, method_of, of_several, read, timed
from softprompt.comparison.results import Result
from softprompt.formatting import count, duration, size

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
CLASSIFICATION = SETS[:-1]
SINGLE = ("prompt-tuning", "prefix-tuning")
WHOLE = tuple(method for method in ORDER if method not in EARLY)


def load() -> Runs:
    """Return all results."""
    found: Runs = {name: {} for name in SETS}
    for name in SETS:
        for method in (*ORDER, *map(of_several, SINGLE)):
            files = sorted(file for file in (FOLDER / name).glob("*.json") if method_of(file) == method)
            if files:
                found[name][method] = [read(file) for file in files]
    return found


def signed(value: float, low: float, high: float) -> str:
    """Write a difference in points."""
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def quality(runs: Runs) -> list[str]:
    """Return the table of sets and methods."""
    methods = [m for m in WHOLE if any(m in runs[name] for name in SETS)]
    lines = ["| | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for name in SETS:
        cells = []
        for method in methods:
            results = runs[name].get(method)
            if not results:
                cells.append("")
                continue
            scale = 100.0 if results[0].ranking == "accuracy" else 1.0
            low = scale * float(np.mean([r.primary.low for r in results]))
            high = scale * float(np.mean([r.primary.high for r in results]))
            seeds = f", {len(results)} seeds" if len(results) > 1 else ""
            cells.append(f"{points(results):.1f}{marks(results)} ({low:.1f} to {high:.1f}{seeds})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    whole = [m for m in methods if all(m in runs[name] for name in SETS)]
    if whole:
        means = [f"**{np.mean([points(runs[n][m]) for n in SETS]):.1f}**" if m in whole else "" for m in methods]
        lines.append("| **mean** | " + " | ".join(means) + " |")
    return lines


def compared(runs: Runs, second: str, sets: Sequence[str]) -> list[str]:
    """Return the differences of all methods to one, by set and on average."""
    methods = [m for m in WHOLE if m != second and any(m in runs[n] and second in runs[n] for n in sets)]
    if not methods:
        return ["Not run yet."]
    head = " | ".join([f"difference to {second.replace('lora', 'LoRA')}", *methods])
    lines = [f"| {head} |", "|---" * (len(methods) + 1) + "|"]
    for name in [*sets, "mean"]:
        cells = []
        for method in methods:
            value, low, high, there = differences(runs, method, second, sets if name == "mean" else [name])
            part = f" of {len(there)}" if name == "mean" and len(there) < len(sets) else ""
            cells.append(signed(value, low, high) + part if there else "")
        lines.append(f"| {'**mean**' if name == 'mean' else name} | " + " | ".join(cells) + " |")
    return lines


def shown(value: float | None, write: Callable[[float], str] = duration) -> str:
    """Write a figure, if there is one."""
    return "" if value is None else write(value)


def mean(values: Iterable[float]) -> float | None:
    """Return the mean, if there is one."""
    found = list(values)
    return float(np.mean(found)) if found else None


def over_sets(by_set: Sequence[list[Result]], cost: str, of: Callable[[float], float] = float) -> float:
    """Return the mean over the sets of the mean over the seeds."""
    return float(np.mean([np.mean([of(getattr(r.costs, cost)) for r in results]) for results in by_set]))


def costs(runs: Runs) -> list[str]:
    """Return the costs of each method, the mean over the sets; times and memory are those of the reference machine.

    Those of methods that learn are in `steps.json`; those of prompting methods, which search by the clock, in the
    results.
    """
    lines = [
        "| | trainable parameters | stored | a step | memory | a test row | base weights "
        "| perplexity of unrelated text |",
        "|---" * 8 + "|",
    ]
    steps = timed()
    for method in WHOLE:
        by_set = [runs[name][method] for name in SETS if method in runs[name]]
        mine = [r for results in by_set for r in results]
        if not mine:
            continue

        learning = [steps[name][method] for name in SETS if method in steps.get(name, {})]
        searched = [r for r in mine if "pace" in r.settings and method.endswith("-shot")]
        row = mean(t.row for t in learning if t.row) or mean(
            r.costs.prediction_seconds / r.settings["pace"] for r in searched
        )
        peak = mean(t.peak_bytes for t in learning) or mean(r.costs.peak_bytes for r in searched)
        changed = "the same" if all(r.costs.base_unchanged for r in mine) else "others"

        learned, stored = over_sets(by_set, "trainable_parameters"), over_sets(by_set, "stored_bytes")
        # A perplexity is the exponential of a loss, and losses are what has a mean.
        before, after = (np.exp(over_sets(by_set, f"perplexity_{when}", np.log)) for when in ("before", "after"))
        lines.append(
            f"| {method} | {count(round(learned))} | {size(round(stored))} | "
            f"{shown(mean(t.step for t in learning))} | {shown(peak, lambda n: size(round(n)))} | {shown(row)} | "
            f"{changed} | {before:.2f} → {after:.2f} |"
        )
    return lines


def steps_taken(runs: Runs) -> list[str]:
    """Return the number of steps of each run."""
    methods = [m for m in (*WHOLE, *EARLY) if any("max_steps" in r.settings for n in SETS for r in runs[n].get(m, []))]
    lines = ["| | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for name in SETS:
        cells = [", ".join(steps_of(name, r) for r in runs[name].get(method, [])) for method in methods]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def steps_of(name: str, result: Result) -> str:
    """Write the number of steps of a run, for an ensemble of each member; in brackets what it would be today."""
    single = next(method for method in LEARNING if result.method.startswith(method))
    counted = timed()[name][single].length(result.method, result.rows["validation"])["max_steps"]
    steps, members = result.settings["max_steps"], ""
    if isinstance(steps, list):
        members, counted, steps = f"{len(steps)} × ", counted // len(steps), steps[0]
    return f"{members}{steps}" + (f" ({counted})" if steps != counted else "")


def sooner(runs: Runs) -> list[str]:
    """Return the quality after a tenth of the time, and the difference to PEFT as shipped after all of it."""
    there = [name for name in SETS if SHIPPED in runs[name]]
    methods = [m for m in EARLY if any(m in runs[name] for name in there)]
    if not methods:
        return ["Not run yet."]
    lines = ["| | PEFT at its end | " + " | ".join(methods) + " |", "|---" * (len(methods) + 2) + "|"]
    for name in there:
        cells = [f"{points(runs[name][SHIPPED]):.1f}"]
        for method in methods:
            mine = runs[name].get(method)
            less = f": {signed(*differences(runs, method, SHIPPED, [name])[:3])}" if mine else ""
            cells.append(f"{points(mine):.1f}{less}" if mine else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def longer(runs: Runs) -> list[str]:
    """Return the difference of ensembles of whole runs to one run and to LoRA."""
    there = [(name, method) for name in SETS for method in SINGLE if of_several(method) in runs[name]]
    if not there:
        return []
    lines = [
        "## Ensembles of whole runs",
        "",
        "Three seeds' prompts as one: three times the time, where the ensembles above share the time of one run.",
        "",
        "| | | one run | ensemble | difference to one run | difference to LoRA |",
        "|---" * 6 + "|",
    ]
    for method in SINGLE:
        sets, several = [name for name, run in there if run == method], of_several(method)
        for part in [*([name] for name in sets), *([sets] if len(sets) > 1 else [])]:
            less = [signed(*differences(runs, several, other, part)[:3]) for other in (method, "lora")]
            one, together = (np.mean([points(runs[name][m]) for name in part]) for m in (method, several))
            called = part[0] if len(part) == 1 else f"**mean of {len(part)}**"
            lines.append(f"| {called} | {method} | {one:.1f} | {together:.1f} | {less[0]} | {less[1]} |")
    return [*lines, ""]


def matching(runs: Runs) -> str:
    """Return in which runs prior matching was applied."""
    applied = []
    for name in CLASSIFICATION:
        methods = [method for method in WHOLE if any(map(matched, runs[name].get(method, ())))]
        applied += [f"{name} ({', '.join(methods)})"] if methods else []
    return (
        "Prior matching, a bias per label, is applied if it raises validation accuracy by more than one standard error"
        f" ([why](decisions/prior-matching.md)): it was on {', '.join(applied) or 'none of the sets'}."
        f" `{SHIPPED}` runs without calibration."
    )


def starts(runs: Runs) -> list[str]:
    """Return which soft prompts started from words; of an ensemble its first member."""
    methods = [method for method in (*WHOLE, *EARLY) if method.startswith("prompt-tuning")]
    found = [
        f"{method} on {name}"
        for name in CLASSIFICATION
        for method in methods
        if any(r.settings["init"] == "text" for r in runs[name].get(method, ()))
    ]
    why = "Soft prompts start from words where the training rows are too long for a start"
    return [f"{why}: {', '.join(sorted(found))} (of ensembles the first member).", ""] if found else []


def page(runs: Runs) -> str:
    """Return the page."""
    return "\n".join(
        [
            "# Results",
            "",
            "<!-- Written by benchmarks/results_page.py. Do not edit. -->",
            "",
            "SmolLM2-135M-Instruct, at most 1,000 training rows, 200 validation rows, the test rows",
            "for the figures (of banking77 the first 1,000, of e2e the first 300).",
            f"{MINUTES:g} minutes of training or search each on one core of a Zen 5: trained methods take as many",
            "steps as fit into them there (`benchmarks/quality_steps.py` counts them), on whatever machine it runs;",
            "older runs went by the clock (see the steps at the end).",
            "Settings were chosen on validation rows of sst2, banking77 and e2e",
            "([how](../benchmarks/results/choices.md)); the other sets were run with what was chosen. All methods take",
            "the same rows, template, labels and scorer.",
            "",
            mixture(runs),
            "",
            "Run in float32.",
            f"One seed each where the table does not say more. `{SHIPPED}` is PEFT's prompt tuning with the",
            "settings of its own example: 8 virtual tokens from noise, in a plain loop, at its own speed.",
            "",
            matching(runs),
            "",
            *starts(runs),
            "## Quality",
            "",
            "Accuracy in per cent; of e2e BLEU. In brackets the 95 % interval over test rows. The best of a row was",
            "picked on the same test rows, so it looks better than it is: its interval does not allow for that.",
            "",
            *quality(runs),
            "",
            "## Against LoRA",
            "",
            "In points, with the 95 % interval of a paired bootstrap over the test rows.",
            "",
            *compared(runs, "lora", SETS),
            "",
            "## Against few-shot prompts, classification",
            "",
            *compared(runs, "few-shot", CLASSIFICATION),
            "",
            "## Against PEFT's prompt tuning as shipped",
            "",
            *compared(runs, SHIPPED, SETS),
            "",
            "## Time to quality",
            "",
            "Runs of a tenth of the time, which keep their last prompt, against PEFT's prompt tuning after all of it:",
            "the figure, and the difference in points with its 95 % interval.",
            "",
            *sooner(runs),
            "",
            *longer(runs),
            "## Costs",
            "",
            "Means over the sets, on one core of a Zen 4, with times as they would be on a Zen 5 (`REFERENCE` in",
            "`benchmarks/quality.py`). Memory is the peak above the loaded model in training. For trained methods, a",
            "test row is one of the validation rows that pick the prompt. Perplexities are geometric means.",
            "",
            *costs(runs),
            "",
            "Steps that the runs took, seed by seed. In brackets is how many are counted today, where it is another",
            "number: those runs are older, and went by the clock or scored more validation rows than the time allows.",
            "",
            *steps_taken(runs),
            "",
            "## Runs",
            "",
            f"Where each run comes from, seed by seed; {OLDER} is from before prior matching was tried.",
            "",
            *runs_table(runs),
            "",
        ]
    )


if __name__ == "__main__":
    found = load()
    PAGE.write_text(page(found), encoding="utf-8")
    write_headline(found)
