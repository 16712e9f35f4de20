"""The learning rate over the steps of a run."""

from __future__ import annotations

import math

from softprompt.config import TuneConfig


def learning_rate(config: TuneConfig, step: int) -> float:
    """Return the rate of a step, counted from 0: a linear warm-up, then the schedule's decay to zero."""
    assert config.learning_rate and config.max_steps
    warmup = max(1, round(config.warmup_ratio * config.max_steps)) if config.warmup_ratio else 0
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.max_steps - warmup)
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * decay[config.schedule]
