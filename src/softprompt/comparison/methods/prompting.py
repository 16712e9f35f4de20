"""Prompt engineering: the template as it is, or with demonstrations that are searched for."""

from __future__ import annotations

from pathlib import Path

from softprompt.comparison.costs import measured
from softprompt.comparison.methods.base import FitResult, Method, Predictor
from softprompt.comparison.methods.few_shot import FewShot, Trial, search, zero_shot
from softprompt.data.rows import Rows
from softprompt.data.templates import Format
from softprompt.prompt.soft_prompt import BasePrompt


class Prompting(Method):
    """Prompt engineering: the template as it is, or with demonstrations that are searched for."""

    shots: bool

    def learn(self) -> FitResult:
        protocol = self.protocol
        prepared = protocol.prepared(seed=self.seed)
        config, rows = prepared.config, protocol.validation
        assert config.batch_size and config.max_steps
        form, most = prepared.encoder.format, config.max_length
        with measured(protocol.model.device) as effort:
            if not self.shots:
                found = zero_shot(protocol.model, form, protocol.train, rows, max_length=most)
            elif protocol.equal == "time":
                found = self._search(form, rows, most, seconds=protocol.seconds)
            else:
                found = self._search(form, rows, most, rows=max(len(rows), config.batch_size * config.max_steps))
        best = found.best
        self._answers = Predictor(
            protocol.model, best.format, best.max_length, BasePrompt(best.label_bias), best.calibration
        )
        settings = {"template": form.template, "demonstrations": best.k, "calibration": best.calibration}
        settings["prior_matching"] = bool(best.label_bias)
        return FitResult(self._answers, 0, effort, settings={**settings, "rows_scored": found.rows})

    def _search(self, form: Format, validation: Rows, most: int, **budget: float) -> FewShot:
        protocol, best = self.protocol, list[Trial]()

        def progress(trial: Trial, spent: float) -> None:
            if trial.rows == len(validation) and (not best or trial.score > best[-1].score):
                best.append(trial)
                self.callback.better(trial.k, trial.metrics, spent)

        return search(
            protocol.model,
            form,
            protocol.train,
            validation,
            max_length=most,
            seed=self.seed,
            progress=progress,
            **budget,  # type: ignore[arg-type]
        )

    def store(self, folder: Path) -> None:
        self._answers.save(folder)

    def load(self, folder: Path) -> Predictor:
        return Predictor.read(folder, self.protocol.model, self.protocol.test.task)


class ZeroShot(Prompting):
    """The template as it is written."""

    shots = False


class FewShots(Prompting):
    """Examples before the input."""

    shots = True
