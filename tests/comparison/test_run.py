"""The comparison: every method under one protocol, saved, resumed and measured."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import softprompt as sp
from softprompt.comparison import USUAL
from softprompt.comparison import run as comparing
from softprompt.comparison.costs import general_perplexity, measure, weights_hash
from softprompt.comparison.methods import METHODS, weights
from softprompt.comparison.methods import trained as learning
from softprompt.comparison.methods.base import FitResult, MethodCallback, Predictor
from softprompt.comparison.protocol import make_protocol
from softprompt.comparison.results import Result, read_result
from softprompt.comparison.run import ComparisonCallback, compare
from softprompt.data.batching import batch_indices
from softprompt.data.example import Example
from softprompt.data.rows import Rows, load_data
from softprompt.errors import DataError, InputError, ModelError, RunError, SettingsError, StorageError
from softprompt.evaluation.evaluate import evaluate
from softprompt.evaluation.primary_metric import compute_metric
from softprompt.evaluation.scores import LabelScores
from softprompt.model.frozen import FrozenModel
from softprompt.training.search import FACTORS
from softprompt.training.settings import CLASSIFICATION_STEPS
from softprompt.training.throughput import Throughput
from softprompt.training.trainer import Trainer
from tiny_runs import Command, short


def films(count: int) -> Rows:
    return load_data(
        [{"text": f"a {'fine' if n % 2 else 'dull'} film {n}", "label": ("bad", "good")[n % 2]} for n in range(count)]
    )


def settings(**more: Any) -> sp.TuneConfig:
    return short(max_steps=30, batch_size=4, eval_every=None, learning_rate=None, **more)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, llama: FrozenModel) -> tuple[Path, list[Result]]:
    folder = tmp_path_factory.mktemp("compared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "MIN_SEARCH_STEPS", 3)  # steps of a learning rate
        done = compare(llama, films(60), methods=USUAL, out=folder, config=settings(), equal="examples")
    assert done.report == folder / "report.html"
    return folder, done.results


def test_compare_scores_every_method_on_the_same_rows_and_saves_it(compared: tuple[Path, list[Result]]) -> None:
    folder, results = compared
    assert [r.method for r in results] == list(USUAL)
    assert {json.dumps(r.rows) for r in results} == {'{"train": 39, "validation": 9, "test": 12}'}
    assert all(len(r.statistics) == len(r.predictions) == 12 for r in results)
    rows = load_data(folder / "test-rows.jsonl")
    for result in results:
        assert read_result(folder / "results" / f"{result.method}-0.json") == result
        right = [row["label"] == p for row, p in zip(rows, result.predictions, strict=True)]
        assert result.primary.value == pytest.approx(np.mean(right))
        assert compute_metric("accuracy", np.array(result.statistics).sum(axis=0)) == pytest.approx(np.mean(right))
    assert "<svg" in (folder / "report.html").read_text()
    assert (folder / "report.md").exists()
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_costs_are_those_of_the_methods(compared: tuple[Path, list[Result]], llama: FrozenModel) -> None:
    folder, results = compared
    costs = {r.method: r.costs for r in results}
    weights = sum(p.numel() for p in llama.hf_model.parameters())
    assert costs["zero-shot"].trainable_parameters == costs["few-shot"].trainable_parameters == 0
    assert costs["prompt-tuning"].trainable_parameters == 5 * 32
    assert costs["prefix-tuning"].trainable_parameters == 5 * 4 * 2 * 2 * 8
    assert 0 < costs["lora"].trainable_parameters < costs["full"].trainable_parameters == weights
    for name, cost in costs.items():
        stored = folder / "tasks" / f"{name}-0"
        assert stored.exists() == (name != "full")
        if stored.exists():
            assert cost.stored_bytes == sum(f.stat().st_size for f in stored.rglob("*") if f.is_file())
        assert min(cost.train_seconds, cost.prediction_seconds, cost.switch_seconds) > 0
        assert cost.base_unchanged == (name != "full")
    assert costs["full"].stored_bytes > 4 * weights
    own = general_perplexity(llama)
    for name, cost in costs.items():
        assert cost.perplexity_before == own
        assert (cost.perplexity_after == own) == (name not in ("lora", "full"))


def test_all_trained_methods_see_the_same_tokens(compared: tuple[Path, list[Result]]) -> None:
    by_method = {r.method: r for r in compared[1]}
    trained = [by_method[name] for name in ("prompt-tuning", "prefix-tuning", "lora", "full")]
    assert len({r.costs.train_tokens for r in trained}) == 1
    for result in trained:
        assert result.settings["max_steps"] == 30 - 9  # a tenth of the steps went to each of three learning rates
        assert result.settings["search"]
        assert result.curve[0].step == 0
        assert result.curve[-1].step == 21
    rates = {r.method: r.settings["learning_rate"] for r in trained}
    assert rates["lora"] in (pytest.approx(1e-3), 3e-3, pytest.approx(9e-3))


def test_all_trained_methods_learn_from_the_same_rows_in_the_same_order(
    llama: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = make_protocol(llama, films(60), None, None, settings(), "examples", False)
    seen: dict[str, list[list[tuple[int, ...]]]] = {}
    alone = Trainer.gradient
    for name in ("prompt-tuning", "prefix-tuning", "lora", "full"):
        batches = seen.setdefault(name, [])

        def recorded(loop: Trainer, batch: list[Example], into: list[list[tuple[int, ...]]] = batches) -> float:
            into.append([example.ids for example in batch])
            return alone(loop, batch)

        monkeypatch.setattr(Trainer, "gradient", recorded)
        method = METHODS[name](protocol, 0, MethodCallback())
        try:
            method.fit()
        finally:
            method.close()
    assert len(seen["lora"]) == 30
    assert all(batches == seen["lora"] for batches in seen.values())


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_saved_method_answers_as_its_result_says(
    compared: tuple[Path, list[Result]], llama: FrozenModel, method: str
) -> None:
    folder, results = compared
    test = load_data(folder / "test-rows.jsonl")
    done = evaluate(llama, test, sp.load_prompt(folder / "tasks" / f"{method}-0"))
    (result,) = (r for r in results if r.method == method)
    assert done.metrics["loss"].value == pytest.approx(result.metrics["loss"].value, rel=1e-5)


@pytest.mark.parametrize("labels", [2, 12])
@pytest.mark.parametrize("name", METHODS)
def test_a_stored_method_answers_as_before_when_it_is_loaded(
    llama: FrozenModel, tmp_path: Path, name: str, labels: int
) -> None:
    rows = load_data([{"text": f"a film {n}", "label": f"of the year {n % labels}"} for n in range(30 * labels)])
    protocol = make_protocol(llama, rows, None, None, settings(eval_rows=24), "examples", False)
    method = METHODS[name](protocol, 0, MethodCallback())
    try:
        fitted = method.fit()
        matched = fitted.settings["prior_matching"]
        assert matched == any(member.label_bias for member in fitted.predictor.prompt.members)
        over_labels = labels > 10 and name == "prompt-tuning"
        assert fitted.settings.get("loss") in (None, "labels" if over_labels else "target")
        before = fitted.predictor.score(protocol.test, 64).scores
        assert isinstance(before, LabelScores)
        method.store(tmp_path / "task")
        for _ in range(2):
            predictor = method.load(tmp_path / "task")
            assert isinstance(predictor, Predictor)
            after = predictor.score(protocol.test, 64).scores
            assert isinstance(after, LabelScores)
            np.testing.assert_allclose(after.losses, before.losses, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(after.log_likelihoods, before.log_likelihoods, rtol=1e-4, atol=1e-4)
    finally:
        method.close()
    assert not any(p.requires_grad for p in llama.hf_model.parameters())


def test_what_is_done_is_not_run_again_and_what_is_not_is(
    llama: FrozenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, methods = films(60), ("zero-shot", "prompt-tuning", "lora")
    run, ran, stops = comparing.run_method, [], [("lora", 1)]

    def counted(name: str, seed: int, *rest: Any) -> Result:
        if (name, seed) in stops:
            stops.remove((name, seed))
            raise KeyboardInterrupt
        ran.append((name, seed))
        return run(name, seed, *rest)

    monkeypatch.setattr(comparing, "run_method", counted)
    common: dict[str, Any] = {"methods": methods, "seeds": 2, "config": settings(), "equal": "examples"}
    before = weights_hash(llama.hf_model)
    with pytest.raises(KeyboardInterrupt):
        compare(llama, rows, out=tmp_path / "out", **common)
    assert ran == [("zero-shot", 0), ("prompt-tuning", 0), ("prompt-tuning", 1), ("lora", 0)]
    assert (tmp_path / "out" / "report.html").exists()  # of what there is
    assert weights_hash(llama.hf_model) == before
    done = compare(llama, rows, out=tmp_path / "out", **common)
    assert ran[4:] == [("lora", 1)]
    assert [(r.method, r.seed) for r in done.results] == [*ran[:4], ("lora", 1)]
    assert done.results[1].settings["seed"] == 0
    assert compare(llama, rows, out=tmp_path / "out", **common).results == done.results
    assert len(ran) == 5


def test_a_folder_holds_one_comparison(llama: FrozenModel, tmp_path: Path) -> None:
    common: dict[str, Any] = {"methods": ["zero-shot"], "out": tmp_path / "out"}
    compare(llama, films(60), config=settings(), **common)
    for other, rows, more in (
        ("rows", films(62), {}),
        ("settings", films(60), {"template": "{{ text }} is"}),
        ("settings", films(60), {"max_minutes": 2}),
    ):
        with pytest.raises(InputError, match=f"holds a comparison with other {other}"):
            compare(llama, rows, config=settings(**more), **common)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and holds no comparison"):
        compare(llama, films(60), methods=["zero-shot"], out=tmp_path / "else")
    (tmp_path / "out" / "results" / "zero-shot-0.json").write_text("{")
    with pytest.raises(InputError, match="remove it, and the method is run again"):
        compare(llama, films(60), config=settings(), **common)


def test_what_cannot_be_compared_is_said_at_once(llama: FrozenModel) -> None:
    with pytest.raises(SettingsError, match=r"no method 'loar'.*did you mean"):
        compare(llama, films(60), methods=["loar"])
    with pytest.raises(SettingsError, match="no methods to compare; there are zero-shot"):
        compare(llama, films(60), methods=[])
    with pytest.raises(DataError, match=r"its 12 rows are too few to split; give --test-data"):
        compare(llama, films(12))
    with pytest.raises(DataError, match=r"its 12 rows are too few to split; give --eval-data"):
        compare(llama, films(12), test_data=films(30)[20:])
    with pytest.raises(SettingsError, match="needs validation rows"):
        compare(llama, films(60), config=settings(eval_rows=0))
    with pytest.raises(InputError, match="is for text"):
        compare(llama, films(60), test_data=load_data([{"text": "a film"}]))


@pytest.mark.parametrize(("target", "metric"), [("{n}", "exact_match"), ("第{n}部电影很好", "chrf")])
def test_completions_are_ranked_by_what_can_tell_them_apart(
    llama: FrozenModel, tmp_path: Path, target: str, metric: str
) -> None:
    rows = load_data([{"input": f"parcel {n}", "target": target.format(n=n)} for n in range(60)])
    out = tmp_path / "out"
    done = compare(llama, rows, methods=["zero-shot"], out=out, config=settings(), equal="examples")
    (result,) = done.results
    assert result.ranked_by == metric
    assert result.primary == result.metrics[metric]
    assert compute_metric(metric, np.array(result.statistics).sum(axis=0)) == pytest.approx(result.primary.value)
    # A comparison of before, which was ranked by BLEU, goes on; what is there is judged as what comes.
    file = out / "results" / "zero-shot-0.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    del record["ranked_by"]
    file.write_text(json.dumps({**record, "statistics": [[1.0, 1.0] + [0.0] * 8] * len(result.statistics)}))
    again = compare(llama, rows, methods=["zero-shot", "few-shot"], out=out, config=settings(), equal="examples")
    assert [r.ranked_by for r in again.results] == [metric] * 2
    assert again.results[0].statistics == result.statistics
    assert again.results[0].metrics == result.metrics


@pytest.mark.parametrize("task", ["completion", "text"])
def test_other_tasks_are_compared_too(llama: FrozenModel, tmp_path: Path, task: str) -> None:
    if task == "completion":
        rows = load_data([{"input": f"parcel {n // 2}", "target": f"the parcel {n} came"} for n in range(60)])
    else:
        rows = load_data([{"text": f"the parcel {n} never came"} for n in range(60)])
    done = compare(llama, rows, methods=USUAL, out=tmp_path / "out", config=settings(), equal="examples")
    for result in done.results:
        sums = np.array(result.statistics).sum(axis=0)
        assert compute_metric(result.ranking, sums) == pytest.approx(result.primary.value, rel=1e-6)
    assert len({len(r.statistics) for r in done.results}) == 1


def test_equal_time_is_shared_by_the_learning_rates_and_the_steps(
    llama: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "loss_after", lambda _loop, _steps: 1.0)
    fitted, tried = fit_in_time(llama, 0.1, Throughput(step=0.02, evaluation=0.0))
    assert tried == [30] * 3
    assert 225 <= fitted.settings["max_steps"] < 300  # of 300 that fit; making ready takes a little
    given, tried = fit_in_time(llama, 0.1, Throughput(step=0.02, evaluation=0.0), learning_rate=0.5)
    assert (given.settings["learning_rate"], tried) == (0.5, [])


def test_without_a_folder_there_is_no_report(llama: FrozenModel) -> None:
    callback = Notes()
    config = short(max_steps=None, eval_every=None, max_minutes=0.01)
    done = compare(llama, films(60), methods=["prompt-tuning", "few-shot"], config=config, callback=callback)
    assert callback.told == ["begin 2", "prompt-tuning", "prompt-tuning done", "few-shot", "few-shot done"]
    assert done.report is None


@pytest.mark.parametrize("name", ["prompt-tuning-ensemble", "soft-prompt-ensemble", "deep-prefix-ensemble"])
def test_ensembles_within_the_time_of_one_run_are_refused_with_one_message(
    llama: FrozenModel, fails: Command, reviews: Path, name: str
) -> None:
    with pytest.raises(SettingsError, match=rf"method {name} was taken out.*tune --ensemble N"):
        compare(llama, films(60), methods=["zero-shot", name])
    done = fails("compare", reviews, "--model", "no-such-model", "--out", "out", "--methods", name)
    assert "softprompt tune --ensemble N" in " ".join(done.err.split())
    assert "is called" not in done.err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--methods", "soft_prompt", "no method 'soft_prompt'"), ("--test-data", "nope.csv", "nope.csv")],
)
def test_what_is_mistyped_is_said_before_the_model_is_loaded(
    fails: Command, reviews: Path, option: str, value: str, message: str
) -> None:
    done = fails("compare", reviews, "--model", "no-such-model", "--out", "out", option, value)
    assert message in done.err
    assert "no-such-model" not in done.err


def fit_in_time(
    model: FrozenModel, minutes: float, throughput: Throughput, learning_rate: float | None = None
) -> tuple[FitResult, list[int]]:
    """Fit prompt tuning in some minutes; return also the steps of each learning rate that is tried."""

    class Tried(MethodCallback):
        def candidate(self, settings: dict[str, Any], step: int, loss: float) -> None:
            steps.append(step)

    steps: list[int] = []
    config = short(max_steps=None, eval_every=None, learning_rate=learning_rate, max_minutes=minutes)
    protocol = make_protocol(model, films(60), None, None, config, "time", True)
    protocol = replace(protocol, measure_throughput=lambda *_: throughput)
    return METHODS["prompt-tuning"](protocol, 0, Tried()).fit(), steps


class Notes(ComparisonCallback):
    def __init__(self) -> None:
        self.told: list[str] = []

    def begin(self, protocol: Any, done: Any, todo: Any) -> None:
        self.told.append(f"begin {len(todo)}")

    def method(self, name: str, seed: int) -> MethodCallback:
        self.told.append(name)
        return MethodCallback()

    def result(self, result: Result) -> None:
        self.told.append(f"{result.method} done")

    def failed(self, name: str, seed: int, reason: str) -> None:
        self.told.append(f"{name} failed")


def test_measured_memory_is_the_peak_above_the_start() -> None:
    before = torch.ones(20_000_000)  # 80 MB that were there before
    with measure(torch.device("cpu")) as small:
        torch.ones(1000).sum()
    with measure(torch.device("cpu")) as large:
        for _ in range(3):  # one after the other: the peak is one of them
            torch.ones(50_000_000).sum()
    assert before.sum() > 0
    assert small.peak_bytes < 20e6
    assert 190e6 < large.peak_bytes < 330e6


@pytest.mark.parametrize(("evaluation", "searched"), [(0.0, True), (1.0, True), (5.5, False)])
def test_time_for_scoring_the_validation_rows_is_part_of_a_learning_rate_s_share(
    llama: FrozenModel, evaluation: float, searched: bool
) -> None:
    """Four minutes: 24 seconds for each of three rates, of which 5.5 for scoring leave too few steps to tell."""
    fitted, tried = fit_in_time(llama, 4, Throughput(step=1.0, evaluation=evaluation))
    assert fitted.settings["search"] == searched
    assert tried == ([int(24 - evaluation)] * 3 if searched else [])


def test_a_label_that_no_row_is_left_of_can_still_be_the_answer(llama: FrozenModel) -> None:
    rare = [{"text": f"an odd film {n}", "label": "odd"} for n in range(2)]
    rows = load_data([*films(100), *rare])
    test = load_data(
        [*({**row, "text": f"again {row['text']}"} for row in films(20)), {"text": "the odd one", "label": "odd"}]
    )
    done = compare(
        llama,
        rows,
        methods=["zero-shot", "prompt-tuning"],
        test_data=test,
        config=settings(train_rows=12),
        equal="examples",
    )
    assert [r.rows["train"] for r in done.results] == [12, 12]
    assert all(r.confusion is not None and r.confusion.labels == ["bad", "good", "odd"] for r in done.results)


def test_a_folder_s_report_has_all_of_its_results(llama: FrozenModel, tmp_path: Path) -> None:
    common: dict[str, Any] = {"config": settings(), "equal": "examples", "out": tmp_path / "out"}
    compare(llama, films(60), methods=["zero-shot"], **common)
    done = compare(llama, films(60), methods=["prompt-tuning"], **common)
    assert [r.method for r in done.results] == ["prompt-tuning", "zero-shot"]
    assert "Zero-shot" in (tmp_path / "out" / "report.html").read_text()


def test_the_same_rows_and_model_by_other_names_go_on(llama: FrozenModel, tmp_path: Path) -> None:
    common: dict[str, Any] = {"config": settings(), "equal": "examples", "out": tmp_path / "out"}
    compare(llama, films(60), methods=["zero-shot"], **common)
    renamed = FrozenModel(llama.hf_model, llama.tokenizer, llama.backend, "/elsewhere/model")
    done = compare(renamed, replace(films(60), name="renamed.csv"), methods=["zero-shot", "prompt-tuning"], **common)
    assert done.report is not None


def test_another_budget_is_another_comparison_where_it_counts_examples(llama: FrozenModel, tmp_path: Path) -> None:
    common: dict[str, Any] = {"methods": ["zero-shot"], "out": tmp_path / "out", "equal": "examples"}
    compare(llama, films(60), config=settings(max_minutes=1), **common)
    with pytest.raises(InputError, match="with other settings"):
        compare(llama, films(60), config=settings(max_minutes=1, budget="quick"), **common)


def test_a_folder_of_an_older_version_goes_on(llama: FrozenModel, tmp_path: Path) -> None:
    common: dict[str, Any] = {"methods": ["zero-shot"], "out": tmp_path / "out"}
    before = compare(llama, films(60), config=settings(), **common)
    file = tmp_path / "out" / "protocol.json"
    record = json.loads(file.read_text())
    del record["precision"]
    record["settings"] |= {"method": "soft-prompt", "parameterization": "direct"}
    file.write_text(json.dumps(record))
    assert compare(llama, films(60), config=settings(), **common).results == before.results


def test_a_mistake_in_the_first_command_leaves_nothing_behind(
    llama: FrozenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {"methods": ["zero-shot"], "out": tmp_path / "out"}
    with pytest.raises(SettingsError, match="'txet'"):
        compare(llama, films(60), config=settings(template="{{ txet }}"), **common)
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(comparing, "run_method", interrupted := Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compare(llama, films(60), config=settings(template="{{ text }} is"), **common)
    assert interrupted.called
    done = compare(llama, films(62), config=settings(), **common)  # nothing was compared so far
    assert done.results[0].rows["test"] == len(load_data(tmp_path / "out" / "test-rows.jsonl"))


def test_a_comparison_whose_results_were_removed_begins_anew(llama: FrozenModel, tmp_path: Path) -> None:
    common: dict[str, Any] = {"methods": ["zero-shot"], "out": tmp_path / "out"}
    compare(llama, films(60), config=settings(), **common)
    (tmp_path / "out" / "results" / "zero-shot-0.json").unlink()
    assert compare(llama, films(62), config=settings(), **common).report is not None


def test_prefixes_that_the_model_cannot_have_are_refused_at_once(
    llama: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlike = property(Mock(side_effect=ModelError("this model's layers are not alike")))
    monkeypatch.setattr(FrozenModel, "prefix_shape", unlike)
    with pytest.raises(SettingsError, match="not alike; leave prefix-tuning out of --methods"):
        compare(llama, films(60), methods=["zero-shot", "prefix-tuning"])


def test_in_the_same_time_no_more_steps_are_taken_than_were_asked_for(llama: FrozenModel) -> None:
    config = settings().model_copy(update={"max_steps": 3, "max_minutes": 0.1})
    done = compare(llama, films(60), methods=["prompt-tuning"], config=config, search=False)
    assert done.results[0].settings["max_steps"] == 3


def test_a_search_tells_what_it_finds(llama: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Told(MethodCallback):
        def __init__(self) -> None:
            self.best: list[tuple[int, float, float]] = []
            self.rates: list[float] = []

        def demonstrations(self, number: int, values: dict[str, float], spent: float) -> None:
            self.best.append((number, values["accuracy"], spent))

        def candidate(self, settings: dict[str, Any], step: int, loss: float) -> None:
            self.rates.append(settings["learning_rate"])

    monkeypatch.setattr(learning, "MIN_SEARCH_STEPS", 3)
    protocol, told = make_protocol(llama, films(60), None, None, settings(), "examples", True), Told()
    fitted = METHODS["few-shot"](protocol, 0, told).fit()
    shown, accuracies, spent = zip(*told.best, strict=True)
    assert (shown[0], shown[-1]) == (0, fitted.settings["demonstrations"])
    assert list(accuracies) == sorted(accuracies)
    assert list(spent) == sorted(spent)
    METHODS["prompt-tuning"](protocol, 0, told).fit()
    assert told.rates == pytest.approx([0.03 * factor for factor in FACTORS])


def test_a_search_takes_no_rows_that_were_not_counted_beforehand(
    llama: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beginning that all rows share is run once; a row that begins otherwise must not lose its first tokens."""
    rows = [{"text": f"please classify this film number {n}", "label": ("bad", "good")[n % 2]} for n in range(280)]
    rows += [{"text": f"hi {n}", "label": ("bad", "good")[n % 2]} for n in range(20)]
    # So few rows are counted before it is known how many steps fit.
    monkeypatch.setitem(CLASSIFICATION_STEPS, "normal", 2)
    config = short(max_steps=None, eval_every=None, learning_rate=None, batch_size=2, max_minutes=0.1, eval_rows=20)
    shared = set[bool]()

    def recorded(loop: Trainer, steps: int) -> float:
        prepared = loop.prepared
        indices = {
            i for step in range(steps) for i in batch_indices(len(prepared.examples), 2, step, prepared.config.seed)
        }
        shared.update(
            prepared.examples[i].ids[: len(prepared.shared_text_ids)] == prepared.shared_text_ids for i in indices
        )
        return 1.0

    monkeypatch.setattr(Trainer, "loss_after", recorded)
    protocol = make_protocol(llama, load_data(rows), None, None, config, "time", True)
    protocol = replace(protocol, measure_throughput=lambda *_: Throughput(step=0.02, evaluation=0.0))
    METHODS["prompt-tuning"](protocol, 0, MethodCallback()).fit()
    assert shared == {True}


@pytest.mark.parametrize("method", METHODS)
def test_texts_of_one_token_are_left_out(llama: FrozenModel, method: str) -> None:
    """No method but a soft prompt has anything before them; "a" is such a token."""
    texts = [{"text": "a" if n % 2 else f"the parcel {n} never came"} for n in range(80)]
    common: dict[str, Any] = {"methods": [method], "equal": "examples", "search": False}
    common["config"] = settings().model_copy(update={"max_steps": 3})
    test = [{"text": "a"}, {"text": "the letter came"}]
    with pytest.warns(UserWarning, match="texts have a single token and are left out"):
        done = compare(llama, load_data(texts), test_data=load_data(test), **common)
    rows = done.results[0].rows
    assert (rows["train"] + rows["validation"], done.rows) == (40, test[1:])
    with pytest.raises(DataError, match="no text has a second token"):
        compare(llama, load_data(texts[::2]), test_data=load_data(test[:1]), **common)


def test_a_comparison_that_was_stopped_before_it_began_begins(llama: FrozenModel, tmp_path: Path) -> None:
    (tmp_path / "test-rows.jsonl").write_text("")
    (tmp_path / ".protocol.json.tmp").write_text("{")
    compare(llama, films(60), methods=["zero-shot"], config=settings(), out=tmp_path)


def test_a_full_disk_is_called_that(llama: FrozenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(METHODS["zero-shot"], "store", full)
    with pytest.raises(StorageError, match="zero-shot-0: No space left on device; free some space"):
        compare(llama, films(60), methods=["zero-shot"], config=settings(), out=tmp_path / "out")


def test_a_quantized_model_is_refused_before_anything_is_run(
    llama: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.hf_model, "is_quantized", True, raising=False)
    callback = Notes()
    with pytest.raises(SettingsError, match="not quantized"):
        compare(llama, films(60), methods=["zero-shot", "full"], config=settings(), callback=callback)
    assert callback.told == []


def test_a_changed_weight_changes_the_hash(llama: FrozenModel) -> None:
    before = weights_hash(llama.hf_model)
    weight = next(llama.hf_model.parameters())
    original = weight.data.clone()
    weight.data[0, 0] += 1e-6
    assert weights_hash(llama.hf_model) != before
    weight.data.copy_(original)
    assert weights_hash(llama.hf_model) == before


def test_the_command_compares_and_goes_on(command: Command, llama_folder: Path, reviews: Path) -> None:
    asked = ["compare", reviews, "--model", llama_folder, "--methods", "zero-shot,prompt-tuning", "--out", "out"]
    asked += ["--equal", "examples", "--set", "max_steps=4", "--set", "num_virtual_tokens=5"]
    shown = command(*asked)
    assert shown.code == 0
    assert "prompt-tuning" in shown.out
    assert "report: out/report.html" in shown.out
    again = command(*asked, "--json")
    assert "2 results are there already" in again.err
    assert [r["method"] for r in again.record["results"]] == ["zero-shot", "prompt-tuning"]
    assert again.record["metric"] == "accuracy"
    assert command(*asked[:5], "nonsense", *asked[6:]).code == 2


def test_a_method_that_fails_does_not_stop_the_others(
    llama: FrozenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from softprompt.training.prompt_trainer import PromptTrainer

    def diverged(*_: Any) -> float:
        return float("nan")

    monkeypatch.setattr(PromptTrainer, "gradient", diverged)
    common: dict[str, Any] = {"config": settings(), "equal": "examples", "out": tmp_path / "out"}
    callback = Notes()
    with pytest.raises(RunError, match=r"prompt-tuning, seed 0: the loss is not finite .* the report has the others"):
        compare(llama, films(60), methods=["prompt-tuning", "zero-shot", "lora"], callback=callback, **common)
    assert callback.told[1:5] == ["prompt-tuning", "prompt-tuning failed", "zero-shot", "zero-shot done"]
    assert {p.name for p in (tmp_path / "out" / "results").iterdir()} == {"zero-shot-0.json", "lora-0.json"}
    assert (tmp_path / "out" / "report.html").exists()
    monkeypatch.undo()
    done = compare(llama, films(60), methods=["prompt-tuning", "zero-shot", "lora"], **common)
    assert len(done.results) == 3


def test_a_method_s_copy_of_the_model_is_gone_when_the_next_begins(
    llama: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies, left, right = list[weakref.ref[Any]](), list[int](), weights.unfreeze_copy

    def recorded(model: FrozenModel) -> FrozenModel:
        left.append(sum(copy() is not None for copy in copies))
        made = right(model)
        copies.append(weakref.ref(made.hf_model))
        return made

    monkeypatch.setattr(weights, "unfreeze_copy", recorded)
    gc.disable()  # it would come by sooner or later: a large model does not fit until then
    try:
        compare(llama, films(60), methods=["full"], seeds=3, config=settings(), equal="examples")
    finally:
        gc.enable()
    assert left == [0, 0, 0]


def test_a_result_that_is_not_finite_comes_back(compared: tuple[Path, list[Result]], tmp_path: Path) -> None:
    result = compared[1][0].model_copy(deep=True)
    result.costs.perplexity_after = float("inf")
    assert read_result(result.save(tmp_path)) == result


def test_rows_and_settings_that_would_flatter_or_break_a_method_are_refused(llama: FrozenModel) -> None:
    with pytest.warns(UserWarning, match="5 of 5 test rows have the input of a training or validation row"):
        compare(llama, films(60), methods=["zero-shot"], config=settings(), test_data=films(5))
    other = load_data([{"text": "a film", "label": "odd"}, {"text": "a good film", "label": "good"}])
    with pytest.raises(InputError, match="has the label 'odd', which no training row has"):
        compare(llama, films(60), test_data=other)
    with pytest.raises(SettingsError, match="may have seen the test rows"):
        compare(llama, films(60), config=settings(init="prompt:film"))
    with pytest.raises(SettingsError, match="one kind at a time"):
        compare(llama, films(60), config=short(learning_rate=0.1))
