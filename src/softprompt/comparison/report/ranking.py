"""Each method's summary: its figure over all seeds, its costs, and its difference to the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from softprompt.comparison.results import Costs, Result, difference, mean_primary
from softprompt.data.rows import Row, Task
from softprompt.errors import InputError
from softprompt.evaluation.intervals import Metric
from softprompt.evaluation.primary_metric import can_be_best, lower_is_better


@dataclass(frozen=True)
class MethodInfo:
    """The static description of a method."""

    title: str
    phrase: str  # its name inside a sentence
    family: str  # the row of the tutorial's table that it belongs to, if any
    advice: str  # the headline where it is recommended
    training: str
    best_for: str


# In the order of the tutorial's table.
_METHOD_INFOS = {
    "full": MethodInfo(
        "Full fine-tuning",
        "full fine-tuning",
        "Fine-tuning",
        "Fine-tune the whole model.",
        "yes: all weights of the model",
        "one difficult task with much data, and disk space for a whole model",
    ),
    "lora": MethodInfo(
        "LoRA",
        "LoRA",
        "LoRA",
        "Use LoRA.",
        "yes: small matrices beside the weights",
        "tasks that need what the model does not know yet, with an adapter for each",
    ),
    "prompt-tuning": MethodInfo(
        "Prompt tuning",
        "the soft prompt",
        "Prompt tuning",
        "Use the soft prompt.",
        "yes: the embeddings of a few virtual tokens",
        "many tasks on one unchanged base model, some kilobytes for each",
    ),
    "prefix-tuning": MethodInfo(
        "Prefix tuning",
        "the learned prefix",
        "Prefix tuning",
        "Use the learned prefix.",
        "yes: keys and values of virtual tokens at every layer",
        "many tasks on one unchanged base model, where a soft prompt learns too little",
    ),
    "few-shot": MethodInfo(
        "Few-shot",
        "the few-shot prompt",
        "Prompt engineering",
        "Put a few examples into the prompt; do not train.",
        "no: examples are chosen for the prompt",
        "a first try with a few examples; models behind an API",
    ),
    "zero-shot": MethodInfo(
        "Zero-shot",
        "the handwritten prompt",
        "Prompt engineering",
        "Write the prompt by hand; do not train.",
        "no: the prompt is written by hand",
        "a first try without examples; models behind an API",
    ),
}


def method_info(method: str) -> MethodInfo:
    """Return a method's description; an ensemble of old results is of the kind of its members."""
    if method in _METHOD_INFOS:
        return _METHOD_INFOS[method]
    for name, info in _METHOD_INFOS.items():
        if method.startswith(f"{name}-"):
            rest = method.removeprefix(name).replace("-", " ")
            phrase = info.phrase + rest
            return MethodInfo(info.title + rest, phrase, info.family, f"Use {phrase}.", info.training, info.best_for)
    title = method.replace("-", " ")
    return MethodInfo(title[:1].upper() + title[1:], title, "", f"Use {title}.", "", "")


@dataclass(frozen=True)
class MethodSummary:
    """A method's figures over all seeds.

    Attributes:
        to_best: its difference to the best method, negative where it is worse; None for the best itself, which is the
            first where no method can be called the best (`can_be_best`).
    """

    method: str
    info: MethodInfo
    place: int  # in the order in which methods are shown
    results: list[Result]  # one per seed
    figure: Metric  # the primary metric over all seeds
    to_best: Metric | None

    @property
    def task(self) -> Task:
        return self.results[0].task

    @property
    def primary(self) -> str:
        """The name of the metric that methods are ranked by."""
        return self.results[0].ranking

    @property
    def can_be_best(self) -> bool:
        """Whether its figure is finite and not 0.0."""
        return can_be_best(self.primary, self.figure.value)

    @property
    def learns(self) -> bool:
        """Whether it has trainable parameters."""
        return self.costs.trainable_parameters > 0

    @property
    def tied(self) -> bool:
        """Whether it is the best, or not significantly different from it."""
        return self.to_best is None or contains_zero(self.to_best)

    @cached_property
    def costs(self) -> Costs:
        """The mean over the seeds; the base model is unchanged if every seed left it so."""
        of_seeds = [result.costs for result in self.results]
        means = {
            name: float(np.mean([getattr(costs, name) for costs in of_seeds]))
            for name in Costs.model_fields
            if name != "base_unchanged"
        }
        whole = {name: round(means[name]) for name, field in Costs.model_fields.items() if field.annotation is int}
        return Costs.model_validate({**means, **whole, "base_unchanged": all(c.base_unchanged for c in of_seeds)})


# Shown beside the figure of the best of several methods.
PICKED = "picked on these test rows, so it looks better than it is"


def second(summaries: Sequence[MethodSummary]) -> MethodSummary | None:
    """Return the second best method; None where no other has a finite figure."""
    others = [s for s in summaries if s.to_best is not None and math.isfinite(s.to_best.value)]
    return max(others, key=lambda s: s.to_best.value if s.to_best else 0.0, default=None)


def contains_zero(of: Metric) -> bool:
    """Tell whether a difference is not significant; false for NaN."""
    return of.low <= 0 <= of.high


def summarize(results: Sequence[Result], rows: Sequence[Row]) -> list[MethodSummary]:
    """Group results by method, in the order of the tutorial's table, and compare each method with the best.

    Args:
        results: of one comparison, one per method and seed.
        rows: the test rows.
    """
    _require_comparable(results, rows)
    by_method: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda r: r.seed):
        by_method.setdefault(result.method, []).append(result)
    named = [result.method for result in results]

    def order(method: str) -> tuple[int, int]:
        kinds = [n for n, name in enumerate(_METHOD_INFOS) if f"{method}-".startswith(f"{name}-")]
        return (kinds or [len(_METHOD_INFOS)])[0], named.index(method)

    figures = {method: mean_primary(of_method) for method, of_method in by_method.items()}
    sign = -1.0 if lower_is_better(results[0].ranking) else 1.0
    best = max(figures, key=lambda m: sign * figures[m].value if math.isfinite(figures[m].value) else -math.inf)
    return [
        MethodSummary(
            method,
            method_info(method),
            place,
            by_method[method],
            figures[method],
            None if method == best else difference(by_method[method], by_method[best]),
        )
        for place, method in enumerate(sorted(by_method, key=order))
    ]


def _require_comparable(results: Sequence[Result], rows: Sequence[Row]) -> None:
    if not results:
        raise InputError("there are no results to report; run softprompt compare first")
    of_all = {
        "task": {str(r.task) for r in results},
        "metric to be ranked by": {r.ranking for r in results},
        "number of scored rows": {str(len(r.statistics)) for r in results},
    }
    for what, values in of_all.items():
        if len(values) > 1:
            raise InputError(
                f"the results do not have the same {what}: {', '.join(sorted(values))}; "
                "keep each comparison in a folder of its own"
            )
    for result in results:
        if result.predictions and len(result.predictions) != len(rows):
            raise InputError(
                f"{result.method}, seed {result.seed}, was scored on {len(result.predictions)} rows, and {len(rows)} "
                "are given; remove its result, and it is run again"
            )
