"""Translates names of earlier versions in commands and files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from softprompt.errors import SettingsError, warn

_METHODS = {"soft-prompt": "prompt-tuning", "deep-prefix": "prefix-tuning"}


def current_method(name: str, *, quiet: bool = False) -> str:
    """Return the current name of a method; warn once about an old one.

    Args:
        name: of a method, also with a suffix: `soft-prompt-ensemble`.
        quiet: do not warn, for files that are not edited by hand.
    """
    for old, new in _METHODS.items():
        if name == old or name.startswith(f"{old}-"):
            if not quiet:
                _warn_once(old, new)
            return new + name.removeprefix(old)
    return name


def current_settings(values: Mapping[str, Any], *, quiet: bool = False) -> dict[str, Any]:
    """Return settings with current names, without `parameterization=direct`.

    Raises:
        SettingsError: they contain the residual parameterization, which was removed.
    """
    current = dict(values)
    parameterization = current.pop("parameterization", "direct")
    if parameterization != "direct":
        raise SettingsError(
            f"parameterization={parameterization} was removed: it was no better than direct; leave it out"
        )
    if isinstance(current.get("method"), str):
        current["method"] = current_method(current["method"], quiet=quiet)
    return current


@cache
def _warn_once(old: str, new: str) -> None:
    warn(f"method {old} is called {new} now; the old name is still read")
