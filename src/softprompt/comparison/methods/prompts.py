"""Prompt tuning and prefix tuning, as methods of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from softprompt.comparison.methods.base import Predictor
from softprompt.comparison.methods.trained import Trained
from softprompt.prompt.ensemble import Prompt
from softprompt.prompt.loading import load_prompt
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.training.callbacks import NO_CALLBACK, Callback
from softprompt.training.prepare import PreparedRun
from softprompt.training.prompt_trainer import PromptTrainer
from softprompt.training.trainer import Trainer, Weights


class Prompts(Trained):
    """Virtual tokens, learned as `tune` learns them."""

    prompt: SoftPrompt  # what was learned

    def trainer(self, prepared: PreparedRun, callback: Callback = NO_CALLBACK) -> Trainer:
        return PromptTrainer(self.protocol.model, prepared, callback=callback)

    def predictor(self, weights: Weights, label_bias: dict[str, float]) -> Predictor:
        encoder, training = self._prepared.encoder, {"settings": self._prepared.config.model_dump()}
        model, own = self.protocol.model, {"label_bias": label_bias, "training": training}
        record = Record.of(model, encoder.format, encoder.max_length, **own)
        self.prompt = SoftPrompt(weights["prompt"], record)
        return self._predict_with(self.prompt)

    def store(self, folder: Path) -> None:
        self.prompt.save(folder)

    def load(self, folder: Path) -> Predictor:
        return self._predict_with(load_prompt(folder))

    def _predict_with(self, prompt: Prompt) -> Predictor:
        return Predictor(self.protocol.model, prompt.format, prompt.record.max_length, prompt)


class PromptTuning(Prompts):
    """A soft prompt: embeddings before the text."""

    settings: Mapping[str, object] = {"method": "prompt-tuning"}


class PrefixTuning(Prompts):
    """A learned prefix: keys and values at every layer."""

    settings: Mapping[str, object] = {"method": "prefix-tuning"}
