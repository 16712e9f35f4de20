"""Which metric methods are ranked by, and how it is made from statistics that add up over rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from softprompt.data.rows import Task

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

# Of completions it depends on the right answers, see `ranking_metric`; results that do not name it are ranked by BLEU.
PRIMARY: dict[Task, str] = {"classification": "accuracy", "completion": "bleu", "text": "loss"}
_BLEU_ORDER = 4  # words in a row, at most, that BLEU counts


def ranking_metric(task: Task, right: Sequence[str] = ()) -> str:
    """Return the metric that methods are ranked by: one that can tell them apart on these right answers.

    Classification is ranked by accuracy, plain text by the loss. A completion's right answer is *short* if fewer than
    four of its words have a letter or a digit. Where more than half of the right answers are short, exact match ranks:
    an answer such as `42` is right or wrong. Where more than half are not short and have at least four words between
    spaces, BLEU ranks. Otherwise chrF does, which counts characters: text without spaces, or answers of both kinds. In
    scripts without spaces every character counts as a word.

    Args:
        task: the task's kind.
        right: the right answers of a completion task. What methods write plays no part, so that all of them are ranked
            by the same metric.
    """
    if task != "completion":
        return PRIMARY[task]
    found = Counter(map(_fitting, right))
    return next((metric for metric in ("exact_match", "bleu") if 2 * found[metric] > len(right)), "chrf")


def _fitting(text: str) -> str:
    """Return the metric that fits one right answer."""
    from softprompt.evaluation.words import NO_SPACES, Words

    words = [token for token in Words([text]).tokens(text) if any(map(str.isalnum, token))]
    if len(words) < _BLEU_ORDER:
        return "exact_match"
    characters = sum(NO_SPACES.match(word) is not None for word in words)
    return "bleu" if len(text.split()) >= _BLEU_ORDER and 2 * characters <= len(words) else "chrf"


@cache
def bleu() -> BLEU:
    """Return BLEU of text that is cut into words already.

    Its order is the effective one: where no output has four words, it counts runs of as many as there are.
    """
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize="none", force=True, effective_order=True)


@cache
def chrf() -> CHRF:
    """Return chrF."""
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def statistic(metric: str, sums: NDArray[np.float64]) -> float:
    """Return a metric of rows whose statistics add up to `sums`.

    Accuracy and exact match have `[right, 1]` for each row, the loss `[nats, tokens]`, BLEU and chrF what sacrebleu
    sums up: of BLEU both lengths, then how many n-grams were right and how many there are; of chrF for each length of
    n-grams how many were written, how many are right, and how many are both.
    """
    if metric in ("bleu", "chrf"):
        corpus = bleu() if metric == "bleu" else chrf()
        return float(corpus._compute_score_from_stats(sums.tolist()).score)
    return float(sums[0] / sums[1])


def lower_is_better(metric: str) -> bool:
    """Tell whether the method with the lowest figure is the best."""
    return metric == "loss"


def can_be_best(metric: str, value: float) -> bool:
    """Tell whether a figure can be the best one: it is a finite number, and not that of a method with nothing right."""
    return bool(np.isfinite(value)) and (lower_is_better(metric) or value > 0)
