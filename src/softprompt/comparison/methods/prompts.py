"""Soft prompts, deep prefixes and their ensembles, as methods of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from softprompt.comparison.costs import Effort
from softprompt.comparison.methods.base import FitResult, Method, Predictor
from softprompt.comparison.methods.trained import Trained
from softprompt.prompt.ensemble import Prompt, make_ensemble
from softprompt.prompt.loading import load_prompt
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.training.callbacks import NO_CALLBACK, Callback
from softprompt.training.prepare import PreparedRun
from softprompt.training.prompt_trainer import PromptTrainer
from softprompt.training.trainer import Trainer, Weights

MEMBERS = 3  # of an ensemble


class _Kept(Method):
    """What is answered with a prompt, and kept as one.

    Attributes:
        prompt: what was learned.
    """

    prompt: Prompt

    def store(self, folder: Path) -> None:
        self.prompt.save(folder)

    def load(self, folder: Path) -> Predictor:
        return self._with(load_prompt(folder))

    def _with(self, prompt: Prompt) -> Predictor:
        record = prompt.record
        return Predictor(self.protocol.model, prompt.format, record.max_length, prompt)


class Prompts(_Kept, Trained):
    """A soft prompt or a deep prefix, as `tune` learns it."""

    prompt: SoftPrompt

    def trainer(self, prepared: PreparedRun, callback: Callback = NO_CALLBACK) -> Trainer:
        return PromptTrainer(self.protocol.model, prepared, callback=callback)

    def answers(self, weights: Weights, label_bias: dict[str, float]) -> Predictor:
        encoder, training = self._prepared.encoder, {"settings": self._prepared.config.model_dump()}
        own = {"label_bias": label_bias, "training": training}
        record = Record.of(self.protocol.model, encoder.format, encoder.max_length, **own)
        self.prompt = SoftPrompt(weights["prompt"], record)
        return self._with(self.prompt)


class PromptTuning(Prompts):
    """Virtual tokens before the text."""

    settings: Mapping[str, object] = {"method": "prompt-tuning"}


class PrefixTuning(Prompts):
    """Keys and values at every layer."""

    settings: Mapping[str, object] = {"method": "prefix-tuning"}


class Ensembles(_Kept):
    """Several prompts from several seeds, which share the budget of one."""

    kind: type[Prompts]

    def learn(self) -> FitResult:
        protocol, throughput, spent = self.protocol, None, []
        if protocol.equal == "time":
            throughput, effort = self.kind(protocol, self.seed * MEMBERS, self.callback).measured_throughput()
            spent = [effort]
            minutes = max(protocol.seconds - effort.seconds, 1) / 60 / MEMBERS
            share: dict[str, object] = {"max_minutes": minutes}
        else:
            steps = protocol.prepared().config.max_steps or MEMBERS
            share = {"max_steps": max(1, steps // MEMBERS), "epochs": None}
        shared = replace(protocol, config=protocol.config.model_copy(update=share))
        members = [self.kind(shared, self.seed * MEMBERS + i, self.callback) for i in range(MEMBERS)]
        for member in members:
            member.throughput = throughput
        parts = [member.learn() for member in members]
        self.prompt = make_ensemble([member.prompt for member in members], {})
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
        return FitResult(self._with(self.prompt), parameters, effort, tokens, settings)


class PromptTuningEnsembles(Ensembles):
    """Soft prompts whose probabilities are averaged."""

    kind = PromptTuning


class PrefixTuningEnsembles(Ensembles):
    """Deep prefixes whose probabilities are averaged."""

    kind = PrefixTuning
