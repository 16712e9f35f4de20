"""Folders that one command at a time may work in. The lock is the system's: it ends with the process that holds it."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from softprompt.errors import InputError
from softprompt.storage import storage_errors

LOCK = ".lock"  # in the folder, while a command works in it, or after one was killed
# What file systems say that have no locks, some of the network's for one.
_NONE = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other commands out of a folder; one that is not there is made, and goes again if nothing was put into it.

    Raises:
        InputError: another command works in it.
        StorageError: it cannot be written to.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(folder)
    try:
        yield
    finally:
        if lock is not None:
            (folder / LOCK).unlink(missing_ok=True)  # before another one can hold it
            lock.release()
        with suppress(OSError):  # one is not empty
            for each in missing:
                each.rmdir()


def require_free(folder: Path) -> None:
    """Make sure that no other command works in a folder; nothing is written.

    Raises:
        InputError: one does.
    """
    if (folder / LOCK).is_file():  # it is there only while the lock is held, or after a kill
        lock = _acquire(folder)
        if lock is not None:
            lock.release()


def _acquire(folder: Path) -> FileLock | None:
    """Return the lock of a folder, held; None where the file system has no locks."""
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"another command is at work in {folder}; wait until it has ended, or give another folder"
        ) from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NONE:
            raise
        warnings.warn(
            f"{folder} is on a file system without locks; see that no other command writes to it", stacklevel=4
        )
        return None
    return lock
