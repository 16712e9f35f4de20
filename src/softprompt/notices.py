"""Warnings, which are told in the name of the line that called the package."""

from __future__ import annotations

import inspect
import warnings
from types import FrameType


def warn(message: str) -> None:
    """Warn of what a line outside the package gave, however deep inside it is found."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_back is not None and _is_ours(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "softprompt"
