"""The training loop: steps, evaluations and saved states, whatever it is that learns."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from softprompt.config import TuneConfig
from softprompt.data.batching import batch_indices, micro_batches, shard_by_length
from softprompt.data.example import Example
from softprompt.distributed.collective import ALONE, Processes
from softprompt.distributed.signals import defer_signals
from softprompt.errors import InputError, RunError, is_out_of_memory
from softprompt.evaluation.calibration import fit_label_bias
from softprompt.evaluation.scorer import Scorer
from softprompt.evaluation.scores import LabelScores, Scores
from softprompt.model.frozen import FrozenModel
from softprompt.model.memory import available_memory
from softprompt.training.callbacks import Callback
from softprompt.training.prepare import PreparedRun
from softprompt.training.run_folder import Checkpoint, RunFolder, SilentRunFolder, TrainerState
from softprompt.training.settings import EVALUATIONS

_MOMENTS = ("exp_avg", "exp_avg_sq")
TIMED = 4  # steps at most
TIMING = 0.05  # of the time, from which on no further step is timed
_EVALUATED = 0.25  # of the time
_FEW = 16  # validation rows that all labels are timed on
_FEWEST = 32  # validation rows to choose by where they are slow to score
_LEARNED, _BEST = "learned", "best"
Weights = dict[str, Tensor]
# Of each process, the micro-batches of its share of a batch.
MicroBatchesByRank = list[list[list[Example]]]


@dataclass(frozen=True)
class TrainResult:
    """What a loop's run gave.

    Attributes:
        weights: the best ones.
        progress: where the run stands.
        scores: the best weights' validation scores, with the label bias; None without validation rows.
        label_bias: the nats that labels are chosen with, empty if none.
    """

    weights: Weights
    progress: TrainerState
    scores: Scores | None
    label_bias: dict[str, float]


class Trainer(ABC):
    """Takes a plan's steps, from the beginning or from a saved state.

    Args:
        model: the model, which may have what learns in it.
        prepared: what is learned from, and how.
        run: where it is written down.
        callback: told of every step.
        learned: what the optimizer changes, by name.
        state: where to go on; None to begin.
        processes: those that share a step.
    """

    shared_text_len = 0  # tokens of every example that its prefix holds

    def __init__(
        self,
        model: FrozenModel,
        prepared: PreparedRun,
        run: RunFolder,
        callback: Callback,
        learned: Mapping[str, Parameter],
        state: Checkpoint | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.prepared, self.folder, self.callback = model, prepared, run, callback
        self.learned, self.processes = dict(learned), processes
        self.whole = True  # not in the middle of a step
        config = prepared.config
        assert config.micro_batch_tokens and config.max_steps and config.eval_every
        self.progress = TrainerState(micro_batch_tokens=config.micro_batch_tokens, processes=processes.count)
        self.optimizer = torch.optim.AdamW(self.learned.values(), weight_decay=config.weight_decay)
        self.max_steps, self.eval_every = config.max_steps, config.eval_every
        if state is not None:
            self._restore(state)
        self.best = state.named(_BEST) if state is not None else self.weights()

    @abstractmethod
    def backward(self, micro_batches_by_rank: MicroBatchesByRank) -> float:
        """Add to the gradients of what is learned, and return the loss, both means over the batch's target tokens."""

    @abstractmethod
    def weights(self) -> Weights:
        """Return a copy of what a run gives, as it stands."""

    @abstractmethod
    def evaluate(self, weights: Weights | None = None, scorer: Scorer | None = None) -> Scores:
        """Score rows with weights, or with what is learned as it stands; the plan's validation rows, or a scorer's."""

    def run(self) -> TrainResult:
        """Take all steps that are left, and find the bias that labels are chosen with.

        Raises:
            RunError: the loss is not finite, or one row does not fit in memory.
        """
        progress, save_every = self.progress, self.prepared.config.save_every
        scores = self.evaluate(self.best) if self.prepared.scorer and progress.evaluated >= 0 else None
        try:
            while True:
                scores = self._evaluated(scores)
                done = self._done()
                if progress.step and (done or progress.step % save_every == 0):
                    self._save()
                if done:
                    break
                self.step()
        except (KeyboardInterrupt, SystemExit):  # the latter is what handlers of a script's own raise
            if progress.step and self.whole:
                self._save()
            raise
        if not self.prepared.scorer:
            self._keep(None)
        found, label_bias = self._matched(scores)
        if found is not None and found is not scores:
            # A bias changes no loss; what is scored once more, by other processes, may be rounded differently.
            progress.best = {**found.values(), "loss": progress.best["loss"]}
        return TrainResult(self.best, progress, found, label_bias)

    def _save(self) -> None:
        """Save the state; who asks once more to stop waits until it is there."""
        with defer_signals():
            self.folder.save_state(self._state())

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Do what belongs together: stops wait until it is done, and where it fails, no state is saved."""
        with defer_signals():
            self.whole = False
            yield
            self.whole = True

    def _matched(self, scores: Scores | None) -> tuple[Scores | None, dict[str, float]]:
        """Find the bias that labels are chosen with, where one is of use.

        Args:
            scores: the best weights'; None without validation rows.

        Returns:
            The scores, with the bias if it is taken, of many labels for the first time; and the bias, empty if not.
        """
        many = self.prepared.label_scorer()
        plain = self.evaluate(self.best, many) if many else scores
        return fit_label_bias(plain, self.prepared.train) if isinstance(plain, LabelScores) else (plain, {})

    def tried(self, steps: int) -> float:
        """Go on until so many steps are done, to see what comes of it: no state is saved, and no best prompt kept.

        Returns:
            The loss on the validation rows then; infinite where a loss was not finite.
        """
        try:
            while self.progress.step < steps:
                self.step()
            loss = self.evaluate().values()["loss"]
        except RunError:
            return math.inf
        return loss if math.isfinite(loss) else math.inf

    def _done(self) -> bool:
        """Tell whether all steps are done, or the loss has not fallen for `patience` evaluations."""
        progress, patience = self.progress, self.prepared.config.patience
        stale = self.prepared.scorer and patience and progress.step - progress.best_step >= patience * self.eval_every
        return progress.step >= self.max_steps or bool(stale)

    def _evaluated(self, scores: Scores | None) -> Scores | None:
        """Evaluate what was learned where it is time to, and return the best scores."""
        step = self.progress.step
        due = step % self.eval_every == 0 or step == self.max_steps
        if not (self.prepared.scorer and due) or self.progress.evaluated >= step:
            return scores
        now = self.evaluate()
        values = now.values()
        with self._all_or_nothing():
            if scores is None or now.better_than(scores):
                scores = now
                self._keep(now)
            self.progress.evaluated = step
            self.folder.log({"step": step, "validation": values})
        self.callback.evaluation(step, values)
        return scores

    def gradient(self, batch: list[Example]) -> float:
        """Set the gradients of what is learned, with smaller micro-batches where memory is too little or runs out.

        Returns:
            The loss, the mean over the batch's target tokens as the gradients are.

        Raises:
            RunError: one row does not fit in memory.
        """
        while True:
            self.optimizer.zero_grad()
            micro_batches_by_rank = [
                self._cut([batch[i] for i in hand]) for hand in shard_by_length(batch, self.processes.count)
            ]
            try:
                return self.backward(micro_batches_by_rank)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if all(len(part) == 1 for cut in micro_batches_by_rank for part in cut):
                    longest, free = max(len(e.ids) for e in batch), available_memory(self.model.device) / 1e9
                    raise RunError(
                        f"out of memory at one row of {longest} tokens or less ({free:.1f} GB are free); try a smaller "
                        "--set max_length, fewer virtual tokens, or a smaller model"
                    ) from error
            # Outside of the handler: the error's traceback holds on to the tensors of the failed attempt.
            self.progress.micro_batch_tokens //= 2
            self.callback.smaller(self.progress.step + 1, self.progress.micro_batch_tokens)

    def _cut(self, share: list[Example]) -> list[list[Example]]:
        cut = micro_batches(share, self.progress.micro_batch_tokens, self.shared_text_len, self.model.backend.pads)
        return [[share[i] for i in part] for part in cut]

    def step(self) -> None:
        """Take one step: the gradient of its rows, an update, and a line in `metrics.jsonl`."""
        config, progress = self.prepared.config, self.progress
        assert config.batch_size
        began = time.monotonic()
        rows = batch_indices(len(self.prepared.examples), config.batch_size, progress.step, config.seed)
        batch = [self.prepared.examples[i] for i in rows]
        loss = self.gradient(batch)
        norm = torch.nn.utils.clip_grad_norm_(self.learned.values(), config.max_grad_norm)
        if not (math.isfinite(loss) and bool(torch.isfinite(norm))):
            kept = "" if isinstance(self.folder, SilentRunFolder) else "; the state of the last saved step is kept"
            raise RunError(
                f"the loss is not finite at step {progress.step + 1} (loss {loss}){kept}. Try a lower "
                "learning_rate, or dtype=float32"
            )
        rate = learning_rate(config, progress.step)
        self.optimizer.param_groups[0]["lr"] = rate
        with self._all_or_nothing():
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
        self.callback.step(progress.step, loss)

    def _keep(self, scores: Scores | None) -> None:
        self.best = self.weights()
        self.progress.best_step = self.progress.step
        self.progress.best = scores.values() if scores else {}

    def _state(self) -> Checkpoint:
        tensors = {f"{_BEST}.{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.learned.items():
            tensors[f"{_LEARNED}.{name}"] = parameter.detach()
            if parameter in self.optimizer.state:  # not a weight that text does not come by, as those for images
                tensors |= {f"{moment}.{name}": self.optimizer.state[parameter][moment] for moment in _MOMENTS}
        return Checkpoint(self.progress, tensors)

    def _restore(self, state: Checkpoint) -> None:
        self.progress = state.progress
        try:
            for name, parameter in self.learned.items():
                parameter.data.copy_(state.tensors[f"{_LEARNED}.{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(state.progress.step)),
                    **{moment: state.tensors[f"{moment}.{name}"] for moment in _MOMENTS},
                }
        except (KeyError, RuntimeError) as error:
            raise InputError(
                f"the state of step {state.progress.step} in {self.folder.path} is damaged: {error}; remove its "
                "folder, and the run goes on from the state before"
            ) from error


@dataclass(frozen=True)
class Throughput:
    """How long a loop takes, in seconds of wall time.

    Attributes:
        step: for a step.
        evaluation: for an evaluation of the validation rows.
        last: for the label bias, after the last step.
        rows: validation rows that were scored; 0 if there have to be so many.
    """

    step: float
    evaluation: float
    last: float = 0.0
    rows: int = 0

    def fit_to_budget(self, seconds: float, most: int | None = None, eval_every: int | None = None) -> dict[str, int]:
        """Return `max_steps` and `eval_every` of a run that takes about so much time: one step at least, or at `most`.

        Unless it is given how often to evaluate, evaluations take a quarter of the time at most: where they are slow
        there are fewer, though not less than two and the one before the first step, and these score fewer rows,
        `eval_rows`. So does what follows the last step; what it takes beyond that comes on top.
        """
        fit_to_budget = int(self.rows * _EVALUATED * seconds / (3 * self.evaluation)) if self.evaluation else self.rows
        if eval_every is None and fit_to_budget < self.rows > _FEWEST:
            rows = max(fit_to_budget, _FEWEST)
            return {**self.of(rows).fit_to_budget(seconds, most), "eval_rows": rows}
        seconds -= min(self.last, _EVALUATED * seconds)
        affordable = _EVALUATED * seconds / self.evaluation - 1 if self.evaluation else EVALUATIONS
        evaluations = round(min(max(affordable, 2), EVALUATIONS))
        if eval_every is None:
            steps = int((seconds - (evaluations + 1) * self.evaluation) / self.step)
        else:
            steps = int((seconds - self.evaluation) / (self.step + self.evaluation / eval_every))
        steps = max(1, steps)
        steps = min(steps, most or steps)
        return {"max_steps": steps, "eval_every": eval_every or math.ceil(steps / evaluations)}

    def of(self, rows: int) -> Throughput:
        """Return what it takes with so many validation rows, and not fewer."""
        share = rows / self.rows
        return Throughput(self.step, share * self.evaluation, share * self.last)


def measure_throughput(trainer: Trainer, seconds: float) -> Throughput:
    """Run a few steps of a loop and an evaluation; nothing is learned, for the steps have no length.

    Args:
        trainer: what is to run for so many `seconds`.
    """
    config, prepared, evaluation, last = trainer.prepared.config, trainer.prepared, 0.0, 0.0
    assert config.batch_size and config.max_steps
    trainer.optimizer.param_groups[0]["lr"] = 0.0
    # Rows that no step takes may not begin as the others do.
    steps = [number % config.max_steps for number in range(TIMED + 1)]
    batches = [batch_indices(len(prepared.examples), config.batch_size, step, config.seed) for step in steps]
    for number, rows in enumerate(batches):
        if number <= 1:  # the first one sets things up
            began = time.monotonic()
        trainer.gradient([prepared.examples[i] for i in rows])
        trainer.optimizer.step()
        spent = time.monotonic() - began
        if number and spent > TIMING * seconds and trainer.processes.count == 1:
            break  # of several processes all have to take the same steps
    step = spent / number
    if prepared.scorer:
        began = time.monotonic()
        trainer.evaluate()
        evaluation = time.monotonic() - began
        scorer = prepared.label_scorer(_FEW)
        if scorer is not None:
            began = time.monotonic()
            trainer.evaluate(scorer=scorer)
            last = (time.monotonic() - began) * len(prepared.scorer.rows) / len(scorer.rows)
    return Throughput(step, evaluation, last, len(prepared.scorer.rows) if prepared.scorer else 0)


def learning_rate(config: TuneConfig, step: int) -> float:
    """Return the rate of a step (counted from 0): a linear rise, then the schedule's fall to zero."""
    assert config.learning_rate and config.max_steps
    warmup = max(1, round(config.warmup_ratio * config.max_steps)) if config.warmup_ratio else 0
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.max_steps - warmup)
    falls = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * falls[config.schedule]
