"""Prompt engineering: the template as it is, or with demonstrations that a search finds, and calibrated labels."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path

import numpy as np

from softprompt.comparison.costs import measure
from softprompt.comparison.methods.base import FitResult, Method, Predictor
from softprompt.config import Calibration
from softprompt.data.encoder import Encoder, plain_ids
from softprompt.data.rows import Rows
from softprompt.data.split import interleave_labels, sample
from softprompt.data.templates import Format
from softprompt.evaluation.calibration import CalibratedScores, make_scorer, prior_matching
from softprompt.evaluation.scorer import scoring_micro_batch_tokens
from softprompt.evaluation.scores import LabelScores, Scores, add_label_bias
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.soft_prompt import BasePrompt
from softprompt.training.search import successive_halving

SIZES = (1, 2, 4, 8, 16)
_WIDTHS = (16, 4, 1)  # candidates of a round: the best quarter goes on, each to four times the rows
_FEWEST = 12  # validation rows that candidates are compared on; on fewer, chance decides
_POOL = 2000  # training rows that demonstrations are sampled from


@dataclass(frozen=True)
class Trial:
    """A candidate, scored on some validation rows.

    Attributes:
        calibration: `none` where `label_bias`, or no calibration, scores better.
        label_bias: added to labels' log-likelihoods where that scores better than both.
        max_length: tokens of a row with its demonstrations.
        rows: the number of validation rows it was scored on.
        score: higher is better: accuracy, then the mean log-probability of the right label among all labels; for
            other tasks the negative loss.
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
class SearchResult:
    """The chosen candidate, and the cost of the search.

    Attributes:
        best: the chosen candidate, scored on all validation rows; not scored where there was no choice.
        trials: all candidates in order; one that went on occurs again with more rows.
        rows: the sum of validation rows scored; inputs without content are not counted.
    """

    best: Trial
    trials: tuple[Trial, ...]
    rows: int
    seconds: float


Progress = Callable[[Trial, float], None]


def choose_calibration(
    model: FrozenModel, form: Format, train: Rows, validation: Rows, *, max_length: int
) -> SearchResult:
    """Choose the calibration of labels, or none, on the validation rows; other tasks have nothing to choose."""
    scorer = _Scorer(model, train, validation, max_length, _Budget(seconds=math.inf))
    if form.task == "classification":
        return scorer.result(scorer.trial(form, validation))
    return scorer.result(Trial(form, "none", scorer.max_length(form), 0, {}, (0, 0)))


def search_demonstrations(
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
    now: Callable[[], float] = time.monotonic,
) -> SearchResult:
    """Find demonstrations by rounds of successive halving (Jamieson and Talwalkar 2016) on the validation rows.

    A round scores 16 random candidates on a sixteenth of the rows, the best four on a quarter, the best of these on
    all. Where a sixteenth is too few rows, or the budget nearly used, it starts with four or one. Rounds go on until
    the budget is used. The best candidate that was scored on all rows is chosen; the template without demonstrations
    is one of them.

    Args:
        model: the frozen model.
        form: how rows become text, without demonstrations.
        train, validation: rows to choose demonstrations from, and to choose by.
        max_length: the most tokens of a row, demonstrations not counted.
        seed: of the random candidates.
        seconds, rows: the budget, in wall time or in scored validation rows, which are at least all of them; one of
            the two. With rows, the same seed gives the same result.
        progress: told of every trial, and of the used share of the budget.
        now: the clock, in seconds.
    """
    scorer = _Scorer(model, train, validation, max_length, _Budget(seconds, rows, now), progress)
    best = scorer.trial(form, validation)
    generator = np.random.default_rng(seed)
    candidates = _sample_demonstrations(scorer, form, sample(train, _POOL, seed), generator)
    while (width := scorer.affordable()) and (forms := list(islice(candidates, width))):
        order = generator.permutation(len(validation)).tolist()
        best = max(best, _round(scorer, forms, order), key=lambda trial: trial.score)
    return scorer.result(best)


def _round(scorer: _Scorer, forms: list[Format], order: list[int]) -> Trial:
    """Halve candidates until one is left, and score it on all validation rows; `order` says which rows come first."""
    every = len(order)

    def score(form: Format, width: int) -> tuple[float, float] | None:
        rows = scorer.validation.pick(order[: math.ceil(every / width)])
        # Scoring may take longer than predicted; the rest of the budget is for the best so far.
        return scorer.trial(form, rows).score if scorer.budget.allows(len(rows) + every) else None

    widths = [width for width in _WIDTHS if 1 < width <= len(forms)]
    return scorer.trial(successive_halving(forms, widths, score, keep=1 / 4), scorer.validation)


def _sample_demonstrations(
    scorer: _Scorer, form: Format, train: Rows, generator: np.random.Generator
) -> Iterator[Format]:
    """Sample demonstrations forever: every size in turn, with balanced labels and without; nothing if none fits."""
    room = scorer.room(form)
    pool = [row for row in train if scorer.tokens(form.demonstration(row)) <= room]
    sizes = [k for k in SIZES if k <= len(pool)]
    for number in count() if sizes else ():
        k, by_label = sizes[number % len(sizes)], number // len(sizes) % 2 == 0
        order = generator.permutation(len(pool)).tolist()
        if by_label and form.task == "classification":
            order = interleave_labels(pool, order)
        shown = tuple(pool[i] for i in generator.permutation(order[:k]))
        while scorer.tokens((candidate := replace(form, demonstrations=shown)).demonstrated) > room:
            shown = shown[: len(shown) // 2]
        yield candidate


class _Budget:
    """A limit on rows or on seconds."""

    def __init__(
        self, seconds: float | None = None, rows: int | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds, self.rows, self.now = seconds, rows, now
        self.began, self.spent = now(), 0

    @property
    def elapsed(self) -> float:
        return self.now() - self.began

    def share(self, more: int = 0) -> float:
        """Return the used share, or what it will be when `more` rows are scored."""
        if self.rows is not None:
            return (self.spent + more) / self.rows
        assert self.seconds is not None
        return self.elapsed * (1 + more / max(self.spent, 1)) / max(self.seconds, 1e-9)

    def allows(self, more: int) -> bool:
        return self.share(more) <= 1


class _Scorer:
    """Scores candidates on validation rows, and records trials and used budget."""

    def __init__(
        self,
        model: FrozenModel,
        train: Rows,
        validation: Rows,
        max_length: int,
        budget: _Budget,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.train, self.validation, self.row_length = model, train, validation, max_length
        self.budget, self.progress = budget, progress
        self.trials: list[Trial] = []
        self.at_once = scoring_micro_batch_tokens(model, validation, BasePrompt(), max_length)

    def tokens(self, text: str) -> int:
        return len(plain_ids(self.model.tokenizer, text))

    def max_length(self, form: Format) -> int:
        """Return the most tokens of a row with its demonstrations."""
        wanted = self.row_length + self.tokens(form.demonstrated)
        return min(wanted, self.model.context_length or wanted)

    def room(self, form: Format) -> float:
        """Return how many tokens of demonstrations fit in the model's context with the longest validation row."""
        encoder = Encoder(self.model.tokenizer, form, self.max_length(form), self.model.vocabulary_size)
        longest = max(len(example.ids) for example in encoder.examples(self.validation))
        return (self.model.context_length or math.inf) - longest

    def affordable(self) -> int:
        """Return the number of candidates of the largest round within the budget; 0 for none."""
        every = len(self.validation)
        for n, width in enumerate(_WIDTHS):
            enough = width == 1 or every >= width * _FEWEST
            if enough and self.budget.allows(sum(w * math.ceil(every / w) for w in _WIDTHS[n:])):
                return width
        return 0

    def trial(self, form: Format, rows: Rows) -> Trial:
        """Score rows with a candidate, and choose its calibration."""
        length = self.max_length(form)
        encoder = Encoder(self.model.tokenizer, form, length, self.model.vocabulary_size)
        calibration: Calibration = "contextual" if form.task == "classification" else "none"
        scores = make_scorer(encoder, rows, self.at_once, calibration).score(self.model, BasePrompt())
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

    def result(self, best: Trial) -> SearchResult:
        return SearchResult(best, tuple(self.trials), self.budget.spent, self.budget.elapsed)


def _score(scores: Scores) -> tuple[float, float]:
    if not isinstance(scores, LabelScores):
        return -scores.loss(), 0.0
    shares = scores.log_shares()[np.arange(len(scores.gold)), scores.gold]
    return scores.values()["accuracy"], float(shares.mean())


class Prompting(Method):
    """A prompt in words."""

    shots: bool  # whether demonstrations are searched for

    def fit(self) -> FitResult:
        protocol = self.protocol
        prepared = protocol.prepare(seed=self.seed)
        config, form = prepared.config, prepared.encoder.format
        common = (protocol.model, form, protocol.train, protocol.validation)
        assert config.batch_size and config.max_steps
        with measure(protocol.model.device) as effort:
            if self.shots:
                rows = max(len(protocol.validation), config.batch_size * config.max_steps)
                found = search_demonstrations(
                    *common,
                    max_length=config.max_length,
                    seed=self.seed,
                    seconds=protocol.seconds if protocol.equal == "time" else None,
                    rows=None if protocol.equal == "time" else rows,
                    progress=self._report_best(),
                )
            else:
                found = choose_calibration(*common, max_length=config.max_length)
        best = found.best
        self._predictor = Predictor(
            protocol.model, best.format, best.max_length, BasePrompt(best.label_bias), best.calibration
        )
        settings = {
            "template": form.template,
            "demonstrations": best.k,
            "calibration": best.calibration,
            "prior_matching": bool(best.label_bias),
            "rows_scored": found.rows,
        }
        return FitResult(self._predictor, 0, effort, settings=settings)

    def _report_best(self) -> Progress:
        """Return what tells the callback of each candidate that scores best so far on all validation rows."""
        best: list[Trial] = []

        def progress(trial: Trial, spent: float) -> None:
            if trial.rows == len(self.protocol.validation) and (not best or trial.score > best[-1].score):
                best.append(trial)
                self.callback.demonstrations(trial.k, trial.metrics, spent)

        return progress

    def store(self, folder: Path) -> None:
        self._predictor.save(folder)

    def load(self, folder: Path) -> Predictor:
        return Predictor.read(folder, self.protocol.model, self.protocol.test.task)


class ZeroShot(Prompting):
    """The template as it is written."""

    shots = False


class FewShot(Prompting):
    """Demonstrations before the input."""

    shots = True
