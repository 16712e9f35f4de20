"""Completions: what a prompt writes, compared with what is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Indel
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from torch import Tensor

from softprompt.config import GenerateConfig
from softprompt.data.examples import Encoder, plain_ids
from softprompt.data.rows import Row, Rows
from softprompt.decoding import continue_ids
from softprompt.errors import DataError
from softprompt.evaluation.intervals import Metric, bootstrap, proportion
from softprompt.model.frozen import FrozenModel


@dataclass(frozen=True)
class Completions:
    """What was written for each distinct input; rows that share one are several right answers to it.

    Attributes:
        outputs: one a distinct input.
        references: for each of them, the right answers.
        place: for each row, which output is its own.
    """

    outputs: list[str]
    references: list[list[str]]
    place: list[int]

    def metrics(self) -> dict[str, Metric]:
        """Return exact match, BLEU (Papineni et al. 2002), chrF (Popović 2015) and ROUGE-L (Lin 2004).

        The best-matching right answer counts, or all of them together (BLEU). Intervals are over distinct inputs.
        """
        count = len(self.outputs)
        exact = np.array([output in right for output, right in zip(self.outputs, self.references, strict=True)])
        overlap = self._rouge_l
        return {
            "exact_match": proportion(exact),
            "bleu": self._corpus(BLEU()),
            "chrf": self._corpus(CHRF()),
            "rouge_l": bootstrap(lambda chosen: float(overlap[chosen].mean()), count),
        }

    def bleu_statistics(self) -> list[list[float]]:
        """Return what BLEU is made from, per distinct input: lengths, then right n-grams and all, of 1 to 4 words."""
        statistics: list[list[float]] = self._statistics(BLEU()).tolist()
        return statistics

    def _statistics(self, metric: BLEU | CHRF) -> NDArray[np.float64]:
        most = max(map(len, self.references))
        by_rank = [[right[k] if k < len(right) else None for right in self.references] for k in range(most)]
        return np.array(metric._extract_corpus_statistics(self.outputs, by_rank))  # type: ignore[arg-type]

    def _corpus(self, metric: BLEU | CHRF) -> Metric:
        """Return a corpus metric with its interval.

        sacrebleu's own bootstrap gives a symmetric half-width only, so its statistics are summed here.
        """
        statistics = self._statistics(metric)

        def score(chosen: NDArray[np.int64]) -> float:
            return float(metric._compute_score_from_stats(statistics[chosen].sum(axis=0).tolist()).score)

        return bootstrap(score, len(self.outputs))

    @cached_property
    def _rouge_l(self) -> NDArray[np.float64]:
        """The F1 of the longest common subsequence of words, which is the normalized Indel similarity."""
        return np.array(
            [
                max(Indel.normalized_similarity(_words(output), _words(right)) for right in all_right)
                for output, all_right in zip(self.outputs, self.references, strict=True)
            ]
        )


def _words(text: str) -> list[str]:
    return text.lower().split()


def complete(model: FrozenModel, prompts: Sequence[Tensor | None], encoder: Encoder, rows: Rows) -> Completions:
    """Write a completion for every distinct input, greedily, and at most as long as the longest right answer.

    Args:
        model: the frozen model.
        prompts: one, None for the untouched model; or an ensemble's.
        encoder: how rows become token ids.
        rows: of a completion task.

    Raises:
        DataError: the model has no positions left for the longest right answer.
    """
    texts = (encoder.format.input(row) for row in rows)
    targets = [encoder.format.answer(text, encoder.format.target(row)) for text, row in zip(texts, rows, strict=True)]
    stop = (encoder.format.end,) if encoder.format.end else ()
    longest = 1 + max(len(plain_ids(encoder.tokenizer, target)) for target in targets)
    room = encoder.max_length
    if model.context_length is not None:
        virtual = max(0 if prompt is None else prompt.shape[-2] for prompt in prompts)
        room = min(room, model.context_length - virtual - longest)
    if room < 2:
        raise DataError(
            f"{rows.name}: a target has {longest - 1} tokens, and the model's positions leave none before it"
        )
    order: dict[str, int] = {}  # by the whole text: inputs that are cut to the same tokens are not the same
    distinct: list[Row] = []
    references: list[list[str]] = []
    place: list[int] = []
    for row, target in zip(rows, targets, strict=True):
        text = encoder.format.input(row)
        if text not in order:
            order[text] = len(order)
            distinct.append(row)
            references.append([])
        place.append(order[text])
        references[order[text]].append(target)
    inputs = Encoder(encoder.tokenizer, encoder.format, room, encoder.vocabulary).inputs(distinct)
    outputs = continue_ids(model, prompts, inputs, [longest] * len(inputs), GenerateConfig(stop=stop))
    return Completions([_as_given(*each) for each in zip(outputs, references, strict=True)], references, place)


def _as_given(output: str, references: Sequence[str]) -> str:
    """Return an output with its white space at an end where a right answer has some there; elsewhere it says nothing.

    An indentation is a part of the answer; the space before a word is not.
    """
    if not any(right[:1].isspace() for right in references):
        output = output.lstrip()
    return output if any(right[-1:].isspace() for right in references) else output.rstrip()
