"""The errors that softprompt raises on purpose, and its warnings.

    SoftpromptError                  exit code 1: the work failed
    ├── InputError                   exit code 2: what the user gave is at fault
    │   ├── DataError                a data file or its rows
    │   ├── SettingsError            a setting, a template or a verbalizer
    │   ├── ModelError               a base model that is missing or cannot run
    │   └── PromptError              a prompt folder, or a prompt for another model
    ├── RunError                     training or evaluation could not go on
    └── StorageError                 reading or writing a file failed (full disk, no permission)

A message names what was given, what is allowed, and what to do.
"""

from __future__ import annotations

import difflib
import inspect
import sys
import warnings
from collections.abc import Iterable
from types import FrameType


class SoftpromptError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command exits with."""

    exit_code = 1


class InputError(SoftpromptError):
    """The user's input is at fault."""

    exit_code = 2


class DataError(InputError):
    """A data file, a column or a row is at fault."""


class SettingsError(InputError):
    """A setting, a template or a verbalizer is at fault."""


class ModelError(InputError):
    """The base model cannot be found, or cannot run a prompt exactly."""


class PromptError(InputError):
    """A prompt folder is damaged, or belongs to another base model."""


class RunError(SoftpromptError):
    """Training or evaluation could not go on."""


class StorageError(SoftpromptError):
    """A file could not be read or written."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the allowed name closest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out: on the CPU, PyTorch raises a plain RuntimeError."""
    torch = sys.modules.get("torch")  # if it is not imported, the error is not one of its own
    return (
        isinstance(error, MemoryError)
        or (torch is not None and isinstance(error, torch.OutOfMemoryError))
        or "can't allocate memory" in str(error)
    )


def warn(message: str) -> None:
    """Warn in the name of the line outside the package that called it, however deep inside the cause is found."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_back is not None and _is_in_package(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _is_in_package(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "softprompt"
