"""The methods that can be compared, by name."""

from __future__ import annotations

from softprompt.comparison.engineering import FewShots, ZeroShot
from softprompt.comparison.learned_prompts import DeepEnsembles, DeepPrefixes, SoftEnsembles, SoftPrompts
from softprompt.comparison.learned_weights import Full, Lora
from softprompt.comparison.method import Method

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
