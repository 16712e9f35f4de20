"""Whether one commit is as fast as another: steps and evaluations of both in turn, in one run.

    python benchmarks/commits.py OLD NEW --data FOLDER           # all cases
    python benchmarks/commits.py OLD NEW --data FOLDER A1 E-sst2

Each commit is checked out into a worktree and runs in a process of its own. A process does a piece of work when it is
told to: a step of SmolLM2-135M at the sizes of `training.CASES`, or an evaluation of rows behind a soft prompt. The
first piece is not counted. The ratio is the median of NEW's time over OLD's, turn by turn. The exit code is 1 where it
is over 1.05. FOLDER is that of `speed.py`. Both are asked by the public names of the package alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from worktrees import checked_out

ALLOWED = 1.05
# Rows, and the settings of a run: the examples of a step, and the virtual tokens.
TRAINING = {"A1": ("sst2/train.jsonl", 32, 20), "D": ("e2e/train.jsonl", 32, 20)}
EVALUATION = {"E-sst2": "sst2/validation.jsonl[:100]", "E-banking77": "banking77/test.jsonl[:32]"}


def main() -> None:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs=2, metavar=("OLD", "NEW"), help="as git names them")
    parser.add_argument("cases", nargs="*", choices=[*TRAINING, *EVALUATION, []], help="default: all")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the data sets")
    parser.add_argument("--turns", type=int, default=5, help="that are counted, of each commit")
    parser.add_argument("--work", choices=[*TRAINING, *EVALUATION], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work, given.data)
        return
    slower = False
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = zip(("old", "new"), given.commits, strict=True)
        trees = [stack.enter_context(checked_out(commit, scratch / side)) for side, commit in sides]
        for case in given.cases or [*TRAINING, *EVALUATION]:
            turns = in_turn([start(tree, case, given.data) for tree in trees], 1 + given.turns)[1:]
            old, new = zip(*turns, strict=True)
            ratio = statistics.median(n / o for o, n in turns)
            slower |= ratio > ALLOWED
            print(
                f"{case}: {statistics.median(old):.3f} s, {statistics.median(new):.3f} s, ratio {ratio:.3f}", flush=True
            )
    sys.exit(int(slower))


def start(tree: Path, case: str, data: Path) -> subprocess.Popen[str]:
    """Start the process that does a case's work with the source of a worktree."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    command = [sys.executable, str(Path(__file__).resolve()), "-", "-", "--work", case, "--data", str(data)]
    return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def in_turn(processes: list[subprocess.Popen[str]], turns: int) -> list[list[float]]:
    """Let processes do a piece of work each in turn, and return the seconds that it took, `[turns][processes]`."""
    found = []
    try:
        for _ in range(turns):
            found.append([_piece(process) for process in processes])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return found


def _piece(process: subprocess.Popen[str]) -> float:
    """Let a process do one piece of work, and return its seconds."""
    assert process.stdin is not None and process.stdout is not None
    print("go", file=process.stdin, flush=True)
    seconds = process.stdout.readline()
    if not seconds:
        raise SystemExit("a process ended before its time; what it printed is above")
    return float(seconds)


def work(case: str, data: Path) -> None:
    """Do pieces of a case's work, one whenever a line comes in."""
    import softprompt as sp

    model = sp.load_model()
    if case in TRAINING:
        _train(sp, model, case, data)
    else:
        rows = sp.load_data(f"{data}/{EVALUATION[case]}")
        config = sp.TuneConfig(max_steps=1, num_virtual_tokens=20, eval_rows=0)
        prompt = sp.tune(model, rows, config).prompt
        while _told_to_go():
            _timed(lambda: sp.evaluate(model, rows, prompt))


def _train(sp: Any, model: Any, case: str, data: Path) -> None:
    """Take steps, each when it is its turn; a callback waits after each of them."""
    file, batch_size, virtual = TRAINING[case]
    base = getattr(sp, "Callback", None) or sp.Watcher
    name = "callback" if hasattr(sp, "Callback") else "watcher"

    class Waits(base):  # type: ignore[misc, valid-type]
        """Lets the next step begin when it is told to, and says how long it took."""

        def begin(self, *_: object) -> None:
            self.next()

        def step(self, *_: object) -> None:
            print(json.dumps(time.perf_counter() - self.began), flush=True)
            self.next()

        def next(self) -> None:
            if not _told_to_go():
                sys.exit()
            self.began = time.perf_counter()

    config = sp.TuneConfig(
        num_virtual_tokens=virtual, batch_size=batch_size, max_steps=1000, eval_rows=0, train_rows=5000
    )
    sp.tune(model, sp.load_data(data / file), config, **{name: Waits()})


def _told_to_go() -> bool:
    return bool(sys.stdin.readline())


def _timed(piece: Callable[[], object]) -> None:
    began = time.perf_counter()
    piece()
    print(json.dumps(time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
