"""The training loop: steps, evaluations and checkpoints, whichever parameters are trained."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from softprompt.data.batching import batch_indices, micro_batches, shard_by_length
from softprompt.data.example import Example
from softprompt.distributed.collective import ALONE, Processes
from softprompt.distributed.signals import defer_signals
from softprompt.errors import InputError, RunError, is_out_of_memory
from softprompt.evaluation.calibration import fit_label_bias
from softprompt.evaluation.scorer import Scorer
from softprompt.evaluation.scores import LabelScores, Scores
from softprompt.model.frozen import FrozenModel
from softprompt.training.callbacks import NO_CALLBACK, Callback
from softprompt.training.checkpoint import Checkpoint, TrainerState
from softprompt.training.prepare import PreparedRun
from softprompt.training.run_log import RunLog
from softprompt.training.schedule import learning_rate

_MOMENTS = ("exp_avg", "exp_avg_sq")
_LEARNED, _BEST = "learned", "best"
Weights = dict[str, Tensor]
# For each process the micro-batches of its share of a batch.
MicroBatchesByRank = list[list[list[Example]]]


@dataclass(frozen=True)
class TrainResult:
    """What training gave.

    Attributes:
        weights: the best ones.
        state: where the run stands.
        scores: the best weights' validation scores, with the label bias; None without validation rows.
        label_bias: nats that are added to labels' log-likelihoods, empty if none.
    """

    weights: Weights
    state: TrainerState
    scores: Scores | None
    label_bias: dict[str, float]


class Trainer(ABC):
    """Takes the steps of a run, from the beginning or from a checkpoint.

    Args:
        model: the model; its own weights may be what is trained.
        prepared: what is learned from, and how.
        parameters: the trainable parameters, by name.
        run_log: where the run is written down; None to write nothing.
        callback: called at steps and evaluations.
        checkpoint: where to resume; None to begin.
        processes: those that share a step.
    """

    shared_text_len = 0  # tokens of every example that the prefix holds

    def __init__(
        self,
        model: FrozenModel,
        prepared: PreparedRun,
        parameters: Mapping[str, Parameter],
        run_log: RunLog | None = None,
        callback: Callback = NO_CALLBACK,
        checkpoint: Checkpoint | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.prepared, self.run_log, self.callback = model, prepared, run_log, callback
        self.parameters, self.processes = dict(parameters), processes
        self._mid_step = False
        config = prepared.config
        assert config.micro_batch_tokens and config.max_steps and config.eval_every
        self.state = TrainerState(micro_batch_tokens=config.micro_batch_tokens, processes=processes.count)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), weight_decay=config.weight_decay)
        self.max_steps, self.eval_every = config.max_steps, config.eval_every
        if checkpoint is not None:
            self._restore(checkpoint)
        self.best = checkpoint.group(_BEST) if checkpoint is not None else self.weights()

    @abstractmethod
    def backward(self, micro_batches_by_rank: MicroBatchesByRank) -> float:
        """Compute the gradients, and return the loss; both are means over the batch's target tokens."""

    @abstractmethod
    def weights(self) -> Weights:
        """Return a copy of the current weights."""

    @abstractmethod
    def evaluate(self, weights: Weights | None = None, scorer: Scorer | None = None) -> Scores:
        """Score the validation rows, or a scorer's, with the current weights, or with those given."""

    def run(self) -> TrainResult:
        """Take all remaining steps, and fit the label bias.

        Raises:
            RunError: the loss is not finite, or one row does not fit in memory.
        """
        state, save_every = self.state, self.prepared.config.save_every
        scores = self.evaluate(self.best) if self.prepared.scorer and state.evaluated >= 0 else None
        try:
            while True:
                scores = self._evaluate_if_due(scores)
                done = self._done()
                if state.step and (done or state.step % save_every == 0):
                    self._save()
                if done:
                    break
                self.step()
        except (KeyboardInterrupt, SystemExit):  # a script's own signal handlers raise the latter
            if state.step and not self._mid_step:
                self._save()
            raise
        if not self.prepared.scorer:
            self._set_best(None)
        found, label_bias = self._fit_label_bias(scores)
        if found is not None and found is not scores:
            # A bias does not change the loss. The rows may have been scored again, with other rounding.
            state.best = {**found.values(), "loss": state.best["loss"]}
        return TrainResult(self.best, state, found, label_bias)

    def _save(self) -> None:
        """Save a checkpoint; another request to stop waits until it is written."""
        if self.run_log is not None:
            with defer_signals():
                self.run_log.save(self._checkpoint())

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Delay signals until the block is done; if it fails, no checkpoint is saved."""
        with defer_signals():
            self._mid_step = True
            yield
            self._mid_step = False

    def _fit_label_bias(self, scores: Scores | None) -> tuple[Scores | None, dict[str, float]]:
        """Fit the label bias on the validation rows.

        Args:
            scores: of the best weights; None without validation rows.

        Returns:
            The scores with the bias, and the bias, which is empty where it does not help. Of many labels, all labels
            are scored here for the first time.
        """
        many = self.prepared.label_scorer()
        plain = self.evaluate(self.best, many) if many else scores
        return fit_label_bias(plain, self.prepared.train) if isinstance(plain, LabelScores) else (plain, {})

    def loss_after(self, steps: int) -> float:
        """Train until so many steps are done, and return the validation loss; infinite where a loss is not finite.

        No checkpoint is saved, and the best weights stay as they were.
        """
        try:
            while self.state.step < steps:
                self.step()
            loss = self.evaluate().values()["loss"]
        except RunError:
            return math.inf
        return loss if math.isfinite(loss) else math.inf

    def _done(self) -> bool:
        """Tell whether all steps are done, or the loss has not fallen for `patience` evaluations."""
        state, patience = self.state, self.prepared.config.patience
        stale = self.prepared.scorer and patience and state.step - state.best_step >= patience * self.eval_every
        return state.step >= self.max_steps or bool(stale)

    def _evaluate_if_due(self, scores: Scores | None) -> Scores | None:
        """Evaluate the current weights if an evaluation is due, and return the best scores."""
        step = self.state.step
        due = step % self.eval_every == 0 or step == self.max_steps
        if not (self.prepared.scorer and due) or self.state.evaluated >= step:
            return scores
        now = self.evaluate()
        values = now.values()
        with self._all_or_nothing():
            if scores is None or now.better_than(scores):
                scores = now
                self._set_best(now)
            self.state.evaluated = step
            self._log({"step": step, "validation": values})
        self.callback.evaluation(step, values)
        return scores

    def gradient(self, batch: list[Example]) -> float:
        """Compute the gradients of a batch, in smaller micro-batches where memory does not suffice.

        Returns:
            The loss; like the gradients, a mean over the batch's target tokens.

        Raises:
            RunError: one row does not fit in memory.
        """
        while True:
            self.optimizer.zero_grad()
            micro_batches_by_rank = [
                self.micro_batches([batch[i] for i in hand]) for hand in shard_by_length(batch, self.processes.count)
            ]
            try:
                return self.backward(micro_batches_by_rank)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if all(len(part) == 1 for cut in micro_batches_by_rank for part in cut):
                    longest, free = max(len(e.ids) for e in batch), self.model.free_memory() / 1e9
                    raise RunError(
                        f"out of memory at one row of {longest} tokens or less ({free:.1f} GB are free); try a smaller "
                        "--set max_length, fewer virtual tokens, or a smaller model"
                    ) from error
            # Outside of the handler: the traceback keeps the tensors of the failed attempt alive.
            self.state.micro_batch_tokens //= 2
            self.callback.micro_batch_reduced(self.state.step + 1, self.state.micro_batch_tokens)

    def micro_batches(self, share: list[Example]) -> list[list[Example]]:
        """Cut the examples that one process runs into micro-batches."""
        cut = micro_batches(share, self.state.micro_batch_tokens, self.shared_text_len, self.model.backend.pads)
        return [[share[i] for i in part] for part in cut]

    def step(self) -> None:
        """Take one step: gradient, update, and a line in `metrics.jsonl`."""
        config, state = self.prepared.config, self.state
        assert config.batch_size
        began = time.monotonic()
        rows = batch_indices(len(self.prepared.examples), config.batch_size, state.step, config.seed)
        batch = [self.prepared.examples[i] for i in rows]
        loss = self.gradient(batch)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm)
        if not (math.isfinite(loss) and bool(torch.isfinite(norm))):
            kept = "" if self.run_log is None else "; the state of the last saved step is kept"
            raise RunError(
                f"the loss is not finite at step {state.step + 1} (loss {loss}){kept}. Try a lower "
                "learning_rate, or dtype=float32"
            )
        rate = learning_rate(config, state.step)
        self.optimizer.param_groups[0]["lr"] = rate
        with self._all_or_nothing():
            self.optimizer.step()
            state.step += 1
            record = {
                "step": state.step,
                "loss": loss,
                "learning_rate": rate,
                "tokens": sum(len(example.ids) for example in batch),
                "step_seconds": round(time.monotonic() - began, 4),
            }
            self._log(record)
        self.callback.step(state.step, loss)

    def _set_best(self, scores: Scores | None) -> None:
        self.best = self.weights()
        self.state.best_step = self.state.step
        self.state.best = scores.values() if scores else {}

    def _checkpoint(self) -> Checkpoint:
        tensors = {f"{_BEST}.{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.parameters.items():
            tensors[f"{_LEARNED}.{name}"] = parameter.detach()
            if (
                parameter in self.optimizer.state
            ):  # weights that text does not use, such as those for images, have no state
                tensors |= {f"{moment}.{name}": self.optimizer.state[parameter][moment] for moment in _MOMENTS}
        return Checkpoint(self.state, tensors)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.state, tensors = checkpoint.state, checkpoint.tensors
        try:
            for name, parameter in self.parameters.items():
                parameter.data.copy_(tensors[f"{_LEARNED}.{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.state.step)),
                    **{moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS},
                }
        except (KeyError, RuntimeError) as error:
            raise InputError(
                f"the state of step {self.state.step} is damaged: {error}; remove the folder "
                f"state/step-{self.state.step} of the run to resume from the state before"
            ) from error

    def _log(self, record: dict[str, Any]) -> None:
        if self.run_log is not None:
            self.run_log.write(record)


@contextmanager
def reproducible(threads: int | None) -> Iterator[None]:
    """Make runs bit-identical: by default, gathering with repeated indices on several threads is not."""
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cores = torch.get_num_threads()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(threads or cores)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
        torch.set_num_threads(cores)
