"""How the time of a step grows with virtual tokens, text length, batch and rows, and how memory grows with rows.

    python benchmarks/growth.py             # everything: results/growth.jsonl, results/growth.md, docs/growth.png
    python benchmarks/growth.py batch rows  # some

SmolLM2-135M on made-up rows, so no data set is needed. The points of a series are measured in turn, several times, and
the median counts. Each number of rows is a JSONL file that a process of its own reads, splits and takes steps on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

import softprompt as sp
from sides import Softprompt
from softprompt.data.example import Example
from softprompt.data.lazy_examples import LengthStats
from softprompt.training.prepare import prepare_data, prepare_run
from softprompt.training.run_folder import environment
from training import resident

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
PLOT = Path(__file__).parents[1] / "docs" / "growth.png"
WORDS = "a film that is dull fine slow clever long sad warm cold loud bright of the and with no every"


@dataclass(frozen=True)
class Point:
    """The sizes of a step."""

    virtual_tokens: int = 20
    length: int = 32
    batch: int = 16


@dataclass(frozen=True)
class Series:
    """One thing that grows, the rest being what `Point` says."""

    axis: str
    values: tuple[int, ...]
    point: Callable[[int], Point]


SERIES = {
    "virtual tokens": Series("virtual tokens", (1, 25, 50, 100, 150, 200), lambda n: Point(virtual_tokens=n)),
    "length": Series("tokens a text (4 texts)", (16, 64, 128, 256, 512, 1024), lambda n: Point(length=n, batch=4)),
    "batch": Series("texts a step (32 tokens each)", (1, 4, 16, 64, 128, 256), lambda n: Point(batch=n)),
}
ROWS = (100, 1_000, 10_000, 100_000, 1_000_000)


def grow(name: str, model: sp.FrozenModel, repeats: int) -> dict[str, Any]:
    """Return the median seconds of a step at each point of a series."""
    series = SERIES[name]
    seconds: dict[int, list[float]] = {value: [] for value in series.values}
    with tempfile.TemporaryDirectory() as folder:
        sides = {value: side(model, series.point(value), Path(folder) / str(value)) for value in series.values}
        for turn in range(1 + repeats):  # the first warms up
            for value in random.Random(turn).sample(series.values, len(series.values)):
                began = time.perf_counter()
                sides[value].step([])
                if turn:
                    seconds[value].append(time.perf_counter() - began)
    medians = [statistics.median(seconds[value]) for value in series.values]
    return {
        "axis": series.axis,
        "values": series.values,
        "seconds": medians,
        "off_line": off_line(series.values, medians),
    }


def side(model: sp.FrozenModel, point: Point, scratch: Path) -> Softprompt:
    """Return a trainer whose batches have the given size."""
    rows = sp.load_data([{"text": "a fine film", "label": "good"}, {"text": "a dull film", "label": "bad"}] * 5)
    settings = sp.TuneConfig(num_virtual_tokens=point.virtual_tokens, batch_size=point.batch, eval_rows=0)
    ids = torch.randint(1000, 40_000, (point.batch, point.length), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [Example(tuple(row), point.length - 1) for row in ids]
    prepared = replace(
        prepare_run(prepare_data(model, rows, settings), settings),
        examples=examples,
        length_stats=LengthStats.of(examples),
    )
    scratch.mkdir()
    return Softprompt(model, prepared, scratch)


def off_line(values: tuple[int, ...], seconds: list[float]) -> float:
    """Return the largest distance of a point from the least-squares line, as a share of the last point."""
    line = np.polyfit(values, seconds, 1)
    return float(np.abs(np.polyval(line, values) - seconds).max() / seconds[-1])


def grow_rows(repeats: int) -> dict[str, Any]:
    """Return, for each number of rows, the seconds until the first step, those of a step, and the peak of memory."""
    found: dict[str, list[float]] = {"seconds": [], "start": [], "gigabytes": [], "file_gigabytes": []}
    for count in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            write_rows(file, count)
            command = [sys.executable, __file__, "--of", str(file), "--repeats", str(repeats)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            one = json.loads(done.stdout.splitlines()[-1])
            found["file_gigabytes"].append(file.stat().st_size / 1e9)
        for name, value in one.items():
            found[name].append(value)
    return {"axis": "rows of the file (16 a step)", "values": ROWS, **found}


def write_rows(file: Path, count: int) -> None:
    """Write labelled rows of eight to thirty words each."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        for _ in range(count):
            text = " ".join(draw.choices(WORDS.split(), k=draw.randrange(8, 31)))
            out.write(json.dumps({"text": text, "label": draw.choice(("good", "bad"))}) + "\n")


def of_rows(file: str, repeats: int) -> dict[str, float]:
    """Read, split and step in this process; memory is the peak above the loaded model."""
    model = sp.load_model()
    steps = 1 + 3 * repeats
    loaded = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    began = time.perf_counter()
    settings = sp.TuneConfig(num_virtual_tokens=20, max_steps=steps)
    prepared = prepare_run(prepare_data(model, sp.load_data(file), settings), settings)
    started = time.perf_counter() - began
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        loop = Softprompt(model, prepared, Path(folder))
        for _ in range(steps):
            began = time.perf_counter()
            loop.step([])
            seconds.append(time.perf_counter() - began)
    gigabytes = (resident("VmHWM") - loaded) / 1e9
    return {"seconds": statistics.median(seconds[1:]), "start": started, "gigabytes": gigabytes}


def draw_plot(records: dict[str, dict[str, Any]]) -> None:
    """Draw one panel per series."""
    figure, panels = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    for panel, (name, record) in zip(panels.flat, records.items(), strict=False):
        values, seconds = record["values"], record["seconds"]
        panel.plot(values, seconds, "o", color="#1f5fa8")
        panel.set_xlabel(record["axis"])
        panel.set_ylabel("seconds a step")
        panel.set_ylim(0, 1.15 * max(seconds))
        if name == "rows":
            panel.set_xscale("log")
            memory = panel.twinx()
            memory.plot(values, record["gigabytes"], "s", color="#c4572b")
            memory.plot(values, record["file_gigabytes"], ":", color="#c4572b", label="the file")
            memory.set_ylabel("peak above the model, GB", color="#c4572b")
            memory.set_ylim(0, 1.3 * max(record["gigabytes"]))
        else:
            panel.plot(values, np.polyval(np.polyfit(values, seconds, 1), values), color="#1f5fa8", alpha=0.4)
    figure.savefig(PLOT, dpi=110)


def table(records: dict[str, dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Growth",
        "",
        "Made by `benchmarks/growth.py`, which says how. SmolLM2-135M; the plot is `docs/growth.png`.",
    ]
    for name, record in records.items():
        lines += ["", f"## {name}", ""]
        columns = [("seconds a step", "seconds", 2)]
        if name == "rows":
            columns += [("until the first step, s", "start", 1), ("peak above the model, GB", "gigabytes", 2)]
        else:
            lines += [f"At most {record['off_line']:.0%} of the last value away from a straight line.", ""]
        lines += [f"| {record['axis']} | " + " | ".join(title for title, _, _ in columns) + " |"]
        lines += ["|---" * (1 + len(columns)) + "|"]
        for i, value in enumerate(record["values"]):
            lines.append(f"| {value:,} | " + " | ".join(f"{record[key][i]:.{d}f}" for _, key, d in columns) + " |")
    last = max(records.values(), key=lambda r: str(r["date"]))
    versions = ", ".join(f"{name} {version}" for name, version in last["environment"].items())
    lines += ["", f"{last['date']}, {last['cores']} cores; {versions}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the requested series."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", nargs="*", choices=[*SERIES, "rows", []], help="default: all")
    parser.add_argument("--repeats", type=int, default=3, help="of each point")
    parser.add_argument("--of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    disable_progress_bar()
    if options.of:
        print(json.dumps(of_rows(options.of, options.repeats)))
        return
    file = RESULTS / "growth.jsonl"
    records = {r["series"]: r for r in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    for name in options.series or [*SERIES, "rows"]:
        made = grow_rows(options.repeats) if name == "rows" else grow(name, sp.load_model(), options.repeats)
        about = {"cores": os.cpu_count(), "date": date.today().isoformat(), "environment": environment()}
        records[name] = {"series": name, **made, **about}
        file.write_text("".join(json.dumps(r) + "\n" for r in records.values()))
        (RESULTS / "growth.md").write_text(table(records))
        draw_plot(records)
        print(json.dumps(records[name]), flush=True)


if __name__ == "__main__":
    main()
