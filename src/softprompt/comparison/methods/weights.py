"""LoRA and full fine-tuning, as methods of a comparison."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel

from softprompt.comparison.methods.base import Predictor, Protocol
from softprompt.comparison.methods.trained import Trained
from softprompt.comparison.methods.weights_trainer import RANK, WeightsTrainer, around, lora, unfrozen
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.soft_prompt import BasePrompt
from softprompt.training.callbacks import NO_CALLBACK, Callback
from softprompt.training.prepare import PreparedRun
from softprompt.training.trainer import Trainer, Weights

_OF_PROMPTS = ("method", "num_virtual_tokens", "init", "init_text")


class OwnWeights(Trained):
    """Weights of the model itself."""

    changes_weights = True
    model: FrozenModel

    def __init__(self, protocol: Protocol, seed: int, callback: Callback) -> None:
        super().__init__(protocol, seed, callback)
        if protocol.train.task == "classification" and protocol.config.loss is None:
            self.settings = {"loss": "target"}  # to be told from other labels helps soft prompts alone

    def trainer(self, prepared: PreparedRun, callback: Callback = NO_CALLBACK) -> Trainer:
        trainer = WeightsTrainer(self.model, prepared, callback)
        trainer.load(self._fresh)
        self._trainer = trainer
        return trainer

    @cached_property
    def _fresh(self) -> Weights:
        """The weights before the first step."""
        return {name: p.detach().clone() for name, p in self.model.hf_model.named_parameters() if p.requires_grad}

    def noted(self) -> dict[str, object]:
        return {name: value for name, value in super().noted().items() if name not in _OF_PROMPTS}

    def answers(self, weights: Weights, label_bias: dict[str, float]) -> Predictor:
        self._trainer.load(weights)
        encoder = self._prepared.encoder
        return Predictor(self.model, encoder.format, encoder.max_length, BasePrompt(label_bias))


class Lora(OwnWeights):
    """Low-rank updates of the model's weights."""

    rate = 3e-3

    def __init__(self, protocol: Protocol, seed: int, callback: Callback) -> None:
        super().__init__(protocol, seed, callback)
        self.model = protocol.model
        self._adapter = self._stack.enter_context(lora(self.model, seed))

    def noted(self) -> dict[str, object]:
        return {**super().noted(), "rank": RANK}

    def store(self, folder: Path) -> None:
        self._adapter.save_pretrained(str(folder))
        self._answers.save(folder)

    def load(self, folder: Path) -> Predictor:
        """Take the adapter that was learned out of the model, and put the stored one in."""
        self.close()
        self._stack.enter_context(lora(self.model, folder=folder))
        return Predictor.read(folder, self.model, self.protocol.test.task)


class Full(OwnWeights):
    """All weights of a copy of the model."""

    rate = 5e-5
    keeps = False

    def __init__(self, protocol: Protocol, seed: int, callback: Callback) -> None:
        super().__init__(protocol, seed, callback)
        self.model = unfrozen(protocol.model)

    def store(self, folder: Path) -> None:
        self.model.hf_model.save_pretrained(folder)
        self._answers.save(folder)

    def load(self, folder: Path) -> Predictor:
        own = type(self.model.hf_model)  # it is here already, where its code came with it too
        hf_model: PreTrainedModel = own.from_pretrained(folder, dtype=self.model.hf_model.dtype)
        hf_model = hf_model.eval().requires_grad_(False)
        model = around(hf_model.to(self.model.device), self.model)  # type: ignore[arg-type]
        return Predictor.read(folder, model, self.protocol.test.task)
