"""Methods that learn by gradients, all in the same loop."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace

from softprompt.comparison.costs import Effort, measured
from softprompt.comparison.methods.base import Answers, Learned, Method
from softprompt.comparison.results import Point
from softprompt.data.batching import draw
from softprompt.training.callbacks import UNWATCHED, Watcher
from softprompt.training.prepare import Plan, most_steps
from softprompt.training.search import FACTORS
from softprompt.training.trainer import Loop, Pace, Weights, measure_pace
from softprompt.training.tune import reproducible

_SHARE = 0.1  # of the budget, for each learning rate that is tried
_FEWEST = 20  # steps that tell which learning rate ends best; after fewer a low one seems better than it is


class _Curve(Watcher):
    """Notes the validation figures, and hands on what it is told."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher, self.began = watcher, time.monotonic()
        self.points: list[Point] = []
        self._losses: list[float] = []

    def begin(self, plan: Plan, step: int) -> None:
        self.points.clear()
        self.watcher.begin(plan, step)

    def step(self, step: int, loss: float) -> None:
        self._losses.append(loss)
        self.watcher.step(step, loss)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        self._losses.clear()
        self.points.append(Point(step=step, seconds=time.monotonic() - self.began, loss=loss, validation=values))
        self.watcher.evaluation(step, values)

    def smaller(self, step: int, micro_batch_tokens: int) -> None:
        self.watcher.smaller(step, micro_batch_tokens)

    def end(self) -> None:
        self.watcher.end()


class Trained(Method):
    """Methods that learn by gradients, in the same loop.

    Attributes:
        rate: the usual learning rate; None for that of a prompt's plan.
        settings: of all plans.
        pace: how long steps and evaluations take, where it is known.
    """

    rate: float | None = None
    settings: Mapping[str, object] = {}
    pace: Pace | None = None

    @abstractmethod
    def loop(self, plan: Plan, watcher: Watcher = UNWATCHED) -> Loop:
        """Return a loop that begins anew."""

    @abstractmethod
    def answers(self, weights: Weights, label_bias: dict[str, float]) -> Answers:
        """Return how rows are answered with what was learned."""

    def measured_pace(self) -> tuple[Pace, Effort]:
        """Return how long steps and evaluations take, and what it took to find out."""
        protocol = self.protocol
        with measured(protocol.model.device) as effort, reproducible(protocol.config.threads):
            pace = measure_pace(self.loop(self._usual()), protocol.seconds)
        return pace, effort

    def _usual(self) -> Plan:
        """Make the plan with the usual learning rate."""
        rate = self.protocol.config.learning_rate or self.rate
        return self.protocol.plan(seed=self.seed, learning_rate=rate, **self.settings)

    def learn(self) -> Learned:
        protocol, began = self.protocol, time.monotonic()
        curve, tokens, every = _Curve(self.watcher), 0, protocol.config.eval_every
        with measured(protocol.model.device) as effort, reproducible(protocol.config.threads):
            plan = self._usual()
            assert plan.config.max_steps
            rate = plan.config.learning_rate
            length, pace, most = {"max_steps": plan.config.max_steps}, None, most_steps(plan, protocol.config)
            if protocol.equal == "time":
                pace = self.pace or measure_pace(self.loop(plan), protocol.seconds)
                length = pace.fitting(protocol.seconds - (time.monotonic() - began), most, every)
            tried = self._tried(length["max_steps"], pace)
            if tried:
                if pace is not None:
                    plan = protocol.plan(seed=self.seed, learning_rate=rate, **length, **self.settings)
                rate = self._searched(plan, tried)
                tokens += len(FACTORS) * _tokens(plan, tried)
                if pace is not None:
                    length = pace.fitting(protocol.seconds - (time.monotonic() - began), most, every)
                else:
                    length = {"max_steps": length["max_steps"] - len(FACTORS) * tried}
            self._plan = protocol.plan(seed=self.seed, learning_rate=rate, **length, **self.settings)
            loop = self.loop(self._plan, curve)
            curve.begin(self._plan, 0)
            try:
                outcome = loop.run()
            finally:
                curve.end()
        self._answers = self.answers(outcome.weights, outcome.label_bias)
        tokens += _tokens(self._plan, outcome.progress.step)
        parameters = sum(parameter.numel() for parameter in loop.learned.values())
        settings = {**self.noted(), "search": bool(tried), "best_step": outcome.progress.best_step}
        settings["prior_matching"] = bool(outcome.label_bias)
        return Learned(self._answers, parameters, effort, tokens, settings, curve.points)

    def noted(self) -> dict[str, object]:
        """Return the settings that were in force."""
        return self._plan.config.model_dump()

    def _tried(self, steps: int, pace: Pace | None) -> int:
        """Return how many steps each learning rate is tried for; 0 if none is searched, or so few tell nothing."""
        protocol = self.protocol
        if not protocol.search or protocol.config.learning_rate is not None:
            return 0
        share = _SHARE * steps if pace is None else (_SHARE * protocol.seconds - pace.evaluation) / pace.step
        return int(share) if share >= _FEWEST else 0

    def _searched(self, plan: Plan, tried: int) -> float:
        """Return the learning rate with the lowest validation loss after the first steps of a plan's run."""
        usual, found = plan.config.learning_rate, []
        assert usual
        for number, factor in enumerate(FACTORS):
            config = plan.config.model_copy(update={"learning_rate": usual * factor})
            loss = self.loop(replace(plan, config=config)).tried(tried)
            self.watcher.candidate({"learning_rate": config.learning_rate}, tried, loss)
            found.append((loss, number))
        return usual * FACTORS[min(found)[1]]


def _tokens(plan: Plan, steps: int) -> int:
    """Return the text tokens of a plan's first steps."""
    config = plan.config
    assert config.batch_size
    drawn = (i for step in range(steps) for i in draw(len(plan.examples), config.batch_size, step, config.seed))
    return sum(len(plan.examples[i].ids) for i in drawn)
