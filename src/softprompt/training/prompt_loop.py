"""Learning a prompt: the loop's steps, with gradients on the prompt alone and the model shared by all examples."""

from __future__ import annotations

import torch
from torch import Tensor

from softprompt.data.batching import deal, micro_batches
from softprompt.data.examples import Example
from softprompt.errors import RunError
from softprompt.evaluation.scoring import Scores
from softprompt.model.frozen import FrozenModel
from softprompt.model.gradient import prompt_gradient
from softprompt.model.memory import available_memory, give_back, is_out_of_memory
from softprompt.processes import ALONE, Processes
from softprompt.prompt.parameterization import parameterize
from softprompt.training.loop import Loop, Weights
from softprompt.training.plan import Plan
from softprompt.training.run_folder import RunFolder, State
from softprompt.training.watcher import Watcher

_PROMPT = "prompt"


class PromptLoop(Loop):
    """Learns a soft prompt or a deep prefix."""

    def __init__(
        self,
        model: FrozenModel,
        plan: Plan,
        run: RunFolder,
        watcher: Watcher,
        state: State | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.processes = model, processes
        self.prompt = parameterize(plan.start, plan.config.parameterization, plan.config.seed)
        super().__init__(plan, run, watcher, dict(self.prompt.named_parameters()), state, processes.count)

    def weights(self) -> Weights:
        """Return the prompt, folded into its plain form."""
        with torch.no_grad():
            return {_PROMPT: self.prompt().clone()}

    def evaluate(self, weights: Weights | None = None) -> Scores:
        assert self.plan.scorer is not None
        return self.plan.scorer.score(self.model, (weights or self.weights())[_PROMPT])

    def gradient(self, batch: list[Example]) -> float:
        """Set the gradients, with smaller micro-batches where memory is too little or runs out."""
        prompt = self.prompt()
        while True:
            cuts = [self._cut([batch[i] for i in hand]) for hand in deal(batch, self.processes.count)]
            try:
                loss, gradient = self._summed(prompt.detach(), cuts)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if all(len(part) == 1 for cut in cuts for part in cut):
                    longest, free = max(len(e.ids) for e in batch), available_memory(self.model.device) / 1e9
                    raise RunError(
                        f"out of memory at one row of {longest} tokens or less ({free:.1f} GB are free); try a smaller "
                        "--set max_length, fewer virtual tokens, or a smaller model"
                    ) from error
            else:
                prompt.backward(gradient)
                return loss
            # Outside of the handler: the error's traceback holds on to the tensors of the failed attempt.
            self.progress.micro_batch_tokens //= 2
            self.watcher.smaller(self.progress.step + 1, self.progress.micro_batch_tokens)

    def _cut(self, share: list[Example]) -> list[list[Example]]:
        cut = micro_batches(share, self.progress.micro_batch_tokens, len(self.plan.text), self.model.way.pads)
        return [[share[i] for i in part] for part in cut]

    def _summed(self, prompt: Tensor, cuts: list[list[list[Example]]]) -> tuple[float, Tensor]:
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
