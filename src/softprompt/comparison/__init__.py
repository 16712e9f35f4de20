"""Methods of adapting a model, compared under one protocol."""

USUAL = ("zero-shot", "few-shot", "soft-prompt", "deep-prefix", "lora", "full")  # methods, without being asked
