"""The step of prompt tuning and prefix tuning: the gradient is computed for the prompt alone."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import Parameter

from softprompt.data.example import Example
from softprompt.distributed.collective import ALONE, Processes
from softprompt.evaluation.scorer import Scorer
from softprompt.evaluation.scores import Scores
from softprompt.model.free_memory import trim_allocator
from softprompt.model.frozen import FrozenModel
from softprompt.model.gradient import prompt_gradient
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.training.callbacks import NO_CALLBACK, Callback
from softprompt.training.checkpoint import Checkpoint
from softprompt.training.prepare import PreparedRun
from softprompt.training.run_log import RunLog
from softprompt.training.trainer import MicroBatchesByRank, Trainer, Weights

_PROMPT = "prompt"


class PromptTrainer(Trainer):
    """Trains a soft prompt or a prefix."""

    def __init__(
        self,
        model: FrozenModel,
        prepared: PreparedRun,
        run_log: RunLog | None = None,
        callback: Callback = NO_CALLBACK,
        checkpoint: Checkpoint | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.shared_text_len = len(prepared.shared_text_ids)
        self.prompt = Parameter(prepared.start.clone())
        super().__init__(model, prepared, {_PROMPT: self.prompt}, run_log, callback, checkpoint, processes)

    def weights(self) -> Weights:
        """Return a copy of the prompt."""
        return {_PROMPT: self.prompt.detach().clone()}

    def evaluate(self, weights: Weights | None = None, scorer: Scorer | None = None) -> Scores:
        scorer = scorer or self.prepared.scorer
        assert scorer is not None
        return scorer.score(self.model, SoftPrompt((weights or self.weights())[_PROMPT], self._record))

    @cached_property
    def _record(self) -> Record:
        encoder = self.prepared.encoder
        return Record.of(self.model, encoder.format, encoder.max_length)

    def backward(self, micro_batches_by_rank: MicroBatchesByRank) -> float:
        loss, self.prompt.grad = self._summed(self.prompt.detach(), micro_batches_by_rank)
        return loss

    def _summed(self, prompt: Tensor, micro_batches_by_rank: MicroBatchesByRank) -> tuple[float, Tensor]:
        """Return the loss and gradient of a step; each process computes those of its own micro-batches."""
        mine = micro_batches_by_rank[self.processes.rank]
        if self.processes.count == 1:
            return self._own(prompt, mine)
        targets = [sum(example.targets for part in cut for example in part) for cut in micro_batches_by_rank]
        shape = (1 + prompt.numel(),)

        def share() -> Tensor:
            if not targets[self.processes.rank]:  # fewer rows than processes
                return torch.zeros(shape)
            loss, gradient = self._own(prompt, mine)
            both = torch.cat([torch.tensor([loss], dtype=torch.float64), gradient.double().flatten()])
            return both * targets[self.processes.rank]

        whole = self.processes.all_reduce(share, shape) / sum(targets)
        return float(whole[0]), whole[1:].view_as(prompt).float()

    def _own(self, prompt: Tensor, micro_batches: list[list[Example]]) -> tuple[float, Tensor]:
        """Return the loss and gradient of this process's micro-batches.

        Micro-batches that are predicted not to fit are not run: Linux kills a process that takes too much memory. A
        single row is always run, because the prediction is cautious.

        Raises:
            MemoryError: a micro-batch of several rows would not fit.
        """
        needed = max(self.prepared.step_bytes(part) for part in micro_batches)
        if max(map(len, micro_batches)) > 1 and needed > self._free(needed):
            raise MemoryError
        prepared, checkpointing = self.prepared, bool(self.prepared.config.gradient_checkpointing)
        text = prepared.shared_text_ids
        return prompt_gradient(self.model, prompt, text, micro_batches, checkpointing, prepared.objective)

    def _free(self, needed: float) -> float:
        """Return the free memory; if it is less than needed, the allocator first returns what earlier steps used."""
        free = self.model.free_memory()
        if free < needed:
            trim_allocator()
            free = self.model.free_memory()
        return free
