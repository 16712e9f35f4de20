"""LoRA (through PEFT) and full fine-tuning, as methods of a comparison: the trainer of prompts, other parameters."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from softprompt.comparison.methods.base import MethodCallback, Predictor
from softprompt.comparison.methods.trained import Trained
from softprompt.comparison.protocol import Protocol
from softprompt.evaluation.scorer import Scorer
from softprompt.evaluation.scores import Scores
from softprompt.extras import require_package
from softprompt.model.frozen import FrozenModel
from softprompt.model.prefix import Prefix
from softprompt.prompt.soft_prompt import BasePrompt
from softprompt.training.callbacks import NO_CALLBACK, Callback
from softprompt.training.prepare import PreparedRun
from softprompt.training.trainer import MicroBatchesByRank, Trainer, Weights

if TYPE_CHECKING:
    from peft import PeftModel

RANK = 8
_OF_PROMPTS = ("method", "num_virtual_tokens", "init", "init_text")


@contextmanager
def lora(model: FrozenModel, seed: int = 0, folder: Path | None = None) -> Iterator[PeftModel]:
    """Add low-rank updates to all linear layers but the output head (Hu et al. 2022); only they are trained.

    They are in the model's own modules, and are removed when the block ends.

    Args:
        model: the frozen model.
        seed: of the updates' first factors.
        folder: a stored adapter to load instead of new updates of rank 8, scaled as PEFT does by default.

    Returns:
        PEFT's wrapper, which can save the adapter.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it where it is installed, and it logs
    require_package("peft", "lora")
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what PEFT corrects by itself, such as the layout of GPT-2's weights
        if folder is None:
            config = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
            wrapped: PeftModel = get_peft_model(model.hf_model, config)
        else:
            wrapped = PeftModel.from_pretrained(model.hf_model, folder)
    try:
        wrapped.eval()
        yield wrapped
    finally:
        wrapped.unload()
        model.hf_model.requires_grad_(False)


def unfreeze_copy(model: FrozenModel) -> FrozenModel:
    """Return a copy of a model whose weights are all trainable, in float32.

    In half precision, rounding would lose most of what an optimizer adds to weights.
    """
    return _wrap(deepcopy(model.hf_model).float().requires_grad_(True), model)


def _wrap(hf_model: PreTrainedModel, like: FrozenModel) -> FrozenModel:
    """Return a model of the same architecture with the same backend."""
    backend = type(like.backend)(hf_model, like.backend.shares_cache)
    return FrozenModel(hf_model, like.tokenizer, backend, like.source, like.revision, like.available_memory)


class WeightsTrainer(Trainer):
    """Trains every weight of a model that takes a gradient, on the rows of prompts, in the same order."""

    def __init__(self, model: FrozenModel, prepared: PreparedRun, callback: Callback = NO_CALLBACK) -> None:
        learned = {name: p for name, p in model.hf_model.named_parameters() if p.requires_grad}
        super().__init__(model, prepared, learned, callback=callback)

    def weights(self) -> Weights:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load(self, weights: Weights) -> None:
        """Copy weights into the model."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def evaluate(self, weights: Weights | None = None, scorer: Scorer | None = None) -> Scores:
        """Score rows with weights, which stay in the model, or with the model's current ones."""
        scorer = scorer or self.prepared.scorer
        assert scorer is not None
        if weights is not None:
            self.load(weights)
        return scorer.score(self.model, BasePrompt())

    def backward(self, micro_batches_by_rank: MicroBatchesByRank) -> float:
        """Run the micro-batches; a text's first token is no target, because nothing precedes it."""
        (micro_batches,) = micro_batches_by_rank
        activation_checkpointing, total = bool(self.prepared.config.gradient_checkpointing), 0.0
        learnable = [[example.predicted for example in micro_batch] for micro_batch in micro_batches]
        targets = sum(example.targets for micro_batch in learnable for example in micro_batch)
        with torch.enable_grad():
            for micro_batch in learnable:
                # The sum, as for prompts: in float16 most gradients of a mean would underflow.
                loss = self.prepared.objective.loss(self.model, Prefix(), micro_batch, activation_checkpointing).sum()
                loss.backward()
                total += float(loss.detach())
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad /= targets
        return total / targets


class WeightTuning(Trained):
    """Methods that train weights of the model."""

    changes_weights = True
    model: FrozenModel

    def __init__(self, protocol: Protocol, seed: int, callback: MethodCallback) -> None:
        super().__init__(protocol, seed, callback)
        self._initial: Weights | None = None  # the weights before the first step
        if protocol.train.task == "classification" and protocol.config.loss is None:
            self.settings = {"loss": "target"}  # the loss over labels helps soft prompts alone

    def trainer(self, prepared: PreparedRun, callback: Callback = NO_CALLBACK) -> Trainer:
        self._trainer = WeightsTrainer(self.model, prepared, callback)
        if self._initial is None:
            self._initial = self._trainer.weights()
        self._trainer.load(self._initial)
        return self._trainer

    def used_settings(self) -> dict[str, object]:
        return {name: value for name, value in super().used_settings().items() if name not in _OF_PROMPTS}

    def predictor(self, weights: Weights, label_bias: dict[str, float]) -> Predictor:
        self._trainer.load(weights)
        encoder = self._prepared.encoder
        return Predictor(self.model, encoder.format, encoder.max_length, BasePrompt(label_bias))


class Lora(WeightTuning):
    """Low-rank updates of the model's weights."""

    default_learning_rate = 3e-3

    def __init__(self, protocol: Protocol, seed: int, callback: MethodCallback) -> None:
        super().__init__(protocol, seed, callback)
        self.model = protocol.model
        self._adapter = self._stack.enter_context(lora(self.model, seed))

    def used_settings(self) -> dict[str, object]:
        return {**super().used_settings(), "rank": RANK}

    def store(self, folder: Path) -> None:
        self._adapter.save_pretrained(str(folder))
        self._predictor.save(folder)

    def load(self, folder: Path) -> Predictor:
        """Remove the trained adapter from the model, and load the stored one."""
        self.close()
        self._stack.enter_context(lora(self.model, folder=folder))
        return Predictor.read(folder, self.model, self.protocol.test.task)


class Full(WeightTuning):
    """All weights of a copy of the model."""

    default_learning_rate = 5e-5
    keeps = False

    def __init__(self, protocol: Protocol, seed: int, callback: MethodCallback) -> None:
        super().__init__(protocol, seed, callback)
        self.model = unfreeze_copy(protocol.model)

    def store(self, folder: Path) -> None:
        self.model.hf_model.save_pretrained(folder)
        self._predictor.save(folder)

    def load(self, folder: Path) -> Predictor:
        own = type(self.model.hf_model)  # not AutoModel: the class may come with the model's own code
        hf_model: PreTrainedModel = own.from_pretrained(folder, dtype=self.model.hf_model.dtype)
        hf_model = hf_model.eval().requires_grad_(False)
        model = _wrap(hf_model.to(self.model.device), self.model)  # type: ignore[arg-type]
        return Predictor.read(folder, model, self.protocol.test.task)
