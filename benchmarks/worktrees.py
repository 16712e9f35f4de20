"""A commit of this repository, checked out beside it for as long as it is needed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def git(*arguments: str) -> str:
    """Run git in this repository, and return what it prints."""
    done = subprocess.run(["git", "-C", str(_HERE), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@contextmanager
def checked_out(commit: str, path: Path) -> Iterator[Path]:
    """Check a commit out into a new worktree at `path`, and remove it at the end."""
    git("worktree", "add", "--quiet", "--detach", str(path), commit)
    try:
        yield path
    finally:
        git("worktree", "remove", "--force", str(path))
