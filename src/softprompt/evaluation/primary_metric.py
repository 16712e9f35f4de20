"""The metric that methods are ranked by, and how it follows from statistics that are summed over rows."""

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

# For completions it depends on the right answers (`ranking_metric`); results that do not name it are ranked by BLEU.
PRIMARY: dict[Task, str] = {"classification": "accuracy", "completion": "bleu", "text": "loss"}
_BLEU_ORDER = 4  # the longest n-grams that BLEU counts


def ranking_metric(task: Task, right: Sequence[str] = ()) -> str:
    """Return the metric that methods are ranked by: one that distinguishes them on these right answers.

    Classification is ranked by accuracy, plain text by the loss. A completion's right answer is *short* if fewer than
    four of its words have a letter or a digit. Where more than half of the right answers are short, exact match ranks:
    an answer such as `42` is right or wrong. Where more than half are not short and have at least four words between
    spaces, BLEU ranks. Otherwise chrF ranks, which counts characters: for text without spaces, or a mixture. In scripts
    without spaces every character counts as a word.

    Args:
        task: the task's kind.
        right: the right answers of a completion task. What methods write has no influence, so that all of them are
            ranked by the same metric.
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
    """Return BLEU for text that is tokenized already.

    With sacrebleu's effective order: where no output has four words, only shorter n-grams count.
    """
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize="none", force=True, effective_order=True)


@cache
def chrf() -> CHRF:
    """Return chrF."""
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def compute_metric(metric: str, sums: NDArray[np.float64]) -> float:
    """Return a metric from its statistics, summed over rows.

    Accuracy and exact match have `[right, 1]` for each row, the loss `[nats, tokens]`. BLEU and chrF have sacrebleu's:
    for BLEU both lengths, then the numbers of right and of all n-grams; for chrF and each order, the numbers of n-grams
    in the output, in the reference and in both.
    """
    if metric in ("bleu", "chrf"):
        corpus = bleu() if metric == "bleu" else chrf()
        return float(corpus._compute_score_from_stats(sums.tolist()).score)
    return float(sums[0] / sums[1])


def lower_is_better(metric: str) -> bool:
    """Tell whether lower values of a metric are better."""
    return metric == "loss"


def can_be_best(metric: str, value: float) -> bool:
    """Tell whether a value can be the best: it is finite, and something is right."""
    return bool(np.isfinite(value)) and (lower_is_better(metric) or value > 0)
