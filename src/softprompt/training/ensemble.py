"""Tuning an ensemble: the same task learned several times, from other seeds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from softprompt.config import TuneConfig
from softprompt.data.examples import Encoder
from softprompt.data.rows import Rows
from softprompt.data.split import sample, split_rows
from softprompt.errors import SettingsError
from softprompt.evaluation.ensemble import scored
from softprompt.evaluation.scoring import make_scorer
from softprompt.model.frozen import FrozenModel
from softprompt.processes import launched
from softprompt.prompt.ensemble import Ensemble, joined
from softprompt.prompt.store import member_name
from softprompt.training.plan import make_plan
from softprompt.training.run_folder import RunFolder
from softprompt.training.tune import TuneResult, identity_of, pace_of, tune
from softprompt.training.watcher import Watcher

_LEAST = 0.01  # minutes, where finding out how long a step takes takes all there are


@dataclass(frozen=True)
class EnsembleResult:
    """What the runs of an ensemble gave.

    Attributes:
        prompt: the ensemble.
        runs: what each member's run gave.
        seconds: time that this call took.
        metrics: the ensemble's, on the validation rows; empty without those.
    """

    prompt: Ensemble
    runs: list[TuneResult]
    seconds: float
    metrics: dict[str, float]


def tune_ensemble(
    model: FrozenModel,
    data: Rows,
    config: TuneConfig | None = None,
    *,
    members: int,
    eval_data: Rows | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    watcher: Watcher | None = None,
) -> EnsembleResult:
    """Learn several prompts for a task, each from a seed of its own (Lester et al. 2021, section 6).

    All learn from the same rows, in other orders, and are chosen by the same validation rows. A random start differs
    too; one from a text is the same. `max_minutes` is shared among the members.

    Args:
        model: the frozen model.
        data, config, eval_data: as for `tune`; the members' seeds count from `config.seed` on.
        members: how many, two at least.
        out: the folder: the settings as given, a run a member in `member-1`, `member-2`, …, the ensemble in `prompt`.
        resume: go on with what is in `out`.
        watcher: told of every step of every member.

    Raises:
        As `tune`.
    """
    if members < 2:
        raise SettingsError(f"an ensemble of {members} is none; give two members or more")
    if launched().count > 1:
        raise SettingsError("an ensemble is learned by one process; start it without torchrun, or learn one prompt")
    began, given = time.monotonic(), config or TuneConfig()
    folder = None if out is None else RunFolder(Path(out))
    if folder is not None:
        identity = identity_of(model, data, eval_data)
        if resume:
            given, _ = folder.resume(given, identity, members)
        else:
            make_plan(model, data, given, eval_data)  # what does not fit together is said before anything is written
            folder.begin(given, identity, members)
    train, validation = split_rows(data, eval_data, given.eval_rows, given.seed)
    train = sample(train, given.train_rows, given.seed)
    minutes, pace = given.max_minutes, None
    if minutes is not None:
        if not resume:
            pace = pace_of(model, train, given, validation)
            minutes = max(minutes - (time.monotonic() - began) / 60, _LEAST)
        minutes /= members
    runs: list[TuneResult] = []
    for number in range(1, members + 1):
        settings = given.model_copy(update={"seed": given.seed + number - 1, "max_minutes": minutes})
        place = None if folder is None else folder.path / member_name(number)
        begun = resume and place is not None and (place / "config.yaml").exists()
        runs.append(
            tune(model, train, settings, eval_data=validation, out=place, resume=begun, watcher=watcher, pace=pace)
        )
    made = joined([run.prompt for run in runs], {})
    if validation is not None:
        encoder = Encoder(model.tokenizer, made.format, made.record.max_length)
        at_once = min(run.settings.micro_batch_tokens or 1 for run in runs)
        scores = scored(make_scorer(encoder, validation, at_once), model, made.members, made.biases)
        made = joined(made.prompts, scores.values())
        if folder is not None:
            folder.write_predictions(scores.predictions())
    if folder is not None:
        made.save(folder.prompt)
    return EnsembleResult(made, runs, time.monotonic() - began, made.record.metrics)
