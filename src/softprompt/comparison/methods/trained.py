"""Methods that learn by gradients, all in the same loop."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace

from softprompt.comparison.costs import Effort, measured
from softprompt.comparison.methods.base import FitResult, Method, Predictor
from softprompt.comparison.results import Point
from softprompt.data.batching import batch_indices
from softprompt.training.callbacks import NO_CALLBACK, Callback
from softprompt.training.prepare import PreparedRun, most_steps
from softprompt.training.search import FACTORS
from softprompt.training.trainer import Throughput, Trainer, Weights, measure_throughput
from softprompt.training.tune import reproducible

_SHARE = 0.1  # of the budget, for each learning rate that is tried
_FEWEST = 20  # steps that tell which learning rate ends best; after fewer a low one seems better than it is


class _Curve(Callback):
    """Notes the validation figures, and hands on what it is told."""

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

    def smaller(self, step: int, micro_batch_tokens: int) -> None:
        self.callback.smaller(step, micro_batch_tokens)

    def end(self) -> None:
        self.callback.end()


class Trained(Method):
    """Methods that learn by gradients, in the same loop.

    Attributes:
        rate: the usual learning rate; None for that of a prompt's plan.
        settings: of all plans.
        throughput: how long steps and evaluations take, where it is known.
    """

    rate: float | None = None
    settings: Mapping[str, object] = {}
    throughput: Throughput | None = None

    @abstractmethod
    def trainer(self, prepared: PreparedRun, callback: Callback = NO_CALLBACK) -> Trainer:
        """Return a loop that begins anew."""

    @abstractmethod
    def answers(self, weights: Weights, label_bias: dict[str, float]) -> Predictor:
        """Return how rows are answered with what was learned."""

    def measured_throughput(self) -> tuple[Throughput, Effort]:
        """Return how long steps and evaluations take, and what it took to find out."""
        protocol = self.protocol
        with measured(protocol.model.device) as effort, reproducible(protocol.config.threads):
            throughput = measure_throughput(self.trainer(self._usual()), protocol.seconds)
        return throughput, effort

    def _usual(self) -> PreparedRun:
        """Make the plan with the usual learning rate."""
        rate = self.protocol.config.learning_rate or self.rate
        return self.protocol.prepared(seed=self.seed, learning_rate=rate, **self.settings)

    def learn(self) -> FitResult:
        protocol, began = self.protocol, time.monotonic()
        curve, tokens, every = _Curve(self.callback), 0, protocol.config.eval_every
        with measured(protocol.model.device) as effort, reproducible(protocol.config.threads):
            prepared = self._usual()
            assert prepared.config.max_steps
            rate = prepared.config.learning_rate
            length, throughput, most = (
                {"max_steps": prepared.config.max_steps},
                None,
                most_steps(prepared, protocol.config),
            )
            if protocol.equal == "time":
                throughput = self.throughput or measure_throughput(self.trainer(prepared), protocol.seconds)
                length = throughput.fit_to_budget(protocol.seconds - (time.monotonic() - began), most, every)
            tried = self._tried(length["max_steps"], throughput)
            if tried:
                if throughput is not None:
                    prepared = protocol.prepared(seed=self.seed, learning_rate=rate, **length, **self.settings)
                rate = self._searched(prepared, tried)
                tokens += len(FACTORS) * _tokens(prepared, tried)
                if throughput is not None:
                    length = throughput.fit_to_budget(protocol.seconds - (time.monotonic() - began), most, every)
                else:
                    length = {"max_steps": length["max_steps"] - len(FACTORS) * tried}
            self._prepared = protocol.prepared(seed=self.seed, learning_rate=rate, **length, **self.settings)
            trainer = self.trainer(self._prepared, curve)
            curve.begin(self._prepared, 0)
            try:
                outcome = trainer.run()
            finally:
                curve.end()
        self._answers = self.answers(outcome.weights, outcome.label_bias)
        tokens += _tokens(self._prepared, outcome.progress.step)
        parameters = sum(parameter.numel() for parameter in trainer.learned.values())
        settings = {**self.noted(), "search": bool(tried), "best_step": outcome.progress.best_step}
        settings["prior_matching"] = bool(outcome.label_bias)
        return FitResult(self._answers, parameters, effort, tokens, settings, curve.points)

    def noted(self) -> dict[str, object]:
        """Return the settings that were in force."""
        return self._prepared.config.model_dump()

    def _tried(self, steps: int, throughput: Throughput | None) -> int:
        """Return how many steps each learning rate is tried for; 0 if none is searched, or so few tell nothing."""
        protocol = self.protocol
        if not protocol.search or protocol.config.learning_rate is not None:
            return 0
        share = (
            _SHARE * steps
            if throughput is None
            else (_SHARE * protocol.seconds - throughput.evaluation) / throughput.step
        )
        return int(share) if share >= _FEWEST else 0

    def _searched(self, prepared: PreparedRun, tried: int) -> float:
        """Return the learning rate with the lowest validation loss after the first steps of a plan's run."""
        usual, found = prepared.config.learning_rate, []
        assert usual
        for number, factor in enumerate(FACTORS):
            config = prepared.config.model_copy(update={"learning_rate": usual * factor})
            loss = self.trainer(replace(prepared, config=config)).tried(tried)
            self.callback.candidate({"learning_rate": config.learning_rate}, tried, loss)
            found.append((loss, number))
        return usual * FACTORS[min(found)[1]]


def _tokens(prepared: PreparedRun, steps: int) -> int:
    """Return the text tokens of a plan's first steps."""
    config = prepared.config
    assert config.batch_size
    drawn = (
        i for step in range(steps) for i in batch_indices(len(prepared.examples), config.batch_size, step, config.seed)
    )
    return sum(len(prepared.examples[i].ids) for i in drawn)
