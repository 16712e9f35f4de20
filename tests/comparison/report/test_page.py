"""The report of a comparison says what the results say, in every case that a comparison can end with."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image
from sacrebleu.metrics.bleu import BLEU
from scipy.stats import binomtest

from softprompt import formatting
from softprompt.comparison.report.experiment_setup import experiment_setup
from softprompt.comparison.report.page import write_report
from softprompt.comparison.report.ranking import summarize
from softprompt.comparison.report.recommendation import Recommendation, recommend
from softprompt.comparison.report.samples import choose_samples
from softprompt.comparison.results import Costs, Point, Result, difference, mean_primary, read_result, rejudge
from softprompt.data.rows import Row, Task, load_data
from softprompt.data.templates import make_format
from softprompt.errors import InputError
from softprompt.evaluation.completions import Completions
from softprompt.evaluation.intervals import Metric, bootstrap, proportion
from softprompt.evaluation.scores import Confusion

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LABELS = ("negative", "positive")
# Trainable parameters, bytes to keep, seconds, peak memory, seconds a prediction.
COSTS: dict[str, tuple[int, int, float, int, float]] = {
    "full": (134_515_008, 538_090_408, 480.0, 2_410_000_000, 0.031),
    "lora": (2_442_240, 9_793_104, 462.0, 1_480_000_000, 0.033),
    "prompt-tuning": (11_520, 46_480, 235.0, 640_000_000, 0.027),
    "prompt-tuning-ensemble": (34_560, 139_440, 478.0, 640_000_000, 0.064),
    "prefix-tuning": (230_400, 921_900, 195.0, 590_000_000, 0.026),
    "few-shot": (0, 1_890, 310.0, 210_000_000, 0.048),
    "zero-shot": (0, 212, 0.0, 0, 0.025),
}


def costs(method: str) -> Costs:
    parameters, kept, seconds, peak, prediction = COSTS.get(method, (1000, 4000, 60.0, 10**8, 0.03))
    return Costs(
        trainable_parameters=parameters,
        stored_bytes=kept,
        train_seconds=seconds,
        train_cpu_seconds=1.9 * seconds,
        train_tokens=int(1000 * seconds),
        peak_bytes=peak,
        prediction_seconds=prediction,
        switch_seconds=0.61 if method == "full" else 0.004,
        base_unchanged=method != "full",
        perplexity_before=18.234,
        perplexity_after=31.02 if method == "full" else 18.234,
    )


def curve(method: str, end: dict[str, float], seed: int) -> list[Point]:
    seconds = costs(method).train_seconds
    if not costs(method).trainable_parameters:
        return []
    drift = np.random.default_rng(seed).normal(0, 0.01, 9)
    return [
        Point(
            step=25 * n,
            seconds=seconds * n / 8,
            loss=None if n == 0 else 1.2 - 0.1 * n,
            validation={name: value * (0.7 + 0.3 * n / 8 + float(drift[n])) for name, value in end.items()},
        )
        for n in range(9)
    ]


def result(method: str, task: Task, seed: int = 0, **given: Any) -> Result:
    fields: dict[str, Any] = {
        "data": "reviews.csv",
        "base_model": "smollm2-135m",
        "rows": {"train": 1000, "validation": 200, "test": len(given["statistics"])},
        "settings": {"equal": "time", "seconds": 480, "template": "{{ text }}\nSentiment:", "method": method},
        "costs": costs(method),
        "environment": {"softprompt": "0.1.0", "torch": "2.13.0", "processor": "AMD EPYC, 2 cores"},
        "date": "2026-03-01T10:00:00+00:00",
    }
    return Result(method=method, seed=seed, task=task, **{**fields, **given})


def labelled(count: int = 400, labels: Sequence[str] = LABELS) -> list[Row]:
    return [{"text": f"review number {n}", "label": labels[n % len(labels)]} for n in range(count)]


def classified(rows: Sequence[Row], shares: dict[str, float], seeds: int = 1, **given: Any) -> list[Result]:
    """Results whose rows are the harder to get right the further a fixed shuffle puts them behind."""
    labels = sorted({row["label"] for row in rows})
    hardness = np.random.default_rng(0).permutation(len(rows)) / len(rows)
    found = []
    for method, share in shares.items():
        for seed in range(seeds):
            noise = np.random.default_rng([seed, *method.encode()]).normal(0, 0.02, len(rows))
            right = hardness + noise < share
            predictions = [
                row["label"] if ok else labels[(labels.index(row["label"]) + 1) % len(labels)]
                for row, ok in zip(rows, right, strict=True)
            ]
            counts = np.zeros((len(labels), len(labels)), int)
            for row, predicted in zip(rows, predictions, strict=True):
                counts[labels.index(row["label"]), labels.index(predicted)] += 1
            accuracy = proportion(right)
            fields = {
                "metrics": {"accuracy": accuracy, "macro_f1": accuracy, "loss": Metric(value=0.4, low=0.3, high=0.5)},
                "confusion": Confusion(labels=labels, counts=counts.tolist()),
                "predictions": predictions,
                "statistics": [[float(ok), 1.0] for ok in right],
                "curve": curve(method, {"accuracy": accuracy.value, "loss": 0.4}, seed),
            }
            found.append(result(method, "classification", seed, **{**fields, **given}))
    return found


def advice(results: Sequence[Result], rows: Sequence[Row]) -> Recommendation:
    return recommend(summarize(results, rows))


def visible(page: str) -> str:
    """What a reader sees of a page or of Markdown, with plain spaces."""
    text = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).replace("\u00a0", " ").split())


ALL = {
    "zero-shot": 0.70,
    "few-shot": 0.74,
    "prompt-tuning": 0.875,
    "prompt-tuning-ensemble": 0.89,
    "prefix-tuning": 0.885,
    "lora": 0.88,
    "full": 0.86,
}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Result], list[Row], Path]:
    """Results of seven methods with two seeds each, and their report."""
    rows = labelled()
    results = classified(rows, ALL, seeds=2)
    folder = tmp_path_factory.mktemp("report")
    write_report(results, rows, folder)
    return results, rows, folder


# The figures are those of the results.


def test_a_method_s_figure_is_the_mean_over_its_seeds(everything: tuple[list[Result], list[Row], Path]) -> None:
    of_lora = [r for r in everything[0] if r.method == "lora"]
    figure = mean_primary(of_lora)
    assert figure.value == pytest.approx(np.mean([r.primary.value for r in of_lora]))
    assert figure.low < figure.value < figure.high
    assert mean_primary(of_lora[:1]) == of_lora[0].primary


def test_the_difference_of_two_accuracies_is_the_paired_one() -> None:
    rows = labelled()
    better, worse = classified(rows, {"lora": 0.9, "full": 0.8})
    found = difference([better], [worse])
    per_row = np.array([a[0] - b[0] for a, b in zip(better.statistics, worse.statistics, strict=True)])
    expected = bootstrap(lambda drawn: float(per_row[drawn].mean()), len(rows))
    assert found.value == pytest.approx(better.primary.value - worse.primary.value)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_the_report_shows_the_figures_of_the_results(
    everything: tuple[list[Result], list[Row], Path], name: str
) -> None:
    results, rows, folder = everything
    text = visible((folder / name).read_text(encoding="utf-8"))
    for method in ALL:
        mine = [r.primary.value for r in results if r.method == method]
        assert f"{100 * np.mean(mine):.1f} %" in text, method
        assert f"{costs(method).trainable_parameters:,}" in text, method
    for words in (
        "538 MB", "9.8 MB", "46.5 kB", "1.9 kB", "212 bytes",  # on disk for each task
        "8 min", "7 min 42 s", "3 min 55 s", "14 min 38 s",  # wall and processor time
        "2.4 GB", "640 MB",  # memory
        "27 ms", "610 ms", "4.0 ms",  # prediction, switching
        "18.23 → 31.02", "exactly as before",
        "1,000 training rows", "400 test rows", "2 seeds", "2026-03-01", "AMD EPYC, 2 cores",
    ):  # fmt: skip
        assert words in text, words
    assert "nan" not in text.lower().replace("finance", "")
    assert recommend(summarize(results, rows)).headline in text


def test_figures_are_written_as_people_write_them() -> None:
    plain = {
        "11,520": formatting.count(11520),
        "1.2 MB": formatting.size(1_200_000),
        "999 bytes": formatting.size(999),
        "1.0 MB": formatting.size(999_900),
        "0 bytes": formatting.size(0),
        "2.0 TB": formatting.size(2e12),
        "87.3 %": formatting.metric("accuracy", 0.8734),
        "32.5": formatting.metric("bleu", 32.46),
        "2.964": formatting.metric("loss", 2.9641),
        "4 min 10 s": formatting.duration(250),
        "1 min": formatting.duration(59.9),
        "2 h": formatting.duration(7199),
        "1 h 2 min": formatting.duration(3725),
        "4.2 ms": formatting.duration(0.0042),
        "1.0 s": formatting.duration(0.9999),
        "0.0 ms": formatting.duration(1e-6),
        "0 s": formatting.duration(0),
        "not a number": formatting.metric("loss", float("nan")),
        "∞": formatting.metric("perplexity", float("inf")),
        "2.5 to ∞": formatting.interval("bleu", Metric(value=3, low=2.5, high=float("inf"))),
        "no interval": formatting.interval("accuracy", Metric(value=0.5, low=0.1, high=float("nan"))),
        "−1.2 points": formatting.signed_gap("accuracy", -0.012),
        "0.0 points": formatting.signed_gap("accuracy", -0.0001),
        "+0.250 nats": formatting.signed_gap("loss", 0.25),
    }
    assert {text: text for text in plain} == {text: made.replace("\u00a0", " ") for text, made in plain.items()}


# The recommendation follows from the numbers.


def test_lora_is_recommended_where_it_wins_and_the_prompt_s_price_is_told() -> None:
    rows = labelled()
    found = advice(classified(rows, {"zero-shot": 0.6, "prompt-tuning": 0.8, "lora": 0.92}), rows)
    assert found.headline == "Use LoRA."
    text = visible(" ".join(found.reasons))
    assert "LoRA has the best accuracy" in text
    assert "the soft prompt, is " in text
    assert "46.5 kB on disk for each task instead of 9.8 MB" in text
    assert "the handwritten prompt, it gains" in text


def test_the_handwritten_prompt_is_recommended_where_training_gains_nothing() -> None:
    rows = labelled()
    found = advice(classified(rows, {"zero-shot": 0.85, "few-shot": 0.85, "prompt-tuning": 0.855, "lora": 0.85}), rows)
    assert found.summary.method == "zero-shot"
    assert found.headline == "Write the prompt by hand; do not train."
    assert "No method is significantly different on these 400 rows" in found.reasons[0]
    assert "Training brings no significant gain on these rows." in found.reasons


def test_a_soft_prompt_that_ties_with_lora_is_recommended_as_the_cheaper() -> None:
    rows = labelled()
    results = classified(rows, {"zero-shot": 0.6, "prompt-tuning": 0.88, "lora": 0.895, "full": 0.75})
    found = advice(results, rows)
    assert found.summary.method == "prompt-tuning"
    text = visible(" ".join(found.reasons))
    assert "not significantly different" in text
    assert "the soft prompt is the cheapest" in text
    assert "trains 11,520 parameters instead of 2,442,240" in text


def test_full_fine_tuning_is_recommended_where_nothing_else_comes_near() -> None:
    rows = labelled()
    found = advice(classified(rows, {"zero-shot": 0.6, "lora": 0.8, "full": 0.93}), rows)
    assert found.headline == "Fine-tune the whole model."
    assert any("18.23 to 31.02" in caution for caution in found.cautions)


def test_a_method_behind_one_that_can_be_told_apart_is_not_recommended() -> None:
    """Its interval contains 0 only because it is right on other rows; it takes more room than what is ahead of it."""
    rows = labelled(300)
    results = classified(rows, {"full": 0.9, "prompt-tuning": 0.9, "lora": 0.9})
    best = [row[0] for row in results[0].statistics]
    right, wrong = (np.flatnonzero(np.array(best) == value) for value in (1, 0))

    def of(less: int, more: int) -> dict[str, Any]:
        mine = np.array(best)
        mine[right[:less]], mine[wrong[:more]] = 0, 1
        return {"statistics": [[ok, 1.0] for ok in mine], "metrics": {"accuracy": proportion(mine)}}

    behind = results[1].model_copy(update=of(7, 0))
    tied = results[2].model_copy(update=of(35, 25))
    summaries = {s.method: s for s in summarize([results[0], behind, tied], rows)}
    assert summaries["lora"].tied
    assert not summaries["prompt-tuning"].tied
    assert summaries["lora"].figure.value < summaries["prompt-tuning"].figure.value
    told = advice([results[0], behind, tied], rows)
    assert told.summary.method == "full"
    assert "LoRA is not significantly" not in " ".join(told.reasons)


def test_the_lower_loss_wins_on_plain_text(tmp_path: Path) -> None:
    rows = [{"text": f"some text {n}"} for n in range(300)]
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 30, len(rows)).astype(float)
    nats = tokens * rng.normal(3.0, 0.3, len(rows))
    results = []
    for method, factor in {"zero-shot": 1.0, "prompt-tuning": 0.85, "lora": 0.99}.items():
        statistics = np.stack([factor * nats, tokens], axis=1)
        loss = bootstrap(lambda drawn, s=statistics: float(s[drawn, 0].sum() / s[drawn, 1].sum()), len(rows))  # type: ignore[misc]
        results.append(
            result(
                method,
                "text",
                statistics=statistics.tolist(),
                metrics={"loss": loss, "perplexity": Metric(value=20.0, low=18.0, high=23.0)},
                curve=curve(method, {"loss": loss.value}, 0),
            )
        )
    found = advice(results, rows)
    assert found.summary.method == "prompt-tuning"
    assert "best loss" in found.reasons[0]
    behind = {s.method: s.to_best for s in summarize(results, rows)}
    assert behind.pop("prompt-tuning") is None
    assert all(by is not None and by.high < 0 for by in behind.values())  # a higher loss is worse
    text = visible(write_report(results, rows, tmp_path).read_text(encoding="utf-8"))
    assert f"{found.summary.figure.value:.3f}" in text
    assert "Where the methods disagree" not in text
    assert "nats" in text


def test_a_method_that_is_no_better_than_the_most_frequent_label_is_called_that() -> None:
    rows = [{"text": f"text {n}", "label": "insult" if n % 3 == 0 else "harmless"} for n in range(300)]
    found = advice(classified(rows, {"zero-shot": 0.5, "prompt-tuning": 0.66}), rows)
    assert any("always answering “\u2068harmless\u2069”" in caution for caution in found.cautions)
    assert not any("always answering" in c for c in advice(classified(rows, {"lora": 0.9}), rows).cautions)


def test_methods_that_chose_by_fewer_rows_are_told() -> None:
    rows = labelled(40)
    results = classified(rows, {"zero-shot": 0.5, "prompt-tuning": 0.7, "lora": 0.9}, seeds=2)
    told = experiment_setup(summarize(results, rows), rows).notes
    for result, chosen_by in zip(results[2:], (200, 52, 200, 200), strict=True):
        result.settings["eval_rows"] = chosen_by
    last = experiment_setup(summarize(results, rows), rows).notes
    assert last[:-1] == told
    assert last[-1].endswith("a part of the validation rows: Prompt tuning 52.")


def test_one_seed_and_few_rows_are_told() -> None:
    rows = labelled(60)
    text = " ".join(advice(classified(rows, {"zero-shot": 0.5, "lora": 0.9}), rows).cautions)
    assert "Only 60 rows were scored" in text
    assert "LoRA ran with one seed" in text
    many = labelled(400)
    assert "seed" not in " ".join(advice(classified(many, {"zero-shot": 0.5, "lora": 0.9}, seeds=2), many).cautions)


# Robust.


def completed(rows: Sequence[Row]) -> list[Result]:
    inputs = list(dict.fromkeys(row["input"] for row in rows))
    references = {text: [r["target"] for r in rows if r["input"] == text] for text in inputs}
    results = []
    for method in ("zero-shot", "prompt-tuning"):
        written = {text: references[text][0] if method == "prompt-tuning" else text for text in inputs}
        most = max(map(len, references.values()))
        ranks = [[references[t][k] if k < len(references[t]) else None for t in inputs] for k in range(most)]
        statistics = BLEU()._extract_corpus_statistics([written[t] for t in inputs], ranks)
        score = BLEU().corpus_score([written[t] for t in inputs], ranks).score  # type: ignore[arg-type]
        results.append(
            result(
                method,
                "completion",
                predictions=[written[row["input"]] for row in rows],
                statistics=[list(map(float, s)) for s in statistics],
                metrics={
                    "bleu": Metric(value=score, low=score - 1, high=score),
                    "chrf": Metric(value=9, low=8, high=9),
                },
                curve=curve(method, {"loss": 1.0}, 0),
            )
        )
    return results


def answered(right: Sequence[str], share: dict[str, float], wrong: str = "nothing of it") -> list[Result]:
    """Results of methods that have a share of the right answers, and that as results are made today."""
    results = []
    for method, part in share.items():
        written = [text if n < part * len(right) else wrong for n, text in enumerate(right)]
        found = Completions(written, [[text] for text in right], list(range(len(right))))
        fields = {"metrics": found.metrics(), "statistics": found.statistics(), "ranked_by": found.ranked_by}
        results.append(
            result(method, "completion", predictions=written, curve=curve(method, {"loss": 1.0}, 0), **fields)
        )
    return results


@pytest.mark.parametrize(
    ("form", "metric", "shown"),
    [
        ("{n}", "exact_match", "85.0 %"),
        ("Paris {n}.", "exact_match", "85.0 %"),
        ("第{n}部电影我非常喜欢看", "chrf", "chrF"),
        ("the parcel {n} never came back", "bleu", "BLEU"),
    ],
)
def test_completions_are_ranked_by_what_can_tell_them_apart(form: str, metric: str, shown: str, tmp_path: Path) -> None:
    right = [form.format(n=n) for n in range(100, 300)]
    rows = [{"input": f"question {n}", "target": text} for n, text in enumerate(right)]
    results = answered(right, {"zero-shot": 0.1, "prompt-tuning": 0.85, "lora": 0.5})
    summaries = {s.method: s for s in summarize(results, rows)}
    assert {s.primary for s in summaries.values()} == {metric}
    assert summaries["prompt-tuning"].to_best is None
    lora = summaries["lora"].to_best
    assert lora is not None
    assert lora.value == pytest.approx(results[2].primary.value - results[1].primary.value)
    assert lora.low < lora.value < lora.high < 0
    found = advice(results, rows)
    assert found.headline == "Use the soft prompt."
    text = visible(write_report(results, rows, tmp_path).read_text(encoding="utf-8"))
    assert shown in text
    assert f"Methods are ranked by {formatting.metric_name(metric)}" in text


def test_several_seeds_of_exact_matches_have_wilsons_interval() -> None:
    results = [*answered(["42", "43", "44"] * 50, {"lora": 0.5}), *answered(["42", "43", "44"] * 50, {"lora": 0.7})]
    assert mean_primary(results) == proportion(np.repeat([1, 0.5, 0], [75, 30, 45]))


def test_results_of_before_are_judged_like_new_ones(tmp_path: Path) -> None:
    """They name no metric, and their statistics are those of BLEU over words."""
    right = [str(n) for n in range(40)]
    rows = load_data([{"input": f"question {n}", "target": text} for n, text in enumerate(right)])
    (new,) = answered(right, {"prompt-tuning": 0.85})
    statistics = BLEU()._extract_corpus_statistics(new.predictions, [right])
    metrics = {"bleu": Metric(value=0, low=0, high=0), "loss": Metric(value=1, low=1, high=1)}
    old = new.model_copy(update={"ranked_by": "", "statistics": statistics, "metrics": metrics})
    record = json.loads(old.model_dump_json())
    del record["ranked_by"]
    (tmp_path / "old.json").write_text(json.dumps(record))
    read = read_result(tmp_path / "old.json")
    assert (read.ranking, read.primary.value) == ("bleu", 0)
    judged = rejudge(read, make_format("completion", []), rows)
    assert (judged.ranking, judged.statistics) == (new.ranking, new.statistics)
    assert judged.metrics == {**new.metrics, "loss": metrics["loss"]}
    with pytest.raises(InputError, match="same metric to be ranked by: bleu, exact_match"):
        summarize([read, new], list(rows))
    assert len(summarize([judged, new], list(rows))) == 1


def test_completions_that_share_an_input_are_one_sample_with_all_right_answers(tmp_path: Path) -> None:
    rows = [
        {"input": f"name[The Mill {n // 2}]", "target": f"The Mill number {n // 2} is a {kind} place to eat"}
        for n, kind in enumerate(["fine", "good"] * 20)
    ]
    results = completed(rows)
    samples = choose_samples(summarize(results, rows), rows)
    assert (samples.inputs, samples.disagree) == (20, 20)
    assert samples.shown[0].right == [rows[0]["target"], rows[1]["target"]]
    text = visible(write_report(results, rows, tmp_path).read_text(encoding="utf-8"))
    assert "100.0" in text
    assert "40 test rows with 20 inputs" in text
    assert "validation loss" in text  # BLEU was not found while learning


@pytest.mark.parametrize("shares", [{"zero-shot": 0.7}, {"prompt-tuning": 0.8}], ids=["untrained", "trained"])
def test_one_method_alone_is_reported_without_a_comparison(shares: dict[str, float], tmp_path: Path) -> None:
    rows = labelled(300)
    results = classified(rows, shares)
    text = visible(write_report(results, rows, tmp_path).read_text(encoding="utf-8"))
    assert "there is nothing to compare it with" in text
    assert "Some answers" in text
    assert ("Learning curves" in text) == ("prompt-tuning" in shares)


def test_many_labels_are_shown_as_their_most_frequent_mistakes(tmp_path: Path) -> None:
    labels = [f"intent {n}" for n in range(77)]
    rows = labelled(770, labels)
    results = classified(rows, {"prompt-tuning": 0.5})
    page = write_report(results, rows, tmp_path).read_text(encoding="utf-8")
    assert "The most frequent mistakes" in visible(page)
    shown = re.findall(r"<tr><td>(\d+)</td><td><bdi>(.*?)</bdi></td><td><bdi>(.*?)</bdi></td></tr>", page)
    wrong = Counter(
        (row["label"], told) for row, told in zip(rows, results[0].predictions, strict=True) if row["label"] != told
    )
    assert [int(number) for number, *_ in shown] == [number for _, number in wrong.most_common(12)]
    assert all(wrong[right, told] == int(number) for number, right, told in shown)
    assert 'class="matrix"' not in page


def test_figures_that_are_not_finite_leave_no_hole(tmp_path: Path) -> None:
    rows = labelled(300)
    results = classified(rows, {"zero-shot": 0.7, "lora": 0.9})
    nan = float("nan")
    broken = results[1].model_copy(
        update={
            "metrics": {"accuracy": Metric(value=nan, low=nan, high=nan)},
            "costs": costs("lora").model_copy(update={"prediction_seconds": nan, "perplexity_after": float("inf")}),
            "statistics": [[nan, 1.0]] * 300,
        }
    )
    page = write_report([results[0], broken], rows, tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"\b(nan|inf)\b", page, re.IGNORECASE)
    assert advice([results[0], broken], rows).summary.method == "zero-shot"
    cheaper = broken.model_copy(update={"method": "few-shot", "costs": costs("zero-shot")})
    assert advice([classified(rows, {"lora": 0.9})[0], cheaper], rows).summary.method == "lora"


NAN, INF = float("nan"), float("inf")


def at(results: Sequence[Result], method: str, value: float) -> list[Result]:
    """The results, but with another figure for a method, in each row."""
    figure = Metric(value=value, low=value, high=value)
    return [
        r.model_copy(update={"metrics": {"accuracy": figure}, "statistics": [[value, 1.0] for _ in r.statistics]})
        if r.method == method
        else r
        for r in results
    ]


@pytest.mark.parametrize("value", [0.0, NAN, INF])
def test_no_method_is_the_best_where_none_has_anything_right(value: float, tmp_path: Path) -> None:
    rows = labelled(300)
    results = at(at(classified(rows, {"zero-shot": 0.7, "lora": 0.9}), "lora", value), "zero-shot", value)
    found = advice(results, rows)
    assert found.summary is None
    assert found.headline == "No method can be recommended."
    expected = "better accuracy than 0.0 %" if value == 0 else "No method's accuracy is a finite number"
    assert expected in visible(found.reasons[0])
    for name in ("report.html", "report.md"):
        write_report(results, rows, tmp_path)
        text = visible((tmp_path / name).read_text(encoding="utf-8"))
        assert "no method is the best" in text
        assert "recommended" not in text.replace("No method can be recommended", "").replace(
            "The recommended method", ""
        )
        assert "has the best" not in text


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_figure_that_is_not_finite_is_shown_as_such_and_never_the_best(value: float, tmp_path: Path) -> None:
    rows = labelled(300)
    results = at(classified(rows, {"zero-shot": 0.5, "lora": 0.9, "full": 0.7}), "lora", value)
    found = advice(results, rows)
    assert found.summary is not None
    assert found.summary.method == "full"
    assert "–" not in found.reasons[0]
    write_report(results, rows, tmp_path)
    text = visible((tmp_path / "report.md").read_text(encoding="utf-8"))
    assert {NAN: "not a number (no interval)", INF: "∞ (∞ to ∞)", -INF: "−∞"}.get(value, "not a number") in text
    assert "cannot be compared" in text
    alone = advice(at(results, "zero-shot", NAN), rows)
    assert alone.summary is not None
    assert alone.summary.method == "full"
    assert "No other method's accuracy is a finite number" in alone.reasons[0]


def test_a_seed_that_diverged_is_counted(tmp_path: Path) -> None:
    rows = labelled(300)
    results = classified(rows, {"zero-shot": 0.5, "lora": 0.9}, seeds=3)
    (broken,) = at([results[-1]], "lora", NAN)
    write_report([*results[:-1], broken], rows, tmp_path)
    text = visible((tmp_path / "report.md").read_text(encoding="utf-8"))
    of_lora = [100 * r.primary.value for r in results if r.method == "lora"][:2]
    assert f"seeds {min(of_lora):.1f} to {max(of_lora):.1f}; 1 of 3 seeds without a finite number" in text
    chosen = advice([*results[:-1], broken], rows).summary
    assert chosen is not None
    assert chosen.method == "zero-shot"


def test_a_method_with_nothing_right_is_not_recommended_for_being_cheap() -> None:
    """One of 60 right cannot be told apart from none, and is still more."""
    rows = labelled(60)
    results = at(classified(rows, {"zero-shot": 0.5, "lora": 0.02}), "zero-shot", 0.0)
    found = advice(results, rows)
    assert found.summary is not None
    assert found.summary.method == "lora"
    assert "The others have no right answer" in found.reasons[0]
    assert "an interval that contains 0" in found.reasons[0]


def test_the_best_of_several_is_said_to_look_better_than_it_is(tmp_path: Path) -> None:
    rows = labelled()
    results = classified(rows, {"zero-shot": 0.6, "prompt-tuning": 0.88, "lora": 0.9})
    summaries = summarize(results, rows)
    lead = difference([results[2]], [results[1]])
    write_report(results, rows, tmp_path)
    for name in ("report.html", "report.md"):
        text = visible((tmp_path / name).read_text(encoding="utf-8"))
        words = formatting.signed_gap("accuracy", lead.value), formatting.gap_interval("accuracy", lead)
        assert visible(f"{words[0]} ({words[1]}) to the second, the soft prompt; picked on these test rows") in text
        assert "it looks better than it is: a part of its advantage is chance" in text
    assert "picked on these test rows, so it looks better than it is" in recommend(summaries).reasons[0]
    (alone,) = summarize(results[:1], rows)
    assert not any("better than it is" in note for note in experiment_setup([alone], rows).notes)
    assert "picked" not in " ".join(recommend([alone]).reasons)


HOSTILE = '<script>alert("x")</script> & $a_b$ `*| \u202eabc'


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report whose every text wants to be more than text, is very long, or runs from right to left."""
    folder = tmp_path_factory.mktemp("hostile")
    labels = [HOSTILE, "אבגד הוזח", "x" * 300]
    rows = [{"text": f"{HOSTILE} {'longword' * 200} {n}\nשלום עולם", "label": labels[n % 3]} for n in range(90)]
    results = classified(
        rows,
        {"zero-shot": 0.5, f"prompt-tuning-{HOSTILE}": 0.8, "lora": 0.7},
        data=f"/very/{'long' * 60}/{HOSTILE}.csv",
        settings={HOSTILE: HOSTILE, "verbalizers": dict.fromkeys(labels, HOSTILE)},
        environment={HOSTILE: HOSTILE},
    )
    write_report(results, rows, folder)
    return folder


class _Tags(HTMLParser):
    """Every tag, and every attribute that could fetch something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.headings: list[int] = []
        self.references: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "data", "srcset")]


def test_markup_in_texts_is_shown_and_not_obeyed(hostile: Path) -> None:
    page = (hostile / "report.html").read_text(encoding="utf-8")
    assert "script" not in _Tags(page).tags
    assert page.count("&lt;script&gt;") > 10
    written = (hostile / "report.md").read_text(encoding="utf-8")
    shown = MarkdownIt("commonmark").enable("table").render(written)
    assert not {"script", "em"} & set(_Tags(shown).tags)
    assert shown.count("&lt;script&gt;") > 10
    rows = re.findall("<tr>.*?</tr>", shown, re.DOTALL)
    assert {len(re.findall("<t[hd]", row)) for row in rows[:4]} == {6}  # no cell is cut in two
    assert {len(re.findall("<t[hd]", row)) for row in rows[4:]} == {4}


def test_the_page_needs_nothing_from_elsewhere(everything: tuple[list[Result], list[Row], Path]) -> None:
    page = (everything[2] / "report.html").read_text(encoding="utf-8")
    seen = _Tags(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(seen.tags)
    assert all(reference.startswith("#") for reference in seen.references)
    assert "://" not in page.replace("http-equiv", "")
    assert "url(" not in re.sub(r"url\(#\w+\)", "", page)
    assert "@import" not in page


def test_headings_are_in_order_and_every_plot_has_words(everything: tuple[list[Result], list[Row], Path]) -> None:
    page = (everything[2] / "report.html").read_text(encoding="utf-8")
    headings = _Tags(page).headings
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 6
    for drawing in drawings:
        root = ET.fromstring(drawing)
        assert root.get("role") == "img"
        assert len(root.get("aria-label") or "") > 40
        assert not re.search(r"#[0-9a-f]{6}\b", drawing), "a color that the dark page cannot change"
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_plots_use_the_colors_that_the_style_sheet_has(everything: tuple[list[Result], list[Row], Path]) -> None:
    page = (everything[2] / "report.html").read_text(encoding="utf-8")
    style = page.partition("</style>")[0]
    light, _, dark = style.partition("prefers-color-scheme: dark")
    for name in set(re.findall(r"var\((--[\w-]+)\)", page)) - {"--share"}:
        assert f"{name}:" in light, name
        assert f"{name}:" in dark.partition("}\n}")[0], name


def test_the_markdown_table_has_a_line_for_each_method(everything: tuple[list[Result], list[Row], Path]) -> None:
    written = (everything[2] / "report.md").read_text(encoding="utf-8")
    first = written.partition("## All measurements")[0]
    lines = [line for line in first.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(ALL)
    assert {line.count("|") for line in lines} == {7}
    assert sum(line.startswith("| **") for line in lines) == 1
    assert "](report.png)" in written
    assert "\n\n\n" not in written


def test_the_picture_is_as_wide_as_a_readme_needs(everything: tuple[list[Result], list[Row], Path]) -> None:
    with Image.open(everything[2] / "report.png") as picture:
        assert picture.width >= 1600
        assert picture.convert("L").getextrema() != (255, 255)


def test_results_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    rows = labelled(300)
    results = classified(rows, {"zero-shot": 0.7, "lora": 0.9})
    with pytest.raises(InputError, match="no results"):
        write_report([], rows, tmp_path)
    with pytest.raises(InputError, match="scored on 300 rows, and 299 are given"):
        write_report(results, rows[1:], tmp_path)
    other = result("full", "text", statistics=[[1.0, 1.0]] * 300, metrics={"loss": Metric(value=1, low=1, high=1)})
    with pytest.raises(InputError, match="same task: classification, text"):
        write_report([*results, other], rows, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    rows = labelled(300)
    with pytest.raises(InputError, match=r"pip install 'softprompt\[compare\]'"):
        write_report(classified(rows, {"lora": 0.9}), rows, tmp_path)


# In a real browser.

_MEASURE = """<!doctype html><body><iframe src="{page}" style="border:0;width:{width}px;height:900px"></iframe><script>
addEventListener("load", () => {{
  const inside = document.querySelector("iframe").contentDocument, root = inside.documentElement;
  const boxes = [...inside.querySelectorAll("svg")].map(s => s.getBoundingClientRect());
  const sizes = boxes.map(box => Math.round(Math.min(box.width, box.height)));
  document.title = [root.clientWidth, root.scrollWidth, ...sizes].join(" ");
}});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: none of chromium, chromium-browser, google-chrome")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("which", ["everything", "hostile"])
def test_in_a_browser_the_page_does_not_scroll_sideways(
    which: str, width: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue(which)
    page = (found if isinstance(found, Path) else found[2]) / "report.html"
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(_MEASURE.format(page=page.as_uri(), width=width), encoding="utf-8")
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'browser'}", "--window-size=1400,1000", "--virtual-time-budget=10000",
        "--dump-dom", wrapper.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    title = re.search(r"<title>([\d ]+)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    seen, needed, *plots = map(int, title[1].split())
    assert width - 20 <= seen <= width  # a scroll bar may take a little
    assert needed <= seen
    assert len(plots) == 6
    assert min(plots) >= 80


def test_rows_that_all_seeds_have_right_say_no_more_than_one_seeds() -> None:
    rows = labelled(12)
    alone, both = classified(rows, {"lora": 2.0}), classified(rows, {"lora": 2.0}, seeds=2)
    assert mean_primary(both) == mean_primary(alone) == proportion(np.ones(12, bool))
    assert mean_primary(both).low < 0.8


def test_the_interval_of_several_seeds_is_wilsons_at_their_mean() -> None:
    found = classified(labelled(400), {"lora": 0.8}, seeds=3)
    mean = mean_primary(found)
    assert mean.value == pytest.approx(np.mean([one.primary.value for one in found]))
    assert (mean.low, mean.high) == pytest.approx(
        tuple(binomtest(round(400 * mean.value), 400).proportion_ci(method="wilson")), abs=0.002
    )


def test_figures_that_are_not_finite_come_back(tmp_path: Path) -> None:
    nothing = {"accuracy": proportion(np.ones(12, bool)), "loss": Metric(value=np.nan, low=-np.inf, high=np.inf)}
    (one,) = classified(labelled(12), {"lora": 2.0}, metrics=nothing)
    assert str(read_result(one.save(tmp_path))) == str(one)
