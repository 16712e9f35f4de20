"""stdout and stderr: whatever their encoding, all that is printed gets there; what cannot be written is said."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from softprompt.errors import StorageError

# What is wrong with a stream, where no file is named.
_UNWRITABLE = {errno.ENOSPC, errno.EBADF, errno.EIO, errno.EFBIG, errno.EDQUOT}


@contextmanager
def usable_streams() -> Iterator[None]:
    """Let nothing fail for a stream's encoding: a character that it lacks is written as its escape.

    A reader that has gone, `lm_head` say, has seen enough: that is no error.

    Raises:
        StorageError: stdout cannot be written to, for a full disk say.
    """
    if sys.stdout is None:  # closed by who started this; writing to it fails, as it does where that is noticed later
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - it stays open
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()  # while there is somebody to tell that it fails
    except (SystemExit, BrokenPipeError):  # click's, where the reader has gone, and everybody else's
        pass
    except OSError as error:
        if error.filename is not None or error.errno not in _UNWRITABLE:
            raise
        raise StorageError(f"cannot write to stdout: {error.strerror or error}") from error
    finally:
        _give_up()


def _give_up() -> None:
    """Write what is left; where that fails, let Python not complain of it once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


def is_unicode(stream: object) -> bool:
    """Tell whether a stream can carry every character."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("_", "-").startswith("utf")
