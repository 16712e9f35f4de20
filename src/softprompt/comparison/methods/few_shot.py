"""Prompt engineering by search: which demonstrations stand before the input, in which order, calibrated how."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count, islice

import numpy as np

from softprompt.config import Calibration
from softprompt.data.encoder import Encoder, plain_ids
from softprompt.data.rows import Rows
from softprompt.data.split import labels_in_turn, sample
from softprompt.data.templates import Format
from softprompt.errors import SettingsError
from softprompt.evaluation.calibration import CalibratedScores, calibrated_or_plain, prior_matching
from softprompt.evaluation.scores import LabelScores, Scores, add_label_bias, tokens_at_once
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.soft_prompt import BasePrompt

SIZES = (1, 2, 4, 8, 16)
_WIDTHS = (16, 4, 1)  # candidates of a round: a quarter of them goes on, each to four times the rows
_FEWEST = 12  # validation rows that candidates are compared on: on fewer, the best is a matter of luck
_POOL = 2000  # training rows that demonstrations are drawn from


@dataclass(frozen=True)
class Trial:
    """A candidate, and how it did on some validation rows.

    Attributes:
        format: with its demonstrations.
        calibration: none where `label_bias` does better, or nothing does.
        label_bias: what is added to labels' log-likelihoods where that does better than either.
        max_length: what the encoder needs, so that demonstrations take nothing from a row's own room.
        rows: how many validation rows it was judged on.
        metrics: on them.
        score: what candidates are compared by, the higher the better: accuracy, then the log of the right label's
            share; of other tasks the negative loss.
    """

    format: Format
    calibration: Calibration
    max_length: int
    rows: int
    metrics: dict[str, float]
    score: tuple[float, float]
    label_bias: Mapping[str, float] = field(default_factory=dict)

    @property
    def k(self) -> int:
        """How many demonstrations it has."""
        return len(self.format.demonstrations)


@dataclass(frozen=True)
class FewShot:
    """What a search chose, and what it took.

    Attributes:
        best: the chosen candidate, judged on all validation rows; nothing was scored where there was no choice.
        trials: all candidates tried, in order; one that went on occurs again with more rows.
        rows: validation rows scored in all; inputs without content are not counted.
        seconds: wall time.
    """

    best: Trial
    trials: tuple[Trial, ...]
    rows: int
    seconds: float


Progress = Callable[[Trial, float], None]


def zero_shot(model: FrozenModel, form: Format, train: Rows, validation: Rows, *, max_length: int) -> FewShot:
    """Decide by the validation rows how labels are calibrated, if at all; other tasks have nothing to choose.

    Args:
        model: the frozen model.
        form: how rows become text.
        train: rows that tell how frequent labels are.
        validation: rows to choose by.
        max_length: the most tokens of a row.
    """
    judge = _Judge(model, train, validation, max_length, _Budget(seconds=math.inf))
    if form.task != "classification":
        return judge.result(Trial(form, "none", judge.max_length(form), 0, {}, (0, 0)))
    return judge.result(judge.trial(form, validation))


def search(
    model: FrozenModel,
    form: Format,
    train: Rows,
    validation: Rows,
    *,
    max_length: int,
    seed: int,
    seconds: float | None = None,
    rows: int | None = None,
    progress: Progress | None = None,
) -> FewShot:
    """Find demonstrations by rounds of successive halving (Jamieson and Talwalkar 2016) on the validation rows.

    A round draws 16 candidates and judges them on a sixteenth of the rows, the best four on a quarter, the best of
    these on all; where a sixteenth is too few rows, or at the budget's end, it begins with four or one. Rounds go on as
    the budget allows. The best of those that were judged on all rows is chosen, the template without demonstrations
    among them.

    Args:
        model: the frozen model.
        form: how rows become text, without demonstrations.
        train: rows to show.
        validation: rows to choose by.
        max_length: the most tokens of a row, demonstrations not counted.
        seed: of the draws.
        seconds, rows: the budget, in wall time or in scored validation rows; one of them. With rows, the same seed
            gives the same result.
        progress: told of every trial, and of the share of the budget that is spent.

    Raises:
        SettingsError: not one budget, or fewer rows than there are validation rows.
    """
    if (seconds is None) == (rows is None):
        raise SettingsError("give the search a budget, either seconds or rows")
    if rows is not None and rows < len(validation):
        raise SettingsError(
            f"the choice is judged on all {len(validation)} validation rows, and the budget is {rows} rows; "
            "raise it, or give fewer validation rows"
        )
    judge = _Judge(model, train, validation, max_length, _Budget(seconds, rows), progress)
    best = judge.trial(form, validation)
    generator = np.random.default_rng(seed)
    draws = _draws(judge, form, sample(train, _POOL, seed), generator)
    while (width := judge.affordable()) and (forms := list(islice(draws, width))):
        order = generator.permutation(len(validation)).tolist()
        best = max(best, _round(judge, forms, order), key=lambda trial: trial.score)
    return judge.result(best)


def _round(judge: _Judge, forms: list[Format], order: list[int]) -> Trial:
    """Halve candidates until one is left, which is judged on all validation rows, taken in some order."""
    every = len(order)
    while len(forms) > 1:
        rows = judge.validation.pick(order[: math.ceil(every / len(forms))])
        trials: list[Trial] = []
        for form in forms:
            if trials and not judge.budget.allows(len(rows) + every):
                break  # time is shorter than it looked; what is left is for the best so far
            trials.append(judge.trial(form, rows))
        left = len(forms) // 4 if len(trials) == len(forms) else 1
        forms = [trial.format for trial in sorted(trials, key=lambda trial: trial.score, reverse=True)[:left]]
    return judge.trial(forms[0], judge.validation)


def _draws(judge: _Judge, form: Format, train: Rows, generator: np.random.Generator) -> Iterator[Format]:
    """Draw demonstrations without end: of every size in turn, with balanced labels and at random; none if none fits."""
    room = judge.room(form)
    pool = [row for row in train if judge.tokens(form.demonstration(row)) <= room]
    sizes = [k for k in SIZES if k <= len(pool)]
    for number in count() if sizes else ():
        k, by_label = sizes[number % len(sizes)], number // len(sizes) % 2 == 0
        order = generator.permutation(len(pool)).tolist()
        if by_label and form.task == "classification":
            order = labels_in_turn(pool, order)
        shown = tuple(pool[i] for i in generator.permutation(order[:k]))
        while judge.tokens((drawn := replace(form, demonstrations=shown)).demonstrated) > room:
            shown = shown[: len(shown) // 2]
        yield drawn


class _Budget:
    """How many rows may be scored, or for how long."""

    def __init__(self, seconds: float | None = None, rows: int | None = None) -> None:
        self.seconds, self.rows = seconds, rows
        self.began, self.spent = time.monotonic(), 0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def share(self, more: int = 0) -> float:
        """Return which share is spent, or will be when so many more rows are scored."""
        if self.rows is not None:
            return (self.spent + more) / self.rows
        assert self.seconds is not None
        return self.elapsed * (1 + more / max(self.spent, 1)) / max(self.seconds, 1e-9)

    def allows(self, more: int) -> bool:
        return self.share(more) <= 1


class _Judge:
    """Tries candidates on validation rows, and keeps the books."""

    def __init__(
        self,
        model: FrozenModel,
        train: Rows,
        validation: Rows,
        max_length: int,
        budget: _Budget,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.train, self.validation, self.most = model, train, validation, max_length
        self.budget, self.progress = budget, progress
        self.trials: list[Trial] = []
        self.at_once = tokens_at_once(model, validation, BasePrompt(), max_length)

    def tokens(self, text: str) -> int:
        return len(plain_ids(self.model.tokenizer, text))

    def max_length(self, form: Format) -> int:
        """Return the most tokens of a row with its demonstrations."""
        wanted = self.most + self.tokens(form.demonstrated)
        return min(wanted, self.model.context_length or wanted)

    def room(self, form: Format) -> float:
        """Return how many tokens of demonstrations fit in the model's context before the longest validation row."""
        encoder = Encoder(self.model.tokenizer, form, self.max_length(form), self.model.vocabulary_size)
        longest = max(len(example.ids) for example in encoder.examples(self.validation))
        return (self.model.context_length or math.inf) - longest

    def affordable(self) -> int:
        """Return how many candidates the largest round has that the budget still allows, 0 for none."""
        every = len(self.validation)
        for n, width in enumerate(_WIDTHS):
            enough = width == 1 or every >= width * _FEWEST
            if enough and self.budget.allows(sum(w * math.ceil(every / w) for w in _WIDTHS[n:])):
                return width
        return 0

    def trial(self, form: Format, rows: Rows) -> Trial:
        """Score rows with a candidate; labels plain and calibrated, of which the best counts."""
        length = self.max_length(form)
        encoder = Encoder(self.model.tokenizer, form, length, self.model.vocabulary_size)
        calibration: Calibration = "contextual" if form.task == "classification" else "none"
        scores = calibrated_or_plain(encoder, rows, self.at_once, calibration).score(self.model, BasePrompt())
        label_bias: dict[str, float] = {}
        if isinstance(scores, CalibratedScores):
            plain = scores.plain
            if _score(plain) >= _score(scores):
                calibration, scores = "none", plain
            found = prior_matching(plain, self.train)
            matched = add_label_bias(plain, found)
            if _score(matched) > _score(scores):
                calibration, scores, label_bias = "none", matched, found
        trial = Trial(form, calibration, length, len(rows), scores.values(), _score(scores), label_bias)
        self.trials.append(trial)
        self.budget.spent += len(rows)
        if self.progress:
            self.progress(trial, self.budget.share())
        return trial

    def result(self, best: Trial) -> FewShot:
        return FewShot(best, tuple(self.trials), self.budget.spent, self.budget.elapsed)


def _score(scores: Scores) -> tuple[float, float]:
    if not isinstance(scores, LabelScores):
        return -scores.loss(), 0.0
    shares = scores.log_shares()[np.arange(len(scores.gold)), scores.gold]
    return scores.values()["accuracy"], float(shares.mean())
