"""The methods that can be compared, by name."""

from __future__ import annotations

from softprompt.comparison.methods.base import Method
from softprompt.comparison.methods.prompting import FewShots, ZeroShot
from softprompt.comparison.methods.prompts import (
    PrefixTuning,
    PrefixTuningEnsembles,
    PromptTuning,
    PromptTuningEnsembles,
)
from softprompt.comparison.methods.weights import Full, Lora

METHODS: dict[str, type[Method]] = {
    "zero-shot": ZeroShot,
    "few-shot": FewShots,
    "prompt-tuning": PromptTuning,
    "prefix-tuning": PrefixTuning,
    "prompt-tuning-ensemble": PromptTuningEnsembles,
    "prefix-tuning-ensemble": PrefixTuningEnsembles,
    "lora": Lora,
    "full": Full,
}
