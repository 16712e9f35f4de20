"""Files: written so that a reader never sees half of one, and where softprompt keeps its own.

What is written lies beside its place under a name with `.softprompt-` in it, and is renamed when it is whole. The
writer holds a lock on it that ends with the process, so that the next one knows what a killed one left behind
(`sweep`). Where the system has no such locks, it is left there.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs
from safetensors import SafetensorError

from softprompt.errors import InputError, StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MARK = ".softprompt-"
_ASIDE = re.compile(r"\..+\.softprompt-[0-9a-f]{16}")
# Beside a folder that is replaced: the one before, while the new one is not yet in its place; and once it is.
_BEFORE, _DONE_WITH = "-before", "-done-with"


def home() -> Path:
    """Return the folder for what softprompt keeps between runs; SOFTPROMPT_HOME overrides the usual cache folder."""
    return Path(os.environ.get("SOFTPROMPT_HOME") or platformdirs.user_cache_dir("softprompt"))


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors about a path into one that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"cannot write {path}: {reason}; free some space, or choose another folder") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file and rename it into place; a link to a file stays one, and a device is written to as it is."""
    with storage_errors(path):
        if path.exists() and not path.is_file():  # /dev/stdout, say
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            return
        place = _end_of_links(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        sweep(place.parent, place.name)
        with _aside(place, folder=False) as aside:
            # In JSON lines, half of a surrogate pair becomes an escape, as JSON has it.
            with aside.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(place)


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines and rename it into place."""
    lines = (json.dumps(strict_json(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    write_text(path, "".join(lines))


def strict_json(value: Any) -> Any:
    """Return a value as JSON has it: there is no number beyond all numbers, and none that is not one; they are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: strict_json(item) for key, item in value.items()}
    return [strict_json(item) for item in value] if isinstance(value, list | tuple) else value


def read_json_object(path: Path, cure: str, error_type: type[InputError] = InputError) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        cure: what to do where it is damaged.
        error_type: what is raised.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise error_type(f"cannot read {path}: {error}; {cure}") from error
    if not isinstance(loaded, dict):
        raise error_type(f"{path} is damaged: it must hold a JSON object; {cure}")
    return loaded


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill, and rename it to `path` at the end; a folder that was there is replaced.

    If filling it fails, what was at `path` stays as it was. A link to a folder stays one.
    """
    with storage_errors(path):
        place = _end_of_links(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        sweep(place.parent, place.name)
        with _aside(place, folder=True) as aside:
            yield aside
            # On the disk before the name is: a power cut leaves no half.
            for file in filter(Path.is_file, aside.iterdir()):
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            _put(aside, place)


def _put(aside: Path, place: Path) -> None:
    """Rename a whole folder into place; between the two renames, `sweep` knows what to do."""
    if not place.exists():
        aside.rename(place)
        return
    before = aside.with_name(aside.name + _BEFORE)
    place.rename(before)
    try:
        aside.rename(place)
    except BaseException:
        if not place.exists():
            before.rename(place)
        raise
    with suppress(OSError):  # another process may be sweeping
        gone = aside.with_name(aside.name + _DONE_WITH)
        before.rename(gone)  # half of it is no folder to go back to
        shutil.rmtree(gone)


@contextmanager
def _aside(place: Path, folder: bool) -> Iterator[Path]:
    """Make a file or folder beside a place, and hold it as long as it is filled; where that fails it is removed."""
    while True:
        aside = place.with_name(f".{place.name}{MARK}{secrets.token_hex(8)}")
        if folder:
            aside.mkdir()
        else:
            aside.touch(exist_ok=False)
        held = _hold(aside, wait=True)
        if aside.exists():  # nobody has taken it for one that was left behind, before it was held
            break
        _let_go(held)
    try:
        yield aside
    except BaseException:
        if folder:
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
        raise
    finally:
        _let_go(held)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers left in a folder, and put in place what one had written whole.

    Args:
        folder: where.
        name: what they were writing; None for everything.
    """
    with suppress(OSError):
        found = [entry for entry in folder.iterdir() if MARK in entry.name]
        # First those that a folder before lies beside: they are whole.
        for entry in sorted(found, key=lambda entry: not entry.name.endswith(_BEFORE)):
            aside = entry.with_name(entry.name.removesuffix(_BEFORE).removesuffix(_DONE_WITH))
            if _ASIDE.fullmatch(aside.name) and name in (None, _written(aside)):
                with suppress(OSError):
                    _sweep_one(entry, aside)


def recover(path: Path) -> None:
    """Put a folder in place that a writer was killed over, between moving the old one away and the new one here."""
    with suppress(OSError):
        if not path.name or path.exists():
            return
        for entry in path.parent.glob(f".*{MARK}*{_BEFORE}"):
            aside = entry.with_name(entry.name.removesuffix(_BEFORE))
            if _ASIDE.fullmatch(aside.name) and _written(aside) == path.name:
                _sweep_one(entry, aside)


def _written(aside: Path) -> str:
    """Return the name that a file or folder aside is to have."""
    return aside.name[1:].rpartition(MARK)[0]


def _sweep_one(entry: Path, aside: Path) -> None:
    """Finish what a killed writer did to one folder or file; do nothing where its writer lives."""
    held = _hold(aside if aside.exists() else entry, wait=False)
    if held is None:
        return
    try:
        if entry.name.endswith(_BEFORE):
            place = entry.with_name(_written(aside))
            if not place.exists():
                (aside if aside.exists() else entry).rename(place)
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    finally:
        _let_go(held)


def _hold(path: Path, wait: bool) -> int | None:
    """Lock a file or folder until the process ends or lets go; None where another holds it, or none can be held."""
    if fcntl is None:
        return None
    try:
        held = os.open(path, os.O_RDONLY)
    except OSError:  # it is gone
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        return None
    return held


def _let_go(held: int | None) -> None:
    if held is not None:
        os.close(held)


def _end_of_links(path: Path) -> Path:
    """Return where a link leads to; what is no link is what it is.

    Raises:
        OSError: it leads nowhere: the disk may not be there.
    """
    if not path.is_symlink():
        return path
    try:
        end = path.resolve()
    except RuntimeError as error:  # before Python 3.13, of links in a circle
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from error
    if end.is_symlink() or not end.parent.is_dir():
        raise OSError(errno.ENOENT, f"the link leads to {end}, which is not there")
    return end
