"""The methods that can be compared, by name."""

from __future__ import annotations

from collections.abc import Sequence

from softprompt.comparison.methods.base import Method
from softprompt.comparison.methods.prompting import FewShot, ZeroShot
from softprompt.comparison.methods.prompts import PrefixTuning, PromptTuning
from softprompt.comparison.methods.weights import Full, Lora
from softprompt.errors import SettingsError, nearest
from softprompt.old_names import current_method

METHODS: dict[str, type[Method]] = {
    "zero-shot": ZeroShot,
    "few-shot": FewShot,
    "prompt-tuning": PromptTuning,
    "prefix-tuning": PrefixTuning,
    "lora": Lora,
    "full": Full,
}
_REMOVED = ("prompt-tuning-ensemble", "prefix-tuning-ensemble")


def resolve_methods(names: Sequence[str]) -> list[str]:
    """Return methods by their current names, each once."""
    if not names:
        raise SettingsError(f"no methods to compare; there are {', '.join(METHODS)}")
    for name in names:
        if current_method(name, quiet=True) in _REMOVED:
            raise SettingsError(
                f"method {name} was taken out: ensembles trained within one run's time are worse than a single prompt; "
                "leave it out, and use `softprompt tune --ensemble N` for an ensemble of N whole runs"
            )
    current = list(dict.fromkeys(map(current_method, names)))
    unknown = next((name for name in current if name not in METHODS), None)
    if unknown is not None:
        raise SettingsError(f"no method {unknown!r}{nearest(unknown, METHODS)}; there are {', '.join(METHODS)}")
    return current
