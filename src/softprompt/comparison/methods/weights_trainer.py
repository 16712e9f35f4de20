"""Learning the model's own weights: LoRA through PEFT, and full fine-tuning, in the loop that prompts learn in."""

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

from softprompt.errors import SettingsError
from softprompt.evaluation.scores import Scorer, Scores
from softprompt.extras import require_package
from softprompt.model.frozen import FrozenModel
from softprompt.model.prefix import Prefix
from softprompt.prompt.soft_prompt import BasePrompt
from softprompt.training.callbacks import NO_CALLBACK, Callback
from softprompt.training.prepare import PreparedRun
from softprompt.training.run_folder import NOWHERE
from softprompt.training.trainer import MicroBatchesByRank, Trainer, Weights

if TYPE_CHECKING:
    from peft import PeftModel

RANK = 8


@contextmanager
def lora(model: FrozenModel, seed: int = 0, folder: Path | None = None) -> Iterator[PeftModel]:
    """Put low-rank updates beside all linear layers but the output head (Hu et al. 2022); they alone learn.

    They are in the model's own modules, which are as they were when the block is done.

    Args:
        model: the frozen model.
        seed: of the updates' first factors.
        folder: a stored adapter to put in instead of new updates of rank 8, scaled as PEFT does by itself.

    Returns:
        PEFT's wrapper, which can save the adapter.

    Raises:
        InputError: PEFT is not installed.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # where it is there, PEFT loads it, and it talks
    require_package("peft", "lora")
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PEFT corrects by itself, such as the layout of GPT-2's weights
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


def require_whole(model: FrozenModel) -> None:
    """Make sure that all weights of a model can learn.

    Raises:
        SettingsError: they are quantized.
    """
    if getattr(model.hf_model, "is_quantized", False):
        raise SettingsError("full fine-tuning needs a model that is not quantized; leave the method or the setting out")


def unfrozen(model: FrozenModel) -> FrozenModel:
    """Return a copy of a model that learns with all its weights; what is given is not changed.

    It is in float32: most of what an optimizer adds to weights in half precision would be lost in rounding.
    """
    require_whole(model)
    return around(deepcopy(model.hf_model).float().requires_grad_(True), model)


def around(hf_model: PreTrainedModel, like: FrozenModel) -> FrozenModel:
    """Run another model of the same kind in the same way."""
    backend = type(like.backend)(hf_model, like.backend.shares_cache)
    return FrozenModel(hf_model, like.tokenizer, backend, like.source, like.revision)


class WeightsTrainer(Trainer):
    """Learns every weight of a model that takes a gradient, on the rows that prompts learn on, in the same order."""

    def __init__(self, model: FrozenModel, prepared: PreparedRun, callback: Callback = NO_CALLBACK) -> None:
        learned = {name: p for name, p in model.hf_model.named_parameters() if p.requires_grad}
        super().__init__(model, prepared, NOWHERE, callback, learned)

    def weights(self) -> Weights:
        """Return a copy of the learned weights."""
        return {name: parameter.detach().clone() for name, parameter in self.learned.items()}

    @torch.no_grad()
    def load(self, weights: Weights) -> None:
        """Put weights into the model."""
        for name, parameter in self.learned.items():
            parameter.copy_(weights[name])

    def evaluate(self, weights: Weights | None = None, scorer: Scorer | None = None) -> Scores:
        """Score rows with weights, which the model has afterwards, or with those that it has."""
        scorer = scorer or self.prepared.scorer
        assert scorer is not None
        if weights is not None:
            self.load(weights)
        return scorer.score(self.model, BasePrompt())

    def backward(self, micro_batches_by_rank: MicroBatchesByRank) -> float:
        """Run the micro-batches; a text's first token is not learned, for nothing predicts it."""
        (parts,), activation_checkpointing, total = (
            micro_batches_by_rank,
            bool(self.prepared.config.gradient_checkpointing),
            0.0,
        )
        learnable = [[example.predicted for example in part] for part in parts]
        targets = sum(example.targets for part in learnable for example in part)
        with torch.enable_grad():
            for part in learnable:
                # The sum, as of a prompt: in float16 most of a mean's gradients would be lost.
                loss = self.prepared.objective.loss(self.model, Prefix(), part, activation_checkpointing).sum()
                loss.backward()
                total += float(loss.detach())
        for parameter in self.learned.values():
            if parameter.grad is not None:
                parameter.grad /= targets
        return total / targets
