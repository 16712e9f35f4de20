"""A recommendation in words, computed from the results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from softprompt.comparison.report.ranking import PICKED, MethodSummary, contains_zero, second
from softprompt.comparison.results import difference
from softprompt.evaluation.intervals import Metric
from softprompt.formatting import count, duration, gap, gap_interval, interval, metric, metric_name, plain, size

_FEW_ROWS = 200  # an accuracy's interval is then some 14 points wide
_SLOWER = 1.25  # times the other's time per prediction, from which on the report mentions it
_INTERVAL = "95\u00a0% interval"
_LEARNED_PROMPTS = ("Prompt tuning", "Prefix tuning")


@dataclass(frozen=True)
class Recommendation:
    """A recommended method (None where none can be recommended), and why."""

    summary: MethodSummary | None
    headline: str
    reasons: list[str]
    cautions: list[str]  # limits of the figures


def recommend(summaries: Sequence[MethodSummary]) -> Recommendation:
    """Recommend the cheapest of the methods that are not significantly worse than the best.

    Cheapest: no training first, then the fewest bytes per task, then the least processor time.
    """
    (best,) = (s for s in summaries if s.to_best is None)
    if len(summaries) == 1:
        headline = f"Only {best.info.phrase} was run: there is nothing to compare it with."
        reasons = [f"Its {_name(best)} is {_figure(best)}.", _takes(best)]
        return Recommendation(best, headline, reasons, _cautions(summaries, best))
    if not best.can_be_best:
        why = f"No method's {_name(best)} is a finite number"
        if math.isfinite(best.figure.value):
            why = f"No method has a better {_name(best)} than {metric(best.primary, best.figure.value)}"
        reasons = [f"{why}, so none of them is the best."]
        return Recommendation(None, "No method can be recommended.", reasons, _cautions(summaries, best))
    alike = _alike(summaries)
    chosen = min(alike, key=lambda s: (s.learns, s.costs.stored_bytes, s.costs.train_cpu_seconds))
    reasons = [
        _why(summaries, alike, chosen, best),
        _takes(chosen) if chosen is best else _saves(chosen, best),
        *_faster(alike, chosen),
        *_against_prompt_engineering(summaries, chosen),
        *_against_learned_prompts(summaries, chosen),
    ]
    return Recommendation(chosen, chosen.info.advice, reasons, _cautions(summaries, chosen))


def _alike(summaries: Sequence[MethodSummary]) -> list[MethodSummary]:
    """Return the best method and those that are not significantly worse.

    Excluded are methods with a lower figure than one that is significantly worse (their intervals are only wider), and
    methods without any right answer.
    """
    apart = max((_gap_to_best(s) for s in summaries if not s.tied), default=-math.inf)
    return [s for s in summaries if s.tied and s.can_be_best and _gap_to_best(s) >= apart]


def _name(summary: MethodSummary) -> str:
    return metric_name(summary.primary)


def _figure(summary: MethodSummary) -> str:
    of = summary.figure
    return f"{metric(summary.primary, of.value)} ({_INTERVAL} {interval(summary.primary, of)})"


def _start(text: str) -> str:
    return text[:1].upper() + text[1:]


def _and(summaries: Sequence[MethodSummary]) -> str:
    phrases = [s.info.phrase for s in summaries]
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _scored(summary: MethodSummary) -> str:
    """Return the number of scored rows; completions with the same input count once."""
    return f"{count(_units(summary))} {'inputs' if summary.task == 'completion' else 'rows'}"


def _units(summary: MethodSummary) -> int:
    return len(summary.results[0].statistics)


def _gap_to_best(summary: MethodSummary) -> float:
    if summary.to_best is None:
        return 0.0
    return summary.to_best.value if math.isfinite(summary.to_best.value) else -math.inf


def _why(
    summaries: Sequence[MethodSummary], alike: Sequence[MethodSummary], chosen: MethodSummary, best: MethodSummary
) -> str:
    tied = [s for s in alike if s is not best]
    first = f"{_start(best.info.phrase)} has the best {_name(best)}: {_figure(best)}, {PICKED}."
    following = second(summaries)
    if following is None or following.to_best is None:
        return f"{first} No other method's {_name(best)} is a finite number."
    place = "the second best" if len(summaries) > 2 else "the other one"
    after = f"{following.info.phrase}, {place}, is {_describe_gap(following, following.to_best)}"
    if not tied and following.tied:
        return f"{first} The others have no right answer; {after}, an interval that contains 0."
    if not tied:
        return f"{first} It is significantly better: {after}."
    if len(tied) == len(summaries) - 1 > 1:
        comparison = "No method is significantly different"
    else:
        comparison = f"{_start(_and(tied))} {'is' if len(tied) == 1 else 'are'} not significantly different"
    if chosen is best:
        return f"{first} {comparison} on these {_scored(best)}, and it is the cheapest of them; {after}."
    assert chosen.to_best is not None
    return (
        f"{first} {comparison} on these {_scored(best)}; of all these, {chosen.info.phrase} is the cheapest. With "
        f"{_figure(chosen)} it is {_describe_gap(chosen, chosen.to_best)}, an interval that contains 0."
    )


def _describe_gap(summary: MethodSummary, by: Metric) -> str:
    return f"{_side(summary, by)} ({_INTERVAL} of the difference {gap_interval(summary.primary, by)})"


def _side(summary: MethodSummary, by: Metric) -> str:
    return f"{gap(summary.primary, by.value)} {'worse' if by.value < 0 else 'better'}" if by.value else "equally good"


def _takes(chosen: MethodSummary) -> str:
    costs = chosen.costs
    if not chosen.learns:
        searched = f"; choosing it took {duration(costs.train_seconds)}" if costs.train_seconds >= 1 else ""
        return f"It needs no training{searched}, and takes {size(costs.stored_bytes)} on disk."
    return (
        f"It trains {count(costs.trainable_parameters)} parameters in {duration(costs.train_seconds)}, and takes "
        f"{size(costs.stored_bytes)} on disk for each task."
    )


def _saves(chosen: MethodSummary, best: MethodSummary) -> str:
    ours, theirs = chosen.costs, best.costs
    if not chosen.learns and best.learns:
        return (
            f"It needs no training; {best.info.phrase} trained {count(theirs.trainable_parameters)} parameters in "
            f"{duration(theirs.train_seconds)} and takes {size(theirs.stored_bytes)} on disk."
        )
    numbers = f"{count(ours.trainable_parameters)} parameters instead of {count(theirs.trainable_parameters)}"
    trained = f"trains {numbers}, and " if chosen.learns else ""
    return (
        f"It {trained}takes {size(ours.stored_bytes)} on disk for each task instead of {size(theirs.stored_bytes)}; "
        f"training or choosing it took {duration(ours.train_seconds)} instead of {duration(theirs.train_seconds)}."
    )


def _faster(alike: Sequence[MethodSummary], chosen: MethodSummary) -> list[str]:
    """Name a faster method, for where the time of a prediction matters most."""
    other = min(alike, key=lambda s: s.costs.prediction_seconds)
    ours, theirs = chosen.costs.prediction_seconds, other.costs.prediction_seconds
    if not ours > _SLOWER * theirs:
        return []
    return [
        f"Where the time of a prediction matters more, take {other.info.phrase}: {duration(theirs)} instead of "
        f"{duration(ours)}."
    ]


def _against_prompt_engineering(summaries: Sequence[MethodSummary], chosen: MethodSummary) -> list[str]:
    written = [s for s in summaries if not s.learns and math.isfinite(s.figure.value)]
    if not chosen.learns:
        trained = any(s.learns for s in summaries)
        return ["Training brings no significant gain on these rows."] if trained else []
    if not written:
        return []
    best = max(written, key=_gap_to_best)
    gained = difference(chosen.results, best.results)
    doubt = ", which is not significant" if contains_zero(gained) else ""
    return [
        f"Over the best method without training, {best.info.phrase}, it gains "
        f"{gap(chosen.primary, gained.value)} ({_INTERVAL} {gap_interval(chosen.primary, gained)}){doubt}."
    ]


def _against_learned_prompts(summaries: Sequence[MethodSummary], chosen: MethodSummary) -> list[str]:
    """Compare a better trained method with the best learned prompt, which is smaller."""
    prompts = [s for s in summaries if s.info.family in _LEARNED_PROMPTS and s.to_best and not s.tied]
    if not chosen.learns or chosen.info.family in _LEARNED_PROMPTS or not prompts:
        return []
    nearest = max(prompts, key=_gap_to_best)
    less = _side(nearest, difference(nearest.results, chosen.results))
    return [
        f"The best learned prompt, {nearest.info.phrase}, is {less} and takes {size(nearest.costs.stored_bytes)} on "
        f"disk for each task instead of {size(chosen.costs.stored_bytes)}; choose it where many tasks share the base "
        "model."
    ]


def _cautions(summaries: Sequence[MethodSummary], chosen: MethodSummary) -> list[str]:
    found = _no_better_than_one_label(chosen)
    if _units(chosen) < _FEW_ROWS:
        found.append(f"Only {_scored(chosen)} were scored: even a large difference may not be significant.")
    once = [s for s in summaries if s.learns and len(s.results) == 1]
    if once:
        found.append(f"{_start(_and(once))} ran with one seed: the variation between runs was not measured.")
    for summary in summaries:
        costs = summary.costs
        if abs(costs.perplexity_after - costs.perplexity_before) > 0.01 * costs.perplexity_before:
            found.append(
                f"{_start(summary.info.phrase)} changed the model outside of the task: its perplexity on unrelated "
                f"text went from {plain(costs.perplexity_before)} to {plain(costs.perplexity_after)}."
            )
    if len({tuple(sorted(r.environment.items())) for s in summaries for r in s.results}) > 1:
        found.append("Results come from different machines or versions: their times and memory are not comparable.")
    return found


def _no_better_than_one_label(chosen: MethodSummary) -> list[str]:
    confusion = chosen.results[0].confusion
    if confusion is None or not sum(map(sum, confusion.counts)):
        return []
    of_label = [sum(row) for row in confusion.counts]
    share = max(of_label) / sum(of_label)
    if chosen.figure.low > share:
        return []
    label = confusion.labels[of_label.index(max(of_label))]
    return [  # the label is isolated: it can run from right to left
        f"{_start(chosen.info.phrase)} is not significantly better than always answering “\u2068{label}\u2069”, which "
        f"would be right in {metric('accuracy', share)} of the rows."
    ]
