"""The time of a run from the command to its first step.

The file is also the program that is timed, so it imports nothing but what `softprompt tune` does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from softprompt.model.bundled import BUNDLED, fetch


def measure(data: Path, repeats: int) -> dict[str, Any]:
    """Time a run from the command to the end of its first step; the bundled model is converted already."""
    fetch(BUNDLED["smollm2-135m"])
    runs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            began = time.time()
            command = [sys.executable, __file__, f"{data}/sst2/train.jsonl", f"{folder}/run"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        moments = json.loads(done.stdout.splitlines()[-1])
        before, phases = began, {}
        for name, moment in moments.items():
            phases[name], before = round(moment - before, 2), moment
        runs.append({**phases, "in all": round(before - began, 2)})
    return {"seconds": {name: [run[name] for run in runs] for name in runs[0]}}


def first_step(rows: str, out: str) -> None:
    """Run `softprompt tune` in this process, for one step, and print when each phase was over."""
    moments: dict[str, float] = {}

    from softprompt.cli import progress, tune
    from softprompt.training import tune as training

    moments["imports"] = time.time()
    del training

    class Told(progress.TerminalCallback):
        def begin(self, prepared: Any, step: int) -> None:
            moments["model, rows, settings"] = time.time()

        def evaluation(self, step: int, values: dict[str, float]) -> None:
            moments.setdefault("first evaluation", time.time())

        def step(self, step: int, loss: float) -> None:
            moments["first step"] = time.time()

        def end(self) -> None:
            pass

    progress.TerminalCallback = Told  # type: ignore[misc]
    tune.tune([rows, "--out", out, "--set", "max_steps=1"], standalone_mode=False)
    print(json.dumps(moments))


if __name__ == "__main__":
    first_step(*sys.argv[1:])
