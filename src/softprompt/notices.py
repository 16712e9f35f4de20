"""Warnings, which are told in the name of the line that called the package."""

from __future__ import annotations

import sys
import warnings


def warn(message: str) -> None:
    """Warn of what a line outside the package gave, however deep inside it is found."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "softprompt":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
