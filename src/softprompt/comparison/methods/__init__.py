"""The methods that can be compared, by name."""

from __future__ import annotations

from softprompt.comparison.methods.base import Method
from softprompt.comparison.methods.prompting import FewShots, ZeroShot
from softprompt.comparison.methods.prompts import DeepEnsembles, DeepPrefixes, SoftEnsembles, SoftPrompts
from softprompt.comparison.methods.weights import Full, Lora

METHODS: dict[str, type[Method]] = {
    "zero-shot": ZeroShot,
    "few-shot": FewShots,
    "soft-prompt": SoftPrompts,
    "deep-prefix": DeepPrefixes,
    "soft-prompt-ensemble": SoftEnsembles,
    "deep-prefix-ensemble": DeepEnsembles,
    "lora": Lora,
    "full": Full,
}
