"""Methods that learn by gradients, all with the same trainer."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace

from softprompt.comparison.costs import measure
from softprompt.comparison.methods.base import FitResult, Method, Predictor
from softprompt.comparison.results import Point
from softprompt.data.batching import batch_indices
from softprompt.training.callbacks import NO_CALLBACK, Callback
from softprompt.training.prepare import PreparedRun, most_steps
from softprompt.training.search import FACTORS, successive_halving
from softprompt.training.throughput import Throughput
from softprompt.training.trainer import Trainer, Weights, reproducible

_SHARE = 0.1  # of the budget, for each learning rate that is tried
MIN_SEARCH_STEPS = 20  # steps per learning rate; after fewer, a low one seems better than it is


class _Curve(Callback):
    """Records the validation figures, and passes everything on to another callback."""

    def __init__(self, callback: Callback) -> None:
        self.callback, self.began = callback, time.monotonic()
        self.points: list[Point] = []
        self._losses: list[float] = []

    def begin(self, prepared: PreparedRun, step: int) -> None:
        self.points.clear()
        self.callback.begin(prepared, step)

    def step(self, step: int, loss: float) -> None:
        self._losses.append(loss)
        self.callback.step(step, loss)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        self._losses.clear()
        self.points.append(Point(step=step, seconds=time.monotonic() - self.began, loss=loss, validation=values))
        self.callback.evaluation(step, values)

    def micro_batch_reduced(self, step: int, micro_batch_tokens: int) -> None:
        self.callback.micro_batch_reduced(step, micro_batch_tokens)

    def end(self) -> None:
        self.callback.end()


class Trained(Method):
    """Methods that learn by gradients."""

    default_learning_rate: float | None = None  # None for that of a prompt
    settings: Mapping[str, object] = {}  # of every run

    @abstractmethod
    def trainer(self, prepared: PreparedRun, callback: Callback = NO_CALLBACK) -> Trainer:
        """Return a trainer at step 0."""

    @abstractmethod
    def predictor(self, weights: Weights, label_bias: dict[str, float]) -> Predictor:
        """Return what scores rows with the trained weights."""

    def fit(self) -> FitResult:
        protocol, began = self.protocol, time.monotonic()
        curve, tokens, every = _Curve(self.callback), 0, protocol.config.eval_every
        with measure(protocol.model.device) as effort, reproducible(protocol.config.threads):
            prepared = self._prepare(protocol.config.learning_rate or self.default_learning_rate)
            assert prepared.config.max_steps
            rate = prepared.config.learning_rate
            length, throughput = {"max_steps": prepared.config.max_steps}, None
            most = most_steps(prepared, protocol.config)
            if protocol.equal == "time":
                throughput = protocol.measure_throughput(self.trainer(prepared), protocol.seconds)
                length = throughput.fit_to_budget(protocol.seconds - (time.monotonic() - began), most, every)
            search_steps = self._search_steps(length["max_steps"], throughput)
            if search_steps:
                if throughput is not None:
                    prepared = self._prepare(rate, length)
                rate = self._search_rate(prepared, search_steps)
                tokens += len(FACTORS) * _count_tokens(prepared, search_steps)
                if throughput is not None:
                    length = throughput.fit_to_budget(protocol.seconds - (time.monotonic() - began), most, every)
                else:
                    length = {"max_steps": length["max_steps"] - len(FACTORS) * search_steps}
            self._prepared = self._prepare(rate, length)
            trainer = self.trainer(self._prepared, curve)
            curve.begin(self._prepared, 0)
            try:
                outcome = trainer.run()
            finally:
                curve.end()
        self._predictor = self.predictor(outcome.weights, outcome.label_bias)
        tokens += _count_tokens(self._prepared, outcome.state.step)
        parameters = sum(parameter.numel() for parameter in trainer.parameters.values())
        settings = {**self.used_settings(), "search": bool(search_steps), "best_step": outcome.state.best_step}
        settings["prior_matching"] = bool(outcome.label_bias)
        return FitResult(self._predictor, parameters, effort, tokens, settings, curve.points)

    def used_settings(self) -> dict[str, object]:
        """Return the settings of the final run."""
        return self._prepared.config.model_dump()

    def _prepare(self, rate: float | None, length: Mapping[str, object] | None = None) -> PreparedRun:
        """Prepare a run with a learning rate, and of a length where one is given."""
        return self.protocol.prepare(seed=self.seed, learning_rate=rate, **(length or {}), **self.settings)

    def _search_steps(self, steps: int, throughput: Throughput | None) -> int:
        """Return the number of steps for each learning rate; 0 for no search, also where they would be too few."""
        protocol = self.protocol
        if not protocol.search or protocol.config.learning_rate is not None:
            return 0
        if throughput is None:
            share = _SHARE * steps
        else:
            share = (_SHARE * protocol.seconds - throughput.evaluation) / throughput.step
        return int(share) if share >= MIN_SEARCH_STEPS else 0

    def _search_rate(self, prepared: PreparedRun, steps: int) -> float:
        """Return the learning rate with the lowest validation loss after the first steps of a run."""
        usual = prepared.config.learning_rate
        assert usual

        def score(factor: float, steps: int) -> float:
            config = prepared.config.model_copy(update={"learning_rate": usual * factor})
            loss = self.trainer(replace(prepared, config=config)).loss_after(steps)
            self.callback.candidate({"learning_rate": config.learning_rate}, steps, loss)
            return -loss

        return usual * successive_halving(FACTORS, [steps], score)


def _count_tokens(prepared: PreparedRun, steps: int) -> int:
    """Return the number of text tokens in the first steps of a run."""
    config, examples = prepared.config, prepared.examples
    assert config.batch_size
    batches = (batch_indices(len(examples), config.batch_size, step, config.seed) for step in range(steps))
    return sum(len(examples[i].ids) for batch in batches for i in batch)
