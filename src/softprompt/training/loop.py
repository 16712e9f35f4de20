"""The training loop: steps, evaluations and saved states."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

from softprompt.config import TuneConfig
from softprompt.data.batching import deal, draw, micro_batches
from softprompt.data.examples import Example
from softprompt.errors import RunError
from softprompt.evaluation.scoring import Scores
from softprompt.model.frozen import FrozenModel
from softprompt.model.gradient import prompt_gradient
from softprompt.model.memory import available_memory, give_back, is_out_of_memory
from softprompt.processes import ALONE, Processes
from softprompt.training.plan import Plan
from softprompt.training.run_folder import Progress, RunFolder, State
from softprompt.training.watcher import Watcher

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Loop:
    """Takes a plan's steps, from the beginning or from a saved state."""

    def __init__(
        self,
        model: FrozenModel,
        plan: Plan,
        run: RunFolder,
        watcher: Watcher,
        state: State | None,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.plan, self.folder, self.watcher, self.processes = model, plan, run, watcher, processes
        config = plan.config
        assert config.micro_batch_tokens and config.max_steps and config.eval_every
        self.prompt = torch.nn.Parameter(plan.start.clone())
        self.best = plan.start.clone()
        self.progress = Progress(micro_batch_tokens=config.micro_batch_tokens, processes=processes.count)
        self.optimizer = torch.optim.AdamW([self.prompt], weight_decay=config.weight_decay)
        self.max_steps, self.eval_every = config.max_steps, config.eval_every
        if state is not None:
            self._restore(state)

    def run(self) -> tuple[Tensor, Progress, Scores | None]:
        """Take all steps that are left.

        Returns:
            The best prompt `[P, H]`, where the run stands, and the best prompt's scores; None without validation rows.

        Raises:
            RunError: the loss is not finite, or one row does not fit in memory.
        """
        progress, save_every = self.progress, self.plan.config.save_every
        scores = self._evaluate(self.best) if self.plan.scorer and progress.evaluated >= 0 else None
        try:
            while True:
                scores = self._evaluated(scores)
                if progress.step and (self._done() or progress.step % save_every == 0):
                    self.folder.save_state(self._state())
                if self._done():
                    break
                self.step()
        except KeyboardInterrupt:
            if progress.step:
                self.folder.save_state(self._state())
            raise
        if not self.plan.scorer:
            self._keep(None)
        return self.best, progress, scores

    def _done(self) -> bool:
        """Tell whether all steps are done, or the loss has not fallen for `patience` evaluations."""
        progress, patience = self.progress, self.plan.config.patience
        stale = self.plan.scorer and patience and progress.step - progress.best_step >= patience * self.eval_every
        return progress.step >= self.max_steps or bool(stale)

    def _evaluated(self, scores: Scores | None) -> Scores | None:
        """Evaluate the prompt where it is time to, and return the best prompt's scores."""
        step = self.progress.step
        due = step % self.eval_every == 0 or step == self.max_steps
        if not (self.plan.scorer and due) or self.progress.evaluated >= step:
            return scores
        now = self._evaluate(self.prompt.detach())
        values = now.values()
        with interrupts_deferred():
            if scores is None or now.better_than(scores):
                scores = now
                self._keep(now)
            self.progress.evaluated = step
            self.folder.log({"step": step, "validation": values})
        self.watcher.evaluation(step, values)
        return scores

    def step(self) -> None:
        """Take one step: the gradient of its rows, an update, and a line in `metrics.jsonl`."""
        config, progress = self.plan.config, self.progress
        assert config.batch_size
        began = time.monotonic()
        rows = draw(len(self.plan.examples), config.batch_size, progress.step, config.seed)
        batch = [self.plan.examples[i] for i in rows]
        loss, gradient = self._gradient(batch)
        self.prompt.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_([self.prompt], config.max_grad_norm)
        if not (math.isfinite(loss) and bool(torch.isfinite(norm))):
            raise RunError(
                f"the loss is not finite at step {progress.step + 1} (loss {loss}); the state of the last saved step "
                "is kept. Try a lower learning_rate, or dtype=float32"
            )
        rate = learning_rate(config, progress.step)
        self.optimizer.param_groups[0]["lr"] = rate
        with interrupts_deferred():
            self.optimizer.step()
            progress.step += 1
            record = {
                "step": progress.step,
                "loss": loss,
                "learning_rate": rate,
                "tokens": sum(len(example.ids) for example in batch),
                "step_seconds": round(time.monotonic() - began, 4),
            }
            self.folder.log(record)
        self.watcher.step(progress.step, loss)

    def _gradient(self, batch: list[Example]) -> tuple[float, Tensor]:
        """Return a step's loss and gradient, with smaller micro-batches where memory is too little or runs out."""
        while True:
            cuts = [self._cut([batch[i] for i in hand]) for hand in deal(batch, self.processes.count)]
            try:
                return self._summed(cuts)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if all(len(part) == 1 for cut in cuts for part in cut):
                    longest, free = max(len(e.ids) for e in batch), available_memory(self.model.device) / 1e9
                    raise RunError(
                        f"out of memory at one row of {longest} tokens or less ({free:.1f} GB are free); try a smaller "
                        "--set max_length, fewer virtual tokens, or a smaller model"
                    ) from error
            # Outside of the handler: the error's traceback holds on to the tensors of the failed attempt.
            self.progress.micro_batch_tokens //= 2
            self.watcher.smaller(self.progress.step + 1, self.progress.micro_batch_tokens)

    def _cut(self, share: list[Example]) -> list[list[Example]]:
        cut = micro_batches(share, self.progress.micro_batch_tokens, len(self.plan.text), self.model.way.pads)
        return [[share[i] for i in part] for part in cut]

    def _summed(self, cuts: list[list[list[Example]]]) -> tuple[float, Tensor]:
        """Return a step's loss and gradient, of which each process computes its own micro-batches'."""
        mine = cuts[self.processes.rank]
        if self.processes.count == 1:
            return self._own(mine)
        targets = [sum(example.targets for part in cut for example in part) for cut in cuts]
        shape = (1 + self.prompt.numel(),)

        def share() -> Tensor:
            if not targets[self.processes.rank]:  # fewer rows than processes
                return torch.zeros(shape)
            loss, gradient = self._own(mine)
            both = torch.cat([torch.tensor([loss], dtype=torch.float64), gradient.double().flatten()])
            return both * targets[self.processes.rank]

        whole = self.processes.total(share, shape) / sum(targets)
        return float(whole[0]), whole[1:].view_as(self.prompt).float()

    def _own(self, parts: list[list[Example]]) -> tuple[float, Tensor]:
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
        return prompt_gradient(self.model, self.prompt, self.plan.text, parts, recompute)

    def _free(self, needed: float) -> float:
        """Return the memory that is free; what earlier steps left to the allocator too, where less is than needed."""
        free = available_memory(self.model.device)
        if free < needed:
            give_back()
            free = available_memory(self.model.device)
        return free

    def _evaluate(self, prompt: Tensor) -> Scores:
        assert self.plan.scorer is not None
        return self.plan.scorer.score(self.model, prompt)

    def _keep(self, scores: Scores | None) -> None:
        self.best = self.prompt.detach().clone()
        self.progress.best_step = self.progress.step
        self.progress.best = scores.values() if scores else {}

    def _state(self) -> State:
        moments = self.optimizer.state[self.prompt]
        tensors = {"prompt": self.prompt.detach(), "best": self.best, **{name: moments[name] for name in _MOMENTS}}
        return State(self.progress, tensors)

    def _restore(self, state: State) -> None:
        self.progress = state.progress
        self.prompt.data.copy_(state.tensors["prompt"])
        self.best = state.tensors["best"]
        self.optimizer.state[self.prompt] = {
            "step": torch.tensor(float(state.progress.step)),
            **{name: state.tensors[name] for name in _MOMENTS},
        }


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let a Ctrl-C wait until the block is done: a step is done whole or not at all."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals arrive in the main thread only
        return
    caught: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught and callable(before):
        before(*caught[0])


def learning_rate(config: TuneConfig, step: int) -> float:
    """Return the rate of a step (counted from 0): a linear rise, then the schedule's fall to zero."""
    assert config.learning_rate and config.max_steps
    warmup = max(1, round(config.warmup_ratio * config.max_steps)) if config.warmup_ratio else 0
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.max_steps - warmup)
    falls = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * falls[config.schedule]
