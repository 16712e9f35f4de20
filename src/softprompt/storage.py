"""Files and folders: atomic writes, locks, and the home folder of softprompt.

A file or folder is written beside its destination, under a temporary name with `.softprompt-` in it, and renamed when
it is complete. Its writer holds a lock on it that ends with the process, so `clean_up` recognizes what a killed writer
left. On systems without such locks (Windows) leftovers stay.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from softprompt.errors import InputError, StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY_MARK = ".softprompt-"
_TEMPORARY_NAME = re.compile(r"\..+\.softprompt-[0-9a-f]{16}")
# A folder that is being replaced is renamed with the first ending, and with the second once it has been replaced.
_REPLACED, _TO_DELETE = "-before", "-done-with"
LOCK_FILE = ".lock"  # in a folder, while a command works in it, or after one was killed
# Errors of file systems without locks, some network file systems for example.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


def home() -> Path:
    """Return the folder of bundled models and registered prompts: SOFTPROMPT_HOME, or else in the user's cache."""
    return Path(os.environ.get("SOFTPROMPT_HOME") or platformdirs.user_cache_dir("softprompt"))


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Raise the operating system's errors about a path as a StorageError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"cannot write {path}: {reason}; free some space, or choose another folder") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. A link to a file stays a link; a device is written to directly."""
    with storage_errors(path):
        if path.exists() and not path.is_file():  # /dev/stdout, say
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            return
        with _create_temporary(path, folder=False) as (temporary, destination):
            # In JSON lines, half of a surrogate pair becomes an escape, as JSON has it.
            with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(destination)


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines atomically."""
    lines = (json.dumps(strict_json(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    write_text(path, "".join(lines))


def strict_json(value: Any) -> Any:
    """Return a value with null for every number that is not finite: JSON has no infinity and no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: strict_json(item) for key, item in value.items()}
    return [strict_json(item) for item in value] if isinstance(value, list | tuple) else value


def read_json_object(path: Path, cure: str, error_type: type[InputError] = InputError) -> dict[str, Any]:
    """Read a file that holds one JSON object; an error of `error_type` says the cure if it is damaged."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise error_type(f"cannot read {path}: {error}; {cure}") from error
    if not isinstance(loaded, dict):
        raise error_type(f"{path} is damaged: it must hold a JSON object; {cure}")
    return loaded


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Write a folder atomically: yield an empty one to fill, which replaces `path` at the end.

    If filling it fails, `path` stays as it was. A link to a folder stays a link.
    """
    with storage_errors(path), _create_temporary(path, folder=True) as (temporary, destination):
        yield temporary
        # Sync before the rename: after a power cut the folder is complete or absent.
        for file in filter(Path.is_file, temporary.iterdir()):
            with file.open("rb") as written:
                os.fsync(written.fileno())
        _rename_into_place(temporary, destination)


def _rename_into_place(temporary: Path, destination: Path) -> None:
    """Rename a complete folder into place. If it is killed between the two renames, `clean_up` finishes."""
    if not destination.exists():
        temporary.rename(destination)
        return
    before = temporary.with_name(temporary.name + _REPLACED)
    destination.rename(before)
    try:
        temporary.rename(destination)
    except BaseException:
        if not destination.exists():
            before.rename(destination)
        raise
    with suppress(OSError):  # another process may be cleaning up
        gone = temporary.with_name(temporary.name + _TO_DELETE)
        before.rename(gone)  # a partly deleted folder must not be restored
        shutil.rmtree(gone)


@contextmanager
def _create_temporary(path: Path, folder: bool) -> Iterator[tuple[Path, Path]]:
    """Yield a temporary file or folder, locked while it is filled and removed on failure, and its destination."""
    destination = _link_target(path)
    destination.parent.mkdir(parents=True, exist_ok=True)
    clean_up(destination.parent, destination.name)
    while True:
        temporary = destination.with_name(f".{destination.name}{TEMPORARY_MARK}{secrets.token_hex(8)}")
        if folder:
            temporary.mkdir()
        else:
            temporary.touch(exist_ok=False)
        lock = _lock(temporary, wait=True)
        if temporary.exists():  # no other process has removed it as a leftover before it was locked
            break
        _unlock(lock)
    try:
        yield temporary, destination
    except BaseException:
        _remove(temporary)
        raise
    finally:
        _unlock(lock)


def _remove(path: Path) -> None:
    """Remove a file or folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def clean_up(folder: Path, name: str | None = None, replaced_only: bool = False) -> None:
    """Remove what killed writers of `name` (None: of anything) left in a folder, and rename what they had completed."""
    with suppress(OSError):
        ending = _REPLACED if replaced_only else ""
        found = [entry for entry in folder.iterdir() if TEMPORARY_MARK in entry.name and entry.name.endswith(ending)]
        # First those with a replaced folder beside them: they are complete.
        for entry in sorted(found, key=lambda entry: not entry.name.endswith(_REPLACED)):
            temporary = entry.with_name(entry.name.removesuffix(_REPLACED).removesuffix(_TO_DELETE))
            if _TEMPORARY_NAME.fullmatch(temporary.name) and name in (None, _destination_name(temporary)):
                with suppress(OSError):
                    _clean_up_one(entry, temporary)


def recover(path: Path) -> None:
    """Restore a folder whose writer was killed between the two renames of a replacement."""
    with suppress(OSError):
        if path.name and not path.exists():
            clean_up(path.parent, path.name, replaced_only=True)


def _destination_name(temporary: Path) -> str:
    """Return the name of the destination of a temporary file or folder."""
    return temporary.name[1:].rpartition(TEMPORARY_MARK)[0]


def _clean_up_one(entry: Path, temporary: Path) -> None:
    """Finish or remove one leftover; do nothing if its writer is alive."""
    lock = _lock(temporary if temporary.exists() else entry, wait=False)
    if lock is None:
        return
    try:
        if entry.name.endswith(_REPLACED):
            destination = entry.with_name(_destination_name(temporary))
            if not destination.exists():
                (temporary if temporary.exists() else entry).rename(destination)
        _remove(entry)
    finally:
        _unlock(lock)


def _lock(path: Path, wait: bool) -> int | None:
    """Lock a file or folder until `_unlock` or the end of the process; None if it is locked, or cannot be."""
    if fcntl is None:
        return None
    try:
        lock = os.open(path, os.O_RDONLY)
    except OSError:  # it is gone
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _link_target(path: Path) -> Path:
    """Return the target of a link, which must exist (its disk may not be mounted); any other path unchanged."""
    if not path.is_symlink():
        return path
    try:
        end = path.resolve()
    except RuntimeError as error:  # of links in a circle, before Python 3.13
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from error
    if end.is_symlink() or not end.parent.is_dir():
        raise OSError(errno.ENOENT, f"the link leads to {end}, which is not there")
    return end


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder against other commands. It is created if needed, and removed again if nothing is written to it.

    The lock is the system's: it ends with the process that holds it.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(folder)
    try:
        yield
    finally:
        if lock is not None:
            (folder / LOCK_FILE).unlink(missing_ok=True)  # before another process can acquire it
            lock.release()
        with suppress(OSError):  # it is not empty
            for each in missing:
                each.rmdir()


def require_unlocked(folder: Path) -> None:
    """Make sure that no other command works in a folder; write nothing."""
    if (folder / LOCK_FILE).is_file():  # it exists only while it is locked, or after a kill
        lock = _acquire(folder)
        if lock is not None:
            lock.release()


def _acquire(folder: Path) -> FileLock | None:
    """Acquire the lock of a folder; None if the file system has no locks."""
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"another command is at work in {folder}; wait until it has ended, or give another folder"
        ) from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"{folder} is on a file system without locks; make sure that no other command writes to it", stacklevel=4
        )
        return None
    return lock
