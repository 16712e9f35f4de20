"""The origin of the quality benchmark's runs: which machine, and before or after prior matching.

It is read from the result files: environment, settings and dates.
"""

from __future__ import annotations

from collections.abc import Sequence

from quality import ORDER, SETS, SHIPPED
from softprompt.comparison.results import Result

OLDER, ON_GPU = "†", "‡"
Runs = dict[str, dict[str, list[Result]]]  # by set, by method


def machine(result: Result) -> str:
    """Return the machine and the versions of a run."""
    keys = ("gpu", "processor", "torch", "transformers")
    there = {key: result.environment[key] for key in keys if key in result.environment}
    return ", ".join(value if key in keys[:2] else f"{key} {value}" for key, value in there.items())


def every(runs: Runs) -> list[Result]:
    """Return all runs, without ensembles of several."""
    return [r for by_method in runs.values() for method in ORDER for r in by_method.get(method, [])]


def machines(runs: Runs, gpu: bool) -> list[str]:
    """Return the machines of all runs, with a GPU or without."""
    return sorted({machine(r) for r in every(runs) if ("gpu" in r.environment) == gpu})


def matched(result: Result) -> bool | None:
    """Tell whether prior matching was applied; None where it was not tried.

    It is for labels, and PEFT's prompt tuning as shipped does not use it.
    """
    if result.task != "classification" or result.method == SHIPPED:
        return None
    return result.settings.get("prior_matching")


def is_older(result: Result) -> bool:
    """Tell whether a run is from before prior matching, though its method tries it today."""
    return result.task == "classification" and result.method != SHIPPED and matched(result) is None


def marks(results: Sequence[Result]) -> str:
    """Return the marks beside the mean of some runs."""
    return OLDER * any(map(is_older, results)) + ON_GPU * any("gpu" in r.environment for r in results)


def mixture(runs: Runs) -> str:
    """Return what the marks mean, and how many runs have them."""
    found = every(runs)
    tried = [r for r in found if matched(r) is not None]
    older, gpu = sum(map(is_older, found)), sum("gpu" in r.environment for r in found)
    days = sorted(r.date[:10] for r in found)
    return (
        f"The tables mix {len(found)} runs from {days[0]} to {days[-1]}, of different versions of the program and of"
        f" different machines. {OLDER}: one run at least is from before prior matching was tried"
        f" ({older} runs; of the {len(tried)} that tried it, {sum(map(bool, map(matched, tried)))} kept it)."
        f" {ON_GPU}: one run at least was made on a GPU ({gpu} runs; {'; '.join(machines(runs, gpu=True))}); all others"
        f" on a CPU ({'; '.join(machines(runs, gpu=False))}). Where two figures have unlike marks, their difference can"
        " come from that, too."
    )


def runs_table(runs: Runs) -> list[str]:
    """Return a table of the origin of every run."""
    methods = [m for m in ORDER if any(m in runs[name] for name in SETS)]
    lines = ["| | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for name in SETS:
        cells = [", ".join(map(_origin, runs[name].get(method, []))) for method in methods]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _origin(result: Result) -> str:
    return f"{'GPU' if 'gpu' in result.environment else 'CPU'}{OLDER * is_older(result)}"
