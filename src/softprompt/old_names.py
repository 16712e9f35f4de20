"""Names of earlier versions that commands and files may still hold, translated in this one place."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from softprompt.errors import SettingsError, warn

_METHODS = {"soft-prompt": "prompt-tuning", "deep-prefix": "prefix-tuning"}


def current_method(name: str, *, quiet: bool = False) -> str:
    """Return today's name of a method; an old one is warned about once.

    Args:
        name: a method's, an ensemble's of a comparison included: `soft-prompt-ensemble`.
        quiet: say nothing, for files that nobody can be asked to change.
    """
    for old, new in _METHODS.items():
        if name == old or name.startswith(f"{old}-"):
            if not quiet:
                _warn_once(old, new)
            return new + name.removeprefix(old)
    return name


def current_settings(values: Mapping[str, Any], *, quiet: bool = False) -> dict[str, Any]:
    """Return settings by today's names; `parameterization=direct` is dropped, which is how every prompt learns.

    Raises:
        SettingsError: they ask for the residual parameterization, which was taken out.
    """
    kept = dict(values)
    parameterization = kept.pop("parameterization", "direct")
    if parameterization != "direct":
        raise SettingsError(
            f"parameterization={parameterization} was taken out: it learned no better than the prompt itself; leave "
            "it out"
        )
    if isinstance(kept.get("method"), str):
        kept["method"] = current_method(kept["method"], quiet=quiet)
    return kept


@cache
def _warn_once(old: str, new: str) -> None:
    warn(f"method {old} is called {new} now; the old name is still read")
