"""The registry: prompts by name, each in numbered versions, in a folder of the user's."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from softprompt.errors import PromptError, nearest
from softprompt.prompt.layout import ADAPTER, ENSEMBLE
from softprompt.storage import home, recover, storage_errors, write_text

if TYPE_CHECKING:
    from softprompt.prompt.ensemble import Prompt

NO_PROMPT = "none"  # in place of a prompt's name: the base model
_HIGHEST = "highest"  # a file: the newest version when one was removed, so that no number is used twice
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def registry_folder() -> Path:
    """Return where prompts are registered: `prompts` in the folder that SOFTPROMPT_HOME moves."""
    return home() / "prompts"


def names() -> list[str]:
    """Return the registered names, sorted."""
    folder = registry_folder()
    return sorted(p.name for p in folder.iterdir() if versions(p.name)) if folder.is_dir() else []


def versions(name: str) -> list[int]:
    """Return the versions of a name, the oldest first."""
    folder = registry_folder() / name
    found = [p.name for p in folder.iterdir() if p.is_dir()] if _NAME.fullmatch(name) and folder.is_dir() else []
    return sorted(int(version) for version in found if _VERSION.fullmatch(version))


def new_version(name: str) -> Path:
    """Return the folder of a name's next version; it does not exist yet.

    Raises:
        PromptError: the name is not allowed.
    """
    if not _NAME.fullmatch(name):
        raise PromptError(f"{name!r} is no name for a prompt; allowed are letters, digits and . _ - (not at the start)")
    if name == NO_PROMPT:
        raise PromptError(f"{name!r} stands for the base model; give the prompt another name")
    return registry_folder() / name / str(_highest(name) + 1)


def _highest(name: str) -> int:
    """Return the highest version that a name ever had."""
    file = registry_folder() / name / _HIGHEST
    removed = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
    return max([*versions(name), int(removed) if _VERSION.fullmatch(removed) else 0])


def find(prompt: str | Path) -> Path:
    """Return the folder of a prompt.

    Args:
        prompt: a folder, `NAME` (its newest version) or `NAME@VERSION`. A folder wins over a registered name, unless it
            holds no prompt.
    """
    path = Path(prompt)
    name, at, version = str(prompt).partition("@")
    registered = versions(name)
    recover(path)
    try:
        if path.is_dir() and (not registered or any((path / file).exists() for file in (ADAPTER, ENSEMBLE))):
            return path
    except OSError:  # a name that no folder can have
        pass
    if not registered:
        raise PromptError(
            f"no such prompt: {prompt}{nearest(name, names())}; give the folder of one, such as RUN/prompt, or a name "
            "that softprompt prompts list shows"
        )
    if at and version not in map(str, registered):
        raise PromptError(f"{name} has no version {version!r}; there is {', '.join(map(str, registered))}")
    return registry_folder() / name / (version if at else str(registered[-1]))


def register(prompt: Prompt, name: str) -> str:
    """Save a prompt as the next version of a name; return `NAME@VERSION`.

    Raises:
        PromptError: the name is not allowed.
        StorageError: the folder cannot be written.
    """
    with _lock(new_version(name)):
        folder = prompt.save(new_version(name))
    return f"{name}@{folder.name}"


def matching(prompt: str) -> list[str]:
    """Return the versions that `NAME` (all of them) or `NAME@VERSION` means, as `NAME@VERSION`."""
    name, at, version = prompt.partition("@")
    registered = [str(number) for number in versions(name)]
    found = [number for number in registered if not at or number == version]
    if not found:
        raise PromptError(
            f"no such registered prompt: {prompt}{nearest(name, names())}; softprompt prompts list shows all"
        )
    return [f"{name}@{number}" for number in found]


def remove(registered: Iterable[str]) -> None:
    """Remove versions, each given as `NAME@VERSION`; their numbers are not used again.

    Raises:
        StorageError: one cannot be removed.
    """
    with _lock(registry_folder()):
        for prompt in registered:
            name, _, version = prompt.partition("@")
            folder = registry_folder() / name / version  # not a folder of the same name in the working directory
            write_text(folder.parent / _HIGHEST, f"{_highest(name)}\n")
            with storage_errors(folder):
                shutil.rmtree(folder)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keep other processes from changing the registry: two at a time would use one number twice."""
    with storage_errors(folder):
        home().mkdir(parents=True, exist_ok=True)
        lock = FileLock(home() / ".prompts.lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
