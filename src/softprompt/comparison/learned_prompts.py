"""Soft prompts, deep prefixes and their ensembles, as methods of a comparison."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from softprompt.comparison.costs import Effort
from softprompt.comparison.method import Answers, Learned, Method, Protocol
from softprompt.comparison.trained import Trained
from softprompt.config import Method as PromptMethod
from softprompt.prompt.ensemble import joined, load_prompt
from softprompt.prompt.soft_prompt import Record, SoftPrompt, base_model_record
from softprompt.training.loop import Loop, Weights
from softprompt.training.plan import Plan
from softprompt.training.prompt_loop import PromptLoop
from softprompt.training.run_folder import SilentRunFolder
from softprompt.training.watcher import Watcher

MEMBERS = 3  # of an ensemble


class Prompts(Trained):
    """A soft prompt or a deep prefix, as `tune` learns it."""

    kind: PromptMethod

    def __init__(self, protocol: Protocol, seed: int, watcher: Watcher) -> None:
        super().__init__(protocol, seed, watcher)
        self.settings = {"method": self.kind}
        if self.kind == "deep-prefix":  # which has one parameterization
            self.settings["parameterization"] = "direct"

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
        prompts = tuple(prompt for part in parts for prompt in part.answers.prompts)
        room = min(part.answers.max_length for part in parts)  # behind the longest
        self._answers = replace(first.answers, prompts=prompts, max_length=room)
        effort = Effort(
            sum(part.effort.seconds for part in parts),
            sum(part.effort.cpu_seconds for part in parts),
            max(part.effort.peak_bytes for part in parts),
        )
        tokens = sum(part.tokens for part in parts)
        own = ("seed", "learning_rate", "max_steps", "best_step")
        each: dict[str, object] = {name: [part.settings[name] for part in parts] for name in own}
        settings = {**first.settings, **each, "members": MEMBERS}
        parameters = sum(part.parameters for part in parts)
        return Learned(self._answers, parameters, effort, tokens, settings)  # the curves are its members', not its own

    def store(self, folder: Path) -> None:
        joined([member.prompt() for member in self._members], {}).save(folder)

    def load(self, folder: Path) -> Answers:
        prompt = load_prompt(folder)
        return Answers(self.protocol.model, prompt.format, prompt.record.max_length, prompt.members)


class SoftEnsembles(Ensembles):
    """Soft prompts whose probabilities are averaged."""

    kind = SoftPrompts


class DeepEnsembles(Ensembles):
    """Deep prefixes whose probabilities are averaged."""

    kind = DeepPrefixes
