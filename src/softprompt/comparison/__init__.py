"""Methods of adapting a model, compared under one protocol."""

USUAL = ("zero-shot", "few-shot", "prompt-tuning", "prefix-tuning", "lora", "full")  # the default methods
