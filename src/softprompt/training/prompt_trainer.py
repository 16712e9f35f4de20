"""Learning a prompt: the loop's steps, with gradients on the prompt alone and the model shared by all examples."""

from __future__ import annotations

import torch
from torch import Tensor

from softprompt.data.encoder import Example
from softprompt.distributed.collective import ALONE, Processes
from softprompt.evaluation.scores import Scorer, Scores
from softprompt.model.frozen import FrozenModel
from softprompt.model.gradient import prompt_gradient
from softprompt.model.memory import available_memory, give_back
from softprompt.prompt.parameterization import parameterize
from softprompt.training.callbacks import UNWATCHED, Watcher
from softprompt.training.prepare import Plan
from softprompt.training.run_folder import NOWHERE, RunFolder, State
from softprompt.training.trainer import Cuts, Loop, Weights

_PROMPT = "prompt"


class PromptLoop(Loop):
    """Learns a soft prompt or a deep prefix."""

    def __init__(
        self,
        model: FrozenModel,
        plan: Plan,
        run: RunFolder = NOWHERE,
        watcher: Watcher = UNWATCHED,
        state: State | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.held = len(plan.text)
        self.prompt = parameterize(plan.start, plan.config.parameterization, plan.config.seed)
        super().__init__(model, plan, run, watcher, dict(self.prompt.named_parameters()), state, processes)

    def weights(self) -> Weights:
        """Return the prompt, folded into its plain form."""
        with torch.no_grad():
            return {_PROMPT: self.prompt().clone()}

    def evaluate(self, weights: Weights | None = None, scorer: Scorer | None = None) -> Scores:
        scorer = scorer or self.plan.scorer
        assert scorer is not None
        return scorer.score(self.model, (weights or self.weights())[_PROMPT])

    def backward(self, cuts: Cuts) -> float:
        prompt = self.prompt()
        loss, gradient = self._summed(prompt.detach(), cuts)
        prompt.backward(gradient)
        return loss

    def _summed(self, prompt: Tensor, cuts: Cuts) -> tuple[float, Tensor]:
        """Return a step's loss and gradient, of which each process computes its own micro-batches'."""
        mine = cuts[self.processes.rank]
        if self.processes.count == 1:
            return self._own(prompt, mine)
        targets = [sum(example.targets for part in cut for example in part) for cut in cuts]
        shape = (1 + prompt.numel(),)

        def share() -> Tensor:
            if not targets[self.processes.rank]:  # fewer rows than processes
                return torch.zeros(shape)
            loss, gradient = self._own(prompt, mine)
            both = torch.cat([torch.tensor([loss], dtype=torch.float64), gradient.double().flatten()])
            return both * targets[self.processes.rank]

        whole = self.processes.total(share, shape) / sum(targets)
        return float(whole[0]), whole[1:].view_as(prompt).float()

    def _own(self, prompt: Tensor, parts: list[list[Example]]) -> tuple[float, Tensor]:
        """Return the loss and gradient of this process's micro-batches.

        What would not fit in what is free now is not tried, for Linux kills a process that takes more. A row that does
        not fit even alone is: the prediction is on the safe side.

        Raises:
            MemoryError: a micro-batch of several rows would not fit.
        """
        needed = max(self.plan.step_bytes(part) for part in parts)
        if max(map(len, parts)) > 1 and needed > self._free(needed):
            raise MemoryError
        recompute = bool(self.plan.config.gradient_checkpointing)
        return prompt_gradient(self.model, prompt, self.plan.text, parts, recompute)

    def _free(self, needed: float) -> float:
        """Return the memory that is free; what earlier steps left to the allocator too, where less is than needed."""
        free = available_memory(self.model.device)
        if free < needed:
            give_back()
            free = available_memory(self.model.device)
        return free
