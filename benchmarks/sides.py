"""What is compared: our loop, PEFT in a plain PyTorch loop, and PEFT under `transformers.Trainer`."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

import softprompt as sp
from softprompt.data.example import Example
from softprompt.model.backends.verify import freeze
from softprompt.training.prepare import PreparedRun
from softprompt.training.prompt_trainer import PromptTrainer
from softprompt.training.run_log import RunLog
from softprompt.training.trainer import reproducible


def load(name: str) -> sp.FrozenModel:
    """Return a base model."""
    if name == "smollm2":
        return sp.load_model()
    tokenizer = sp.load_model().tokenizer
    torch.manual_seed(0)
    shape = BloomConfig(vocab_size=250_880, hidden_size=1024, n_layer=24, n_head=16)
    return freeze(BloomForCausalLM(shape), tokenizer, source="bloomz-560m's shape, random weights")


class Softprompt:
    """Our side: the loop that `softprompt tune` runs."""

    def __init__(self, model: sp.FrozenModel, prepared: PreparedRun, scratch: Path) -> None:
        self.loop, self.metrics = PromptTrainer(model, prepared, RunLog(scratch)), scratch / "metrics.jsonl"

    def step(self, _batch: Sequence[Example]) -> float:
        """Take a step and return its loss; the loop draws the same batch itself."""
        with reproducible(self.loop.prepared.config.threads):
            self.loop.step()
        return float(json.loads(self.metrics.read_text().splitlines()[-1])["loss"])

    def gradient(self) -> Tensor:
        """Return the last step's gradient `[P, H]`, clipped."""
        assert self.loop.prompt.grad is not None
        return self.loop.prompt.grad.clone()


class Peft:
    """PEFT's prompt tuning in a plain PyTorch loop: rows padded on the right to the batch's longest."""

    def __init__(self, hf_model: PreTrainedModel, prepared: PreparedRun) -> None:
        self.config = prepared.config
        assert prepared.config.learning_rate
        self.model = peft_model(hf_model, prepared.start)
        self.prompt = virtual_tokens(self.model)
        self.optimizer = torch.optim.AdamW(
            [self.prompt], prepared.config.learning_rate, weight_decay=prepared.config.weight_decay
        )

    def step(self, batch: Sequence[Example]) -> float:
        """Take a step and return its loss."""
        self.optimizer.zero_grad()
        loss = self.model(**collate(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([self.prompt], self.config.max_grad_norm)
        self.optimizer.step()
        return float(loss.detach())

    def gradient(self) -> Tensor:
        """Return the last step's gradient `[P, H]`, clipped."""
        assert self.prompt.grad is not None
        return self.prompt.grad.clone()


def virtual_tokens(model: PeftModel) -> torch.nn.Parameter:
    """Return what PEFT trains, `[P, H]`."""
    (prompt,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return prompt


def peft_model(hf_model: PreTrainedModel, prompt: Tensor) -> PeftModel:
    """Wrap a model with PEFT's prompt tuning, starting from a given prompt `[P, H]`."""
    wrapped = get_peft_model(hf_model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(prompt)))
    virtual_tokens(wrapped).data.copy_(prompt)
    return wrapped


def collate(batch: Sequence[Example]) -> dict[str, Tensor]:
    """Pad a batch on the right; only targets are labels."""
    longest = max(len(e.ids) for e in batch)

    def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

    return {
        "input_ids": padded([e.ids for e in batch], 0),
        "attention_mask": padded([[1] * len(e.ids) for e in batch], 0),
        "labels": padded([[*[-100] * e.start, *e.ids[e.start :]] for e in batch], -100),
    }


class Rounds(TrainerCallback):
    """Times the Trainer's steps, and runs a step of the other sides before each of them."""

    def __init__(self, others: Callable[[int], None]) -> None:
        self.others, self.seconds, self.losses, self._began = others, list[float](), list[float](), 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Run the others, then start the clock."""
        self.others(state.global_step)
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self._began)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the loss."""
        if "loss" in kwargs["logs"]:
            self.losses.append(float(kwargs["logs"]["loss"]))


def trainer(
    hf_model: PreTrainedModel, prepared: PreparedRun, batches: Sequence[Sequence[Example]], scratch: Path
) -> Trainer:
    """Return the tutorial's side: PEFT under `transformers.Trainer`, with the batches in the given order."""
    config = prepared.config
    assert config.learning_rate and config.batch_size
    arguments = TrainingArguments(
        output_dir=str(scratch),
        use_cpu=True,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type="constant",
        max_steps=len(batches),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )
    rows = [example for batch in batches for example in batch]
    return Trainer(peft_model(hf_model, prepared.start), arguments, collate, rows)


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of the ratios, round by round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
