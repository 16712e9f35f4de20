"""Learning the model's own weights: LoRA through PEFT, and full fine-tuning, in the loop that prompts learn in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Literal

import torch

from softprompt.data.batching import micro_batches
from softprompt.data.examples import Example
from softprompt.errors import SettingsError
from softprompt.evaluation.scoring import Scores
from softprompt.model.frozen import FrozenModel
from softprompt.model.prefix import Prefix
from softprompt.training.loop import Loop, Weights
from softprompt.training.plan import Plan
from softprompt.training.run_folder import RunFolder
from softprompt.training.watcher import Watcher

WeightsMethod = Literal["lora", "full"]
RANK = 8
LEARNING_RATE: dict[str, float] = {"lora": 1e-3, "full": 5e-5}


@contextmanager
def adapted(model: FrozenModel, method: WeightsMethod, seed: int) -> Iterator[FrozenModel]:
    """Give a model whose weights learn; the one that was given is as it was when the block is done.

    Args:
        model: the frozen model.
        method: `lora` puts low-rank updates beside all linear layers but the output head (Hu et al. 2022; rank 8, as
            scaled by PEFT's own defaults); `full` is a copy of the model that learns with all its weights.
        seed: of LoRA's first factors.

    Raises:
        SettingsError: PEFT is missing, or the model's layers are not for it.
    """
    if method == "full":
        copy = deepcopy(model.hf_model).requires_grad_(True)
        yield FrozenModel(copy, model.tokenizer, type(model.way)(copy), model.source, model.revision)
        return
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise SettingsError("lora needs a package: pip install 'softprompt[compare]'") from error
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    tuner = LoraModel(model.hf_model, {"default": config}, "default")
    try:
        model.hf_model.eval()
        yield model
    finally:
        tuner.unload()
        model.hf_model.requires_grad_(False)


class WeightsLoop(Loop):
    """Learns every weight of a model that takes a gradient, on the rows that prompts learn on, in the same order."""

    def __init__(self, model: FrozenModel, plan: Plan, run: RunFolder, watcher: Watcher) -> None:
        self.model = model
        learned = {name: p for name, p in model.hf_model.named_parameters() if p.requires_grad}
        super().__init__(plan, run, watcher, learned)

    def weights(self) -> Weights:
        """Return a copy of the learned weights."""
        return {name: parameter.detach().clone() for name, parameter in self.learned.items()}

    @torch.no_grad()
    def load(self, weights: Weights) -> None:
        """Put weights into the model."""
        for name, parameter in self.learned.items():
            parameter.copy_(weights[name])

    def evaluate(self, weights: Weights) -> Scores:
        """Score the validation rows with weights, which the model has afterwards."""
        assert self.plan.scorer is not None
        self.load(weights)
        return self.plan.scorer.score(self.model, None)

    def gradient(self, batch: list[Example]) -> float:
        """Set the gradients of the learned weights; a text's first token is not learned, for nothing predicts it."""
        examples = [Example(example.ids, max(example.start, 1)) for example in batch]
        targets, total = sum(example.targets for example in examples), 0.0
        with torch.enable_grad():
            for part in micro_batches(examples, self.progress.micro_batch_tokens, 0, self.model.way.pads):
                loss = self.model.loss(Prefix(), [examples[i] for i in part]).sum() / targets
                loss.backward()
                total += float(loss.detach())
        return total
