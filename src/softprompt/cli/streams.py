"""stdout and stderr: printing works in any encoding; a failed write is reported."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from softprompt.errors import StorageError

# Errors of a stream, if the error names no file.
_STREAM_ERRORS = {errno.ENOSPC, errno.EBADF, errno.EIO, errno.EFBIG, errno.EDQUOT}


@contextmanager
def usable_streams() -> Iterator[None]:
    """Write what a stream's encoding lacks as escapes; end quietly if the reader of a pipe is gone (`head`)."""
    if sys.stdout is None:  # the parent closed it; writing to this one fails
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - it stays open
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()  # here a failure can still be reported
    except (SystemExit, BrokenPipeError):  # the reader is gone: click's error, and Python's
        pass
    except OSError as error:
        if error.filename is not None or error.errno not in _STREAM_ERRORS:
            raise
        raise StorageError(f"cannot write to stdout: {error.strerror or error}") from error
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # discard the rest, so that Python does not report it again at exit
            with suppress(OSError):
                devnull = os.open(os.devnull, os.O_WRONLY)
                os.dup2(devnull, sys.stdout.fileno())
                os.close(devnull)


def is_unicode(stream: object) -> bool:
    """Tell whether a stream can encode every character."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("_", "-").startswith("utf")
