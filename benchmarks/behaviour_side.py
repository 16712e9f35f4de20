"""One side: runs `softprompt` in the current folder, and keeps what it prints.

It knows the command's contract and nothing of what is inside.
"""

from __future__ import annotations

import io
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

INPUTS = Path("../../inputs")  # from the folder that a part runs in
PLACE = ("--set", "threads=1", "--set", "device=cpu")
CUT = ("--set", "micro_batch_tokens=96")
SHORT = ("--set", "max_steps=6", "--set", "eval_every=3", "--set", "batch_size=4", "--set", "num_virtual_tokens=5")
_COMMAND = (sys.executable, "-c", "from softprompt.cli.main import main; main()")
_LONGEST = 120.0  # seconds that a run is waited for until it has done some steps


@dataclass(frozen=True)
class Call:
    """A command that was run, and what it gave."""

    name: str
    arguments: list[str]
    code: int
    out: str
    err: str


class Side:
    """Runs commands in the current folder, and keeps what they print.

    Args:
        new_names: whether this side calls its methods by the new names.
    """

    def __init__(self, new_names: bool) -> None:
        self.methods = {
            "soft": "prompt-tuning" if new_names else "soft-prompt",
            "deep": "prefix-tuning" if new_names else "deep-prefix",
        }
        self.calls: list[Call] = []

    def call(self, name: str, *arguments: str | Path, stdin: str = "", progress: bool = True) -> None:
        """Run `softprompt` in this process; its stderr is kept where its progress is the same each time."""
        from softprompt.cli.main import main

        given = [str(argument) for argument in arguments]
        out, err = io.StringIO(), io.StringIO()
        warnings.simplefilter("default", append=True)  # forgets which warnings were shown before
        with redirect_stdout(out), redirect_stderr(err), mock.patch("sys.stdin", io.StringIO(stdin)):
            code = _exit_code(lambda: main(given))
        self.calls.append(Call(name, given, code, out.getvalue(), err.getvalue() * progress))

    def tune(self, name: str, model: str, data: str, *more: str) -> str:
        """Learn a prompt in a few steps, into the folder `name`; return the prompt's folder."""
        where = ("tune", INPUTS / data, "--model", INPUTS / model, "--out", name, "--json")
        self.call(f"tune {name}", *where, *PLACE, *CUT, *SHORT, *more)
        return f"{name}/prompt"

    def method(self, short: str) -> tuple[str, str]:
        """Return the option that chooses a method."""
        return "--set", f"method={self.methods[short]}"

    def stop(self, name: str, number: int, lines: int, *arguments: str | Path) -> None:
        """Run `softprompt tune` in a process of its own, and stop it by a signal once it has logged some lines."""
        out = Path(arguments[arguments.index("--out") + 1])
        process = subprocess.Popen(
            [*_COMMAND, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        began = time.monotonic()
        while process.poll() is None and _logged(out) < lines and time.monotonic() - began < _LONGEST:
            time.sleep(0.002)
        process.send_signal(number)
        self.calls.append(Call(name, list(map(str, arguments)), process.wait(), "", ""))

    def launch(self, name: str, count: int, *arguments: str | Path) -> None:
        """Run `softprompt` in several processes, as torchrun starts them."""
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}")
        given = [str(argument) for argument in arguments]
        done = subprocess.run([*launcher, "-m", "softprompt", *given], capture_output=True, text=True, check=False)
        self.calls.append(Call(name, given, done.returncode, done.stdout, ""))

    def note(self, name: str, holds: bool) -> None:
        """Keep whether something holds, as the exit code of a call."""
        self.calls.append(Call(name, [], int(not holds), "", ""))


def _exit_code(run: Callable[[], None]) -> int:
    try:
        run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # whatever the command lets through is a finding
        traceback.print_exc()
        return -1
    return 0


def _logged(run: Path) -> int:
    """Count the lines that a run, or the runs of an ensemble, have logged."""
    files = (run / "metrics.jsonl", *run.glob("*/metrics.jsonl"))
    return sum(file.read_bytes().count(b"\n") for file in files if file.exists())
