"""Completions: what a prompt writes, compared with the right answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Indel
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from softprompt.config import GenerateConfig
from softprompt.data.encoder import Encoder, plain_ids
from softprompt.data.rows import Row, Rows
from softprompt.data.templates import Format
from softprompt.decoding import continue_ids
from softprompt.errors import DataError
from softprompt.evaluation.intervals import Metric, bootstrap, proportion
from softprompt.evaluation.primary_metric import bleu, chrf, compute_metric, ranking_metric
from softprompt.evaluation.words import Words
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.ensemble import AnyPrompt


@dataclass(frozen=True)
class Completions:
    """One output for each distinct input; rows that share an input are several right answers to it.

    Attributes:
        outputs: one for each distinct input.
        references: for each output, the right answers.
        place: for each row, the index of its output.
    """

    outputs: list[str]
    references: list[list[str]]
    place: list[int]

    def metrics(self) -> dict[str, Metric]:
        """Return exact match, BLEU (Papineni et al. 2002), chrF (Popović 2015) and ROUGE-L (Lin 2004).

        The best-matching right answer counts; for BLEU all of them together. Intervals are over distinct inputs.
        """

        def words(text: str) -> list[str]:
            return self._words.plain(text.lower())

        overlap = np.array(  # the F1 of the longest common subsequence of words is the normalized Indel similarity
            [
                max(Indel.normalized_similarity(words(output), words(right)) for right in all_right)
                for output, all_right in zip(self.outputs, self.references, strict=True)
            ]
        )
        return {
            "exact_match": proportion(self._statistics("exact_match")[:, 0]),
            "bleu": self._corpus("bleu"),
            "chrf": self._corpus("chrf"),
            "rouge_l": bootstrap(lambda chosen: float(overlap[chosen].mean()), len(self.outputs)),
        }

    @cached_property
    def ranked_by(self) -> str:
        """The metric that ranks methods on these inputs, see `ranking_metric`."""
        return ranking_metric("completion", self._right)

    def statistics(self) -> list[list[float]]:
        """Return what `ranked_by` is computed from, for each distinct input, see `compute_metric`."""
        return self._statistics(self.ranked_by).tolist()  # type: ignore[no-any-return]

    @cached_property
    def _right(self) -> list[str]:
        return [text for right in self.references for text in right]

    @cached_property
    def _words(self) -> Words:
        return Words(self._right)

    def _statistics(self, metric: str) -> NDArray[np.float64]:
        """Return what a metric is computed from, for each distinct input, `[N, …]`, see `compute_metric`."""
        if metric == "exact_match":
            pairs = zip(self.outputs, self.references, strict=True)
            return np.array([[float(output in right), 1.0] for output, right in pairs])
        if metric == "chrf":
            return _sacrebleu_statistics(chrf(), self.outputs, self.references)

        def cut(texts: Sequence[str]) -> list[str]:
            return [" ".join(self._words.tokens(text)) for text in texts]

        return _sacrebleu_statistics(bleu(), cut(self.outputs), [cut(right) for right in self.references])

    def _corpus(self, metric: str) -> Metric:
        """Return a corpus metric; its interval is not sacrebleu's own, which is a symmetric half-width only."""
        statistics = self._statistics(metric)
        return bootstrap(lambda chosen: compute_metric(metric, statistics[chosen].sum(axis=0)), len(self.outputs))


def _sacrebleu_statistics(
    metric: BLEU | CHRF, outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> NDArray[np.float64]:
    """Return sacrebleu's statistics of each output; sacrebleu takes all first right answers, then all second ones."""
    most = max(map(len, references))
    by_rank = [[right[k] if k < len(right) else None for right in references] for k in range(most)]
    return np.array(metric._extract_corpus_statistics(outputs, by_rank))  # type: ignore[arg-type]


def judge(form: Format, rows: Rows, written: Sequence[str]) -> Completions:
    """Compare outputs that were written before with the right answers.

    Args:
        written: each row's output; the same for rows with the same input.
    """
    _, references, place = _by_input(form, rows)
    first = np.unique(place, return_index=True)[1]
    return Completions([written[row] for row in first], references, place)


def _by_input(form: Format, rows: Rows) -> tuple[list[Row], list[list[str]], list[int]]:
    """Return the first row of every distinct input, the right answers to each, and the index of each row's input."""
    order: dict[str, int] = {}  # by the whole text: inputs that are cut to the same tokens stay different
    distinct: list[Row] = []
    references: list[list[str]] = []
    place: list[int] = []
    for row in rows:
        text = form.input(row)
        if text not in order:
            order[text] = len(order)
            distinct.append(row)
            references.append([])
        place.append(order[text])
        references[order[text]].append(form.answer(text, form.target(row)))
    return distinct, references, place


def complete(model: FrozenModel, prompt: AnyPrompt, encoder: Encoder, rows: Rows) -> Completions:
    """Write a completion for every distinct input, greedily, and at most as long as the longest right answer.

    Raises:
        DataError: the model has no positions left for the longest right answer.
    """
    distinct, references, place = _by_input(encoder.format, rows)
    stop = (encoder.format.end,) if encoder.format.end else ()
    longest = 1 + max(len(plain_ids(encoder.tokenizer, right)) for each in references for right in each)
    room = encoder.max_length
    if model.context_length is not None:
        room = min(room, model.context_length - prompt.num_virtual_tokens - longest)
    if room < 2:
        raise DataError(
            f"{rows.name}: a target has {longest - 1} tokens, and the model's positions leave none before it"
        )
    inputs = Encoder(encoder.tokenizer, encoder.format, room, encoder.vocabulary).inputs(distinct)
    outputs = continue_ids(model, prompt, inputs, [longest] * len(inputs), GenerateConfig(stop=stop))
    return Completions([_strip_like(*each) for each in zip(outputs, references, strict=True)], references, place)


def _strip_like(output: str, references: Sequence[str]) -> str:
    """Strip an output at each end where no right answer has white space.

    Indentation is a part of an answer; the space before its first word is not.
    """
    if not any(right[:1].isspace() for right in references):
        output = output.lstrip()
    return output if any(right[-1:].isspace() for right in references) else output.rstrip()
