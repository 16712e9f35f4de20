"""The methods that are compared: each learns, answers rows, and is stored and loaded again, under one protocol."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from softprompt.comparison.costs import Effort, measured
from softprompt.comparison.few_shot import FewShot, search, zero_shot
from softprompt.comparison.results import Point
from softprompt.comparison.weights import WeightsLoop, around, lora, unfrozen
from softprompt.config import Calibration, TuneConfig
from softprompt.config import Method as PromptMethod
from softprompt.data.batching import draw
from softprompt.data.examples import Encoder
from softprompt.data.rows import Rows
from softprompt.data.templates import Format
from softprompt.evaluation.calibration import calibrated_or_plain
from softprompt.evaluation.evaluate import Side
from softprompt.model.frozen import FrozenModel
from softprompt.model.memory import measure, micro_batch_tokens
from softprompt.prompt.ensemble import Ensemble, load_prompt
from softprompt.prompt.soft_prompt import Record, SoftPrompt, base_model_record
from softprompt.training.loop import Loop, Weights, measure_pace
from softprompt.training.plan import LEARNING_RATE as PROMPT_RATE
from softprompt.training.plan import Plan, make_plan
from softprompt.training.prompt_loop import PromptLoop
from softprompt.training.run_folder import SilentRunFolder
from softprompt.training.tune import reproducible
from softprompt.training.watcher import Watcher

Equal = Literal["time", "examples"]
_SEARCHED = (1 / 3, 1.0, 3.0)  # times a method's usual learning rate
MEMBERS = 3  # of an ensemble
_SHARE = 0.1  # of the budget, for each learning rate that is tried


@dataclass(frozen=True)
class Protocol:
    """What all methods have in common.

    Attributes:
        model: the base model.
        train, validation, test: rows to learn from, to choose by, and to be scored on.
        config: settings; what they leave open is chosen as `tune` chooses it. `max_minutes` is set.
        equal: whether all get the same wall time, `max_minutes`, or see the same number of examples.
        search: whether a part of the budget goes into finding the learning rate.
    """

    model: FrozenModel
    train: Rows
    validation: Rows
    test: Rows
    config: TuneConfig
    equal: Equal = "time"
    search: bool = True

    @property
    def seconds(self) -> float:
        """The budget in wall time."""
        assert self.config.max_minutes
        return 60 * self.config.max_minutes

    def plan(self, **settings: object) -> Plan:
        """Make the plan of a method: the same rows, template and batches for all."""
        config = self.config.model_copy(update={"max_minutes": None, **settings})
        return make_plan(self.model, self.train, config, self.validation)


@dataclass
class Answers:
    """How test rows are answered.

    Attributes:
        model: what they are run through.
        prompts: what stands before them, `[P, H]` or `[L, 2, K, P, D]` each: nothing, one, or an ensemble's.
        format, max_length: how they become tokens.
        calibration: of labels.
    """

    model: FrozenModel
    format: Format
    max_length: int
    prompts: tuple[Tensor, ...] = ()
    calibration: Calibration = "none"

    def side(self, rows: Rows) -> Side:
        """Answer rows."""
        encoder = Encoder(self.model.tokenizer, self.format, self.max_length)
        virtual = max((prompt.shape[-2] for prompt in self.prompts), default=0)
        share = 0.0 if rows.task == "classification" else 1.0
        footprint = measure(self.model, virtual)
        at_once = micro_batch_tokens(self.model.device, footprint, 1, self.max_length, share, scoring=True)
        scorer = calibrated_or_plain(encoder, rows, at_once, self.calibration)
        return Side(self.model, encoder, scorer, self.prompts or (None,))


@dataclass
class Learned:
    """What learning gave.

    Attributes:
        answers: how rows are answered with it.
        parameters: how many numbers were learned.
        effort: what it took.
        tokens: text tokens that were run to learn; validation rows not counted.
        settings: what was in force.
        curve: the validation figures on the way.
    """

    answers: Answers
    parameters: int
    effort: Effort
    tokens: int = 0
    settings: dict[str, object] = field(default_factory=dict)
    curve: list[Point] = field(default_factory=list)


class Method(ABC):
    """One method with one seed; `close` gives back what it took and leaves the base model as it was.

    Attributes:
        keeps: whether what it stores is kept with the results; a whole model is not.
    """

    keeps = True

    def __init__(self, protocol: Protocol, seed: int, watcher: Watcher) -> None:
        self.protocol, self.seed, self.watcher = protocol, seed, watcher
        self._stack = ExitStack()

    @abstractmethod
    def learn(self) -> Learned:
        """Learn, or search, within the budget."""

    @abstractmethod
    def store(self, folder: Path) -> None:
        """Write what the task needs besides the base model."""

    @abstractmethod
    def load(self, folder: Path) -> Answers:
        """Read what was stored, as if another task had been served before."""

    def close(self) -> None:
        """Leave the base model as it was."""
        self._stack.close()


class Engineering(Method):
    """Prompt engineering: the template as it is, or with demonstrations that are searched for."""

    shots: bool

    def learn(self) -> Learned:
        protocol = self.protocol
        plan = protocol.plan(seed=self.seed)
        config, rows = plan.config, protocol.validation if plan.validation is None else plan.validation
        assert config.batch_size and config.max_steps
        form, most = plan.encoder.format, config.max_length
        with measured(protocol.model.device) as effort:
            if not self.shots:
                found = zero_shot(protocol.model, form, rows, max_length=most)
            elif protocol.equal == "time":
                found = self._search(form, rows, most, seconds=protocol.seconds)
            else:
                found = self._search(form, rows, most, rows=max(len(rows), config.batch_size * config.max_steps))
        best = found.best
        self._answers = Answers(protocol.model, best.format, best.max_length, calibration=best.calibration)
        settings = {"template": form.template, "demonstrations": best.k, "calibration": best.calibration}
        return Learned(self._answers, 0, effort, settings={**settings, "rows_scored": found.rows})

    def _search(self, form: Format, validation: Rows, most: int, **budget: float) -> FewShot:
        protocol = self.protocol
        return search(
            protocol.model,
            form,
            protocol.train,
            validation,
            max_length=most,
            seed=self.seed,
            **budget,  # type: ignore[arg-type]
        )

    def store(self, folder: Path) -> None:
        answers = self._answers
        form = answers.format
        record = {
            "template": form.template,
            "verbalizers": dict(form.verbalizers),
            "chat_template": form.chat_template,
            "demonstrations": [dict(row) for row in form.demonstrations],
            "calibration": answers.calibration,
            "max_length": answers.max_length,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "format.json").write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> Answers:
        record = json.loads((folder / "format.json").read_text(encoding="utf-8"))
        form = Format(
            self.protocol.test.task,
            record["template"],
            record["verbalizers"],
            record["chat_template"],
            demonstrations=tuple(record["demonstrations"]),
        )
        return Answers(self.protocol.model, form, record["max_length"], calibration=record["calibration"])


class ZeroShot(Engineering):
    """The template as it is written."""

    shots = False


class FewShots(Engineering):
    """Examples before the input."""

    shots = True


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

    def end(self) -> None:
        self.watcher.end()


class Trained(Method):
    """Methods that learn by gradients, in the same loop."""

    rate: float

    def __init__(self, protocol: Protocol, seed: int, watcher: Watcher) -> None:
        super().__init__(protocol, seed, watcher)
        self.settings: dict[str, object] = {}

    @abstractmethod
    def loop(self, plan: Plan, watcher: Watcher) -> Loop:
        """Return a loop that begins anew."""

    @abstractmethod
    def answers(self, weights: Weights) -> Answers:
        """Return how rows are answered with what was learned."""

    def learn(self) -> Learned:
        protocol, began = self.protocol, time.monotonic()
        rate = protocol.config.learning_rate or self.rate
        curve, tokens = _Curve(self.watcher), 0
        with measured(protocol.model.device) as effort, reproducible(protocol.config.threads):
            plan = protocol.plan(seed=self.seed, learning_rate=rate, **self.settings)
            assert plan.config.max_steps
            length = {"max_steps": plan.config.max_steps}
            if protocol.equal == "time":
                pace = measure_pace(self.loop(plan, Watcher()))
                length = pace.fitting(protocol.seconds - (time.monotonic() - began))
            if protocol.search and protocol.config.learning_rate is None:
                rate, tried = self._searched(plan, length["max_steps"])
                tokens += len(_SEARCHED) * _tokens(plan, tried)
                if protocol.equal == "time":
                    length = pace.fitting(protocol.seconds - (time.monotonic() - began))
                else:
                    length = {"max_steps": max(1, length["max_steps"] - len(_SEARCHED) * tried)}
            self._plan = protocol.plan(seed=self.seed, learning_rate=rate, **length, **self.settings)
            loop = self.loop(self._plan, curve)
            curve.begin(self._plan, 0)
            try:
                best, progress, _ = loop.run()
            finally:
                curve.end()
        self._answers = self.answers(best)
        tokens += _tokens(self._plan, progress.step)
        parameters = sum(parameter.numel() for parameter in loop.learned.values())
        settings = {**self._plan.config.model_dump(), "best_step": progress.best_step}
        return Learned(self._answers, parameters, effort, tokens, settings, curve.points)

    def _searched(self, plan: Plan, steps: int) -> tuple[float, int]:
        """Return the learning rate with the lowest validation loss after the first steps, and their number."""
        until, found = max(1, round(_SHARE * steps)), []
        for factor in _SEARCHED:
            rate = self.rate * factor
            config = plan.config.model_copy(update={"learning_rate": rate, "max_steps": steps, "eval_every": until})
            _, progress, _ = self.loop(replace(plan, config=config), Watcher()).run(until=until)
            found.append((progress.best["loss"], rate))
        return min(found)[1], until


def _tokens(plan: Plan, steps: int) -> int:
    """Return the text tokens of a plan's first steps."""
    config = plan.config
    assert config.batch_size
    drawn = (i for step in range(steps) for i in draw(len(plan.examples), config.batch_size, step, config.seed))
    return sum(len(plan.examples[i].ids) for i in drawn)


class Prompts(Trained):
    """A soft prompt or a deep prefix, as `tune` learns it."""

    kind: PromptMethod

    def __init__(self, protocol: Protocol, seed: int, watcher: Watcher) -> None:
        super().__init__(protocol, seed, watcher)
        self.rate, self.settings = PROMPT_RATE[self.kind], {"method": self.kind}

    def loop(self, plan: Plan, watcher: Watcher) -> Loop:
        return PromptLoop(self.protocol.model, plan, SilentRunFolder(Path()), watcher)

    def answers(self, weights: Weights) -> Answers:
        encoder = self._plan.encoder
        return Answers(self.protocol.model, encoder.format, encoder.max_length, (weights["prompt"],))

    def store(self, folder: Path) -> None:
        self.prompt().save(folder)

    def prompt(self) -> SoftPrompt:
        """Return what was learned, as it is saved."""
        form, (weights,) = self._answers.format, self._answers.prompts
        record = Record(
            base_model=base_model_record(self.protocol.model),
            task=form.task,
            template=form.template,
            chat_template=form.chat_template,
            verbalizers=dict(form.verbalizers),
            max_length=self._answers.max_length,
            training={"settings": self._plan.config.model_dump()},
        )
        return SoftPrompt(weights, record)

    def load(self, folder: Path) -> Answers:
        prompt = load_prompt(folder)
        return Answers(self.protocol.model, prompt.format, prompt.record.max_length, prompt.members)


class SoftPrompts(Prompts):
    """Virtual tokens before the text."""

    kind = "soft-prompt"


class DeepPrefixes(Prompts):
    """Keys and values at every layer."""

    kind = "deep-prefix"


class Ensembles(Method):
    """Several prompts from several seeds, which share the budget of one."""

    kind: type[Prompts]

    def learn(self) -> Learned:
        protocol = self.protocol
        config = protocol.config.model_copy(update={"max_minutes": protocol.seconds / 60 / MEMBERS})
        if protocol.equal == "examples":
            steps = protocol.plan().config.max_steps or MEMBERS
            config = config.model_copy(update={"max_steps": max(1, steps // MEMBERS), "epochs": None})
        shared = replace(protocol, config=config)
        self._members = [self.kind(shared, self.seed * MEMBERS + i, self.watcher) for i in range(MEMBERS)]
        parts = [member.learn() for member in self._members]
        first = parts[0]
        self._answers = replace(first.answers, prompts=tuple(p for part in parts for p in part.answers.prompts))
        effort = Effort(
            sum(part.effort.seconds for part in parts),
            sum(part.effort.cpu_seconds for part in parts),
            max(part.effort.peak_bytes for part in parts),
        )
        tokens = sum(part.tokens for part in parts)
        settings = {**first.settings, "members": MEMBERS}
        return Learned(self._answers, MEMBERS * first.parameters, effort, tokens, settings, first.curve)

    def store(self, folder: Path) -> None:
        prompts = tuple(member.prompt() for member in self._members)
        Ensemble(prompts, prompts[0].record).save(folder)

    def load(self, folder: Path) -> Answers:
        prompt = load_prompt(folder)
        return Answers(self.protocol.model, prompt.format, prompt.record.max_length, prompt.members)


class SoftEnsembles(Ensembles):
    """Soft prompts whose probabilities are averaged."""

    kind = SoftPrompts


class DeepEnsembles(Ensembles):
    """Deep prefixes whose probabilities are averaged."""

    kind = DeepPrefixes


class OwnWeights(Trained):
    """Weights of the model itself."""

    model: FrozenModel

    def loop(self, plan: Plan, watcher: Watcher) -> Loop:
        loop = WeightsLoop(self.model, plan, SilentRunFolder(Path()), watcher)
        loop.load(self._fresh)
        self._loop = loop
        return loop

    @cached_property
    def _fresh(self) -> Weights:
        """The weights before the first step."""
        return {name: p.detach().clone() for name, p in self.model.hf_model.named_parameters() if p.requires_grad}

    def answers(self, weights: Weights) -> Answers:
        self._loop.load(weights)
        encoder = self._plan.encoder
        return Answers(self.model, encoder.format, encoder.max_length)


class Lora(OwnWeights):
    """Low-rank updates of the model's weights."""

    rate = 1e-3

    def __init__(self, protocol: Protocol, seed: int, watcher: Watcher) -> None:
        super().__init__(protocol, seed, watcher)
        self.model = protocol.model
        self._adapter = self._stack.enter_context(lora(self.model, seed))

    def store(self, folder: Path) -> None:
        self._adapter.save_pretrained(str(folder))

    def load(self, folder: Path) -> Answers:
        """Take the adapter that was learned out of the model, and put the stored one in."""
        self.close()
        self._stack.enter_context(lora(self.model, folder=folder))
        return self._answers


class Full(OwnWeights):
    """All weights of a copy of the model."""

    rate = 5e-5
    keeps = False

    def __init__(self, protocol: Protocol, seed: int, watcher: Watcher) -> None:
        super().__init__(protocol, seed, watcher)
        self.model = unfrozen(protocol.model)

    def store(self, folder: Path) -> None:
        self.model.hf_model.save_pretrained(folder)

    def load(self, folder: Path) -> Answers:
        hf_model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=self.model.hf_model.dtype)
        hf_model = hf_model.eval().requires_grad_(False)
        model = around(hf_model.to(self.model.device), self.model)  # type: ignore[arg-type]
        return Answers(model, self._answers.format, self._answers.max_length)


METHODS: dict[str, type[Method]] = {
    "zero-shot": ZeroShot,
    "few-shot": FewShots,
    "soft-prompt": SoftPrompts,
    "deep-prefix": DeepPrefixes,
    "soft-prompt-ensemble": SoftEnsembles,
    "deep-prefix-ensemble": DeepEnsembles,
    "lora": Lora,
    "full": Full,
}
