"""Prompt engineering: the template as it is, or with demonstrations that are searched for."""

from __future__ import annotations

from pathlib import Path

from softprompt.comparison.costs import measured
from softprompt.comparison.methods.base import Answers, Learned, Method
from softprompt.comparison.methods.few_shot import FewShot, Trial, search, zero_shot
from softprompt.data.rows import Rows
from softprompt.data.templates import Format


class Engineering(Method):
    """Prompt engineering: the template as it is, or with demonstrations that are searched for."""

    shots: bool

    def learn(self) -> Learned:
        protocol = self.protocol
        plan = protocol.plan(seed=self.seed)
        config, rows = plan.config, protocol.validation
        assert config.batch_size and config.max_steps
        form, most = plan.encoder.format, config.max_length
        with measured(protocol.model.device) as effort:
            if not self.shots:
                found = zero_shot(protocol.model, form, protocol.train, rows, max_length=most)
            elif protocol.equal == "time":
                found = self._search(form, rows, most, seconds=protocol.seconds)
            else:
                found = self._search(form, rows, most, rows=max(len(rows), config.batch_size * config.max_steps))
        best = found.best
        self._answers = Answers(
            protocol.model, best.format, best.max_length, calibration=best.calibration, biases=(best.label_bias,)
        )
        settings = {"template": form.template, "demonstrations": best.k, "calibration": best.calibration}
        settings["prior_matching"] = bool(best.label_bias)
        return Learned(self._answers, 0, effort, settings={**settings, "rows_scored": found.rows})

    def _search(self, form: Format, validation: Rows, most: int, **budget: float) -> FewShot:
        protocol, best = self.protocol, list[Trial]()

        def progress(trial: Trial, spent: float) -> None:
            if trial.rows == len(validation) and (not best or trial.merit > best[-1].merit):
                best.append(trial)
                self.watcher.better(trial.k, trial.metrics, spent)

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

    def load(self, folder: Path) -> Answers:
        return Answers.read(folder, self.protocol.model, self.protocol.test.task)


class ZeroShot(Engineering):
    """The template as it is written."""

    shots = False


class FewShots(Engineering):
    """Examples before the input."""

    shots = True
