"""LoRA and full fine-tuning, as methods of a comparison."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel

from softprompt.comparison.methods.base import Answers, Protocol
from softprompt.comparison.methods.trained import Trained
from softprompt.comparison.methods.weights_trainer import RANK, WeightsLoop, around, lora, unfrozen
from softprompt.model.frozen import FrozenModel
from softprompt.training.callbacks import UNWATCHED, Watcher
from softprompt.training.prepare import Plan
from softprompt.training.trainer import Loop, Weights

_OF_PROMPTS = ("method", "parameterization", "num_virtual_tokens", "init", "init_text")


class OwnWeights(Trained):
    """Weights of the model itself."""

    changes_weights = True
    model: FrozenModel

    def __init__(self, protocol: Protocol, seed: int, watcher: Watcher) -> None:
        super().__init__(protocol, seed, watcher)
        if protocol.train.task == "classification" and protocol.config.loss is None:
            self.settings = {"loss": "target"}  # to be told from other labels helps soft prompts alone

    def loop(self, plan: Plan, watcher: Watcher = UNWATCHED) -> Loop:
        loop = WeightsLoop(self.model, plan, watcher)
        loop.load(self._fresh)
        self._loop = loop
        return loop

    @cached_property
    def _fresh(self) -> Weights:
        """The weights before the first step."""
        return {name: p.detach().clone() for name, p in self.model.hf_model.named_parameters() if p.requires_grad}

    def noted(self) -> dict[str, object]:
        return {name: value for name, value in super().noted().items() if name not in _OF_PROMPTS}

    def answers(self, weights: Weights, label_bias: dict[str, float]) -> Answers:
        self._loop.load(weights)
        encoder = self._plan.encoder
        return Answers(self.model, encoder.format, encoder.max_length, biases=(label_bias,))


class Lora(OwnWeights):
    """Low-rank updates of the model's weights."""

    rate = 3e-3

    def __init__(self, protocol: Protocol, seed: int, watcher: Watcher) -> None:
        super().__init__(protocol, seed, watcher)
        self.model = protocol.model
        self._adapter = self._stack.enter_context(lora(self.model, seed))

    def noted(self) -> dict[str, object]:
        return {**super().noted(), "rank": RANK}

    def store(self, folder: Path) -> None:
        self._adapter.save_pretrained(str(folder))
        self._answers.save(folder)

    def load(self, folder: Path) -> Answers:
        """Take the adapter that was learned out of the model, and put the stored one in."""
        self.close()
        self._stack.enter_context(lora(self.model, folder=folder))
        return Answers.read(folder, self.model, self.protocol.test.task)


class Full(OwnWeights):
    """All weights of a copy of the model."""

    rate = 5e-5
    keeps = False

    def __init__(self, protocol: Protocol, seed: int, watcher: Watcher) -> None:
        super().__init__(protocol, seed, watcher)
        self.model = unfrozen(protocol.model)

    def store(self, folder: Path) -> None:
        self.model.hf_model.save_pretrained(folder)
        self._answers.save(folder)

    def load(self, folder: Path) -> Answers:
        own = type(self.model.hf_model)  # it is here already, where its code came with it too
        hf_model: PreTrainedModel = own.from_pretrained(folder, dtype=self.model.hf_model.dtype)
        hf_model = hf_model.eval().requires_grad_(False)
        model = around(hf_model.to(self.model.device), self.model)  # type: ignore[arg-type]
        return Answers.read(folder, model, self.protocol.test.task)
