"""Soft prompts, deep prefixes and their ensembles, as methods of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from softprompt.comparison.costs import Effort
from softprompt.comparison.methods.base import Answers, Learned, Method
from softprompt.comparison.methods.trained import Trained
from softprompt.prompt.ensemble import Prompt, joined, load_prompt
from softprompt.prompt.soft_prompt import Record, SoftPrompt
from softprompt.training.callbacks import UNWATCHED, Watcher
from softprompt.training.prepare import Plan
from softprompt.training.prompt_trainer import PromptLoop
from softprompt.training.trainer import Loop, Weights

MEMBERS = 3  # of an ensemble


class _Kept(Method):
    """What is answered with a prompt, and kept as one.

    Attributes:
        prompt: what was learned.
    """

    prompt: Prompt

    def store(self, folder: Path) -> None:
        self.prompt.save(folder)

    def load(self, folder: Path) -> Answers:
        return self._with(load_prompt(folder))

    def _with(self, prompt: Prompt) -> Answers:
        record = prompt.record
        return Answers(self.protocol.model, prompt.format, record.max_length, prompt.members, biases=prompt.biases)


class Prompts(_Kept, Trained):
    """A soft prompt or a deep prefix, as `tune` learns it."""

    prompt: SoftPrompt

    def loop(self, plan: Plan, watcher: Watcher = UNWATCHED) -> Loop:
        return PromptLoop(self.protocol.model, plan, watcher=watcher)

    def answers(self, weights: Weights, label_bias: dict[str, float]) -> Answers:
        encoder, training = self._plan.encoder, {"settings": self._plan.config.model_dump()}
        own = {"label_bias": label_bias, "training": training}
        record = Record.of(self.protocol.model, encoder.format, encoder.max_length, **own)
        self.prompt = SoftPrompt(weights["prompt"], record)
        return self._with(self.prompt)


class SoftPrompts(Prompts):
    """Virtual tokens before the text."""

    settings: Mapping[str, object] = {"method": "soft-prompt"}


class DeepPrefixes(Prompts):
    """Keys and values at every layer."""

    settings: Mapping[str, object] = {"method": "deep-prefix", "parameterization": "direct"}  # it has no other


class Ensembles(_Kept):
    """Several prompts from several seeds, which share the budget of one."""

    kind: type[Prompts]

    def learn(self) -> Learned:
        protocol, pace, spent = self.protocol, None, []
        if protocol.equal == "time":
            pace, effort = self.kind(protocol, self.seed * MEMBERS, self.watcher).measured_pace()
            spent = [effort]
            minutes = max(protocol.seconds - effort.seconds, 1) / 60 / MEMBERS
            share: dict[str, object] = {"max_minutes": minutes}
        else:
            steps = protocol.plan().config.max_steps or MEMBERS
            share = {"max_steps": max(1, steps // MEMBERS), "epochs": None}
        shared = replace(protocol, config=protocol.config.model_copy(update=share))
        members = [self.kind(shared, self.seed * MEMBERS + i, self.watcher) for i in range(MEMBERS)]
        for member in members:
            member.pace = pace
        parts = [member.learn() for member in members]
        self.prompt = joined([member.prompt for member in members], {})
        spent += [part.effort for part in parts]
        effort = Effort(
            sum(each.seconds for each in spent),
            sum(each.cpu_seconds for each in spent),
            max(each.peak_bytes for each in spent),
        )
        tokens = sum(part.tokens for part in parts)
        own = ("seed", "learning_rate", "max_steps", "best_step")
        each: dict[str, object] = {name: [part.settings[name] for part in parts] for name in own}
        settings = {**parts[0].settings, **each, "members": MEMBERS}
        parameters = sum(part.parameters for part in parts)
        # The curves are its members', not its own.
        return Learned(self._with(self.prompt), parameters, effort, tokens, settings)


class SoftEnsembles(Ensembles):
    """Soft prompts whose probabilities are averaged."""

    kind = SoftPrompts


class DeepEnsembles(Ensembles):
    """Deep prefixes whose probabilities are averaged."""

    kind = DeepPrefixes
