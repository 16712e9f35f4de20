"""A thorough run's search, and runs whose steps are counted by time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.config import TuneConfig
from softprompt.data.rows import Rows, Task, load_data
from softprompt.errors import SettingsError
from softprompt.model.frozen import FrozenModel
from softprompt.training.callbacks import Callback
from softprompt.training.prepare import prepare_data
from softprompt.training.prompt_trainer import PromptTrainer
from softprompt.training.search import candidates, search
from softprompt.training.throughput import RunEstimate, Throughput, estimate_run, measure_throughput
from softprompt.training.tune import tune
from tiny_runs import prepared_run, prompt_bytes, short

OPEN = {"max_steps": 40, "eval_every": None, "num_virtual_tokens": None}


class Notes(Callback):
    def __init__(self) -> None:
        self.tried: list[tuple[dict[str, Any], int, float]] = []

    def candidate(self, settings: dict[str, Any], step: int, loss: float) -> None:
        self.tried.append((settings, step, loss))


def searched(model: FrozenModel, rows: Rows, config: TuneConfig, callback: Callback) -> dict[str, Any]:
    return search(prepare_data(model, rows, config), config, callback)


def test_only_what_was_left_open_is_searched() -> None:
    def tried(task: Task = "classification", **settings: object) -> tuple[set[str], set[float]]:
        found = candidates(short(**settings), task)
        starts, factors = {init for init, _ in found}, {factor for _, factor in found}
        assert len(found) == len(starts) * len(factors)
        return starts, factors

    assert tried() == ({"auto", "text"}, {1 / 3, 1, 3})
    assert tried(learning_rate=0.5) == ({"auto", "text"}, {1})
    assert tried(learning_rate=0.5, method="prefix-tuning") == ({"auto", "examples"}, {1})
    assert tried(init_text="a text") == ({"auto"}, {1 / 3, 1, 3})
    assert tried(learning_rate=0.5, init="random") == ({"random"}, {1})
    # Completions start from examples without being told to.
    assert tried("completion") == ({"auto", "text"}, {1 / 3, 1, 3})


def test_the_better_half_goes_on_and_the_best_of_it_is_chosen(llama: FrozenModel, reviews: Path) -> None:
    notes = Notes()
    chosen = searched(llama, load_data(reviews), short(**OPEN), notes)
    first, second = notes.tried[:6], notes.tried[6:]
    assert [step for _, step, _ in first] == [1] * 6
    assert [step for _, step, _ in second] == [3] * 3
    best = sorted(loss for _, _, loss in first)[:3]
    assert sorted(loss for settings, _, loss in first if settings in [s for s, _, _ in second]) == best
    assert chosen == min(second, key=lambda found: found[2])[0]


def test_starts_that_are_the_same_are_tried_once(llama: FrozenModel, reviews: Path) -> None:
    """Examples of both labels do not fit in 5 virtual tokens: what is usual is then the text."""
    notes = Notes()
    searched(llama, load_data(reviews), short(**{**OPEN, "num_virtual_tokens": 5}), notes)
    assert [step for _, step, _ in notes.tried] == [1] * 3 + [3] * 2


def test_a_thorough_run_is_the_run_with_the_chosen_settings(llama: FrozenModel, reviews: Path, tmp_path: Path) -> None:
    rows, notes = load_data(reviews), Notes()
    thorough = tune(llama, rows, short(**OPEN, budget="thorough"), out=tmp_path / "searched", callback=notes)
    assert len(notes.tried) == 9
    chosen = min(notes.tried[6:], key=lambda found: found[2])[0]
    tune(
        llama,
        rows,
        short(**OPEN, budget="thorough", **{**chosen, "init": thorough.settings.init}),
        out=tmp_path / "given",
    )
    assert thorough.settings.learning_rate == chosen["learning_rate"]
    assert prompt_bytes(tmp_path / "searched") == prompt_bytes(tmp_path / "given")


def test_a_thorough_run_that_goes_on_does_not_search_again(llama: FrozenModel, reviews: Path, tmp_path: Path) -> None:
    rows, settings, notes = load_data(reviews), short(max_steps=6, learning_rate=None, budget="thorough"), Notes()
    whole = tune(llama, rows, settings, out=tmp_path / "run")
    again = tune(llama, rows, settings, out=tmp_path / "run", resume=True, callback=notes)
    assert again.settings == whole.settings
    assert notes.tried == []


@pytest.mark.parametrize("settings", [{"learning_rate": 0.1, "init": "text"}, {"eval_rows": 0}])
def test_where_there_is_nothing_to_choose_nothing_is_run(
    settings: dict[str, Any], llama: FrozenModel, reviews: Path
) -> None:
    notes = Notes()
    assert searched(llama, load_data(reviews), short(**settings), notes) == {}
    assert notes.tried == []


def test_a_start_that_does_not_fit_is_none(llama: FrozenModel) -> None:
    """A text with 300 labels is longer than a prompt can be."""
    rows = load_data([{"text": f"film {n}", "label": f"a label of some words number {n // 2}"} for n in range(600)])
    notes = Notes()
    searched(llama, rows, short(max_steps=4, eval_rows=20, num_virtual_tokens=None), notes)
    assert {s["init"] for s, *_ in notes.tried} == {"auto"}


def test_without_validation_rows_to_choose_by_it_is_said(llama: FrozenModel, reviews: Path) -> None:
    with pytest.warns(UserWarning, match="no search: eval_rows=0"):
        tune(llama, load_data(reviews), short(budget="thorough", learning_rate=None, eval_rows=0))


def test_where_scoring_takes_all_the_time_nothing_is_searched(llama: FrozenModel, reviews: Path) -> None:
    settings = short(max_steps=None, eval_every=None, learning_rate=None, max_minutes=0.1, budget="thorough")
    throughput, notes = Throughput(step=0.75, evaluation=0.3), Notes()
    with pytest.warns(UserWarning, match="no search: scoring the validation rows takes"):
        assert tune(llama, load_data(reviews), settings, callback=notes, throughput=throughput).steps >= 1
    assert notes.tried == []


def test_a_search_goes_on_from_rung_to_rung(llama: FrozenModel, reviews: Path) -> None:
    """The second rung's loss is that of three steps in one go."""
    prepared = prepared_run(llama, load_data(reviews), short(**OPEN))
    losses = []
    for rungs in ((1, 3), (3,)):
        trainer = PromptTrainer(llama, prepared)
        losses.append([trainer.loss_after(steps) for steps in rungs][-1])
        assert trainer.state.step == 3
    assert losses[0] == losses[1]
    alone = PromptTrainer(llama, prepared)
    before = alone.evaluate().values()["loss"]
    for _ in range(3):
        alone.step()
    assert losses[0] == alone.evaluate().values()["loss"] != before


def test_a_rate_whose_loss_is_not_finite_is_never_the_best(
    llama: FrozenModel, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepared_run(llama, load_data(reviews), short(**OPEN))
    trainer = PromptTrainer(llama, prepared)
    monkeypatch.setattr(trainer, "gradient", lambda _batch: float("nan"))
    assert trainer.loss_after(3) == float("inf")


def test_search_takes_as_many_steps_as_fit_in_the_time() -> None:
    assert Throughput(step=0.5, evaluation=0).fit_to_budget(60) == {"max_steps": 120, "eval_every": 15}
    assert Throughput(step=0.5, evaluation=1).fit_to_budget(60) == {"max_steps": 102, "eval_every": 13}
    # Nine evaluations would take 90 of 60 seconds: there are as few as are needed to choose by.
    assert Throughput(step=0.5, evaluation=10).fit_to_budget(60) == {"max_steps": 60, "eval_every": 30}
    assert Throughput(step=100, evaluation=10).fit_to_budget(60) == {"max_steps": 1, "eval_every": 1}
    assert Throughput(step=0.5, evaluation=0).fit_to_budget(60, 16) == {"max_steps": 16, "eval_every": 2}
    # Where it is given how often to evaluate, that is included: 60 steps of 0.5 s, 30 evaluations and one before.
    assert Throughput(step=0.5, evaluation=1).fit_to_budget(61, eval_every=2) == {"max_steps": 60, "eval_every": 2}
    assert Throughput(step=0.5, evaluation=70).fit_to_budget(60, eval_every=2) == {"max_steps": 1, "eval_every": 2}
    # All of many labels are scored at the end; a quarter of the time is left for that at most.
    assert Throughput(step=0.5, evaluation=0, last=10).fit_to_budget(60) == {"max_steps": 100, "eval_every": 13}
    assert Throughput(step=0.5, evaluation=0, last=100).fit_to_budget(60) == {"max_steps": 90, "eval_every": 12}


def test_where_rows_to_choose_by_are_slow_to_score_fewer_are() -> None:
    """Three evaluations, of a quarter of the time: 15 of 60 seconds, where all rows would take 30."""
    assert Throughput(step=0.5, evaluation=10, rows=200).fit_to_budget(60) == {
        "max_steps": 90,
        "eval_every": 45,
        "eval_rows": 100,
    }
    assert Throughput(step=0.5, evaluation=5, rows=200).fit_to_budget(60) == {"max_steps": 90, "eval_every": 45}
    # No fewer than 32, which take 16 seconds each here.
    assert Throughput(step=0.5, evaluation=100, rows=200).fit_to_budget(60) == {
        "max_steps": 24,
        "eval_every": 12,
        "eval_rows": 32,
    }
    assert Throughput(step=0.5, evaluation=10, rows=32).fit_to_budget(60) == {"max_steps": 60, "eval_every": 30}
    # Labels of as many rows are scored at the end, and half of them take half the time.
    half = {"max_steps": 82, "eval_every": 41, "eval_rows": 100}
    assert Throughput(step=0.5, evaluation=10, last=8, rows=200).fit_to_budget(60) == half
    # Who says how often to evaluate has all rows scored.
    assert "eval_rows" not in Throughput(step=0.5, evaluation=10, rows=200).fit_to_budget(60, eval_every=2)


def test_a_short_run_scores_fewer_rows_and_goes_on_with_those(
    llama: FrozenModel, reviews: Path, tmp_path: Path
) -> None:
    throughput = Throughput(step=10, evaluation=100, rows=50)
    rows = load_data(reviews)
    asked = load_data([{"text": f"a film {n}", "label": rows.labels[n % 2]} for n in range(50)])
    given = short(max_steps=None, eval_every=None, eval_rows=50, max_minutes=2)
    result = tune(llama, rows, given, eval_data=asked, out=tmp_path / "run", throughput=throughput)
    assert result.settings.eval_rows == 32
    assert len((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()) == 32
    again = tune(llama, rows, given, eval_data=asked, out=tmp_path / "run", resume=True)
    assert again.settings == result.settings
    with pytest.raises(SettingsError, match="eval_rows"):
        fewer = short(max_steps=None, eval_every=None, eval_rows=31, max_minutes=2)
        tune(llama, rows, fewer, eval_data=asked, out=tmp_path / "run", resume=True)


def test_passes_are_counted_before_fewer_validation_rows_are_split_off(
    llama: FrozenModel,
) -> None:
    """Of 300 rows 60 are validation rows; a pass over the other 240 is 60 steps, not the 67 that 32 would leave."""
    rows = load_data([{"text": f"a film {n}", "label": ("bad", "good")[n % 2]} for n in range(300)])
    given = short(max_steps=None, epochs=1, eval_every=None, batch_size=4, eval_rows=60, max_minutes=100)
    settings = tune(llama, rows, given, throughput=Throughput(step=1, evaluation=1000, rows=60)).settings
    assert (settings.eval_rows, settings.max_steps, settings.eval_every) == (32, 60, 30)


def test_a_forecast_of_a_short_run_scores_fewer_rows(llama: FrozenModel, reviews: Path) -> None:
    rows = load_data(reviews)
    asked = load_data([{"text": f"a film {n}", "label": rows.labels[n % 2]} for n in range(500)])

    def run_estimate(minutes: float) -> RunEstimate:
        given = short(max_steps=None, eval_every=None, eval_rows=500, max_minutes=minutes)
        prepared = prepared_run(llama, rows, given, asked)
        return estimate_run(llama, prepared, given, Throughput(step=1, evaluation=500, rows=500))

    assert run_estimate(1000).eval_rows == 500
    found = run_estimate(1 / 60)  # one step, and an evaluation before and after it
    assert found.eval_rows == 32
    assert 60 * found.minutes == pytest.approx(1 + 2 * 32)


def test_a_forecast_counts_the_search(llama: FrozenModel, reviews: Path) -> None:
    rows, given = load_data(reviews), short(budget="thorough", learning_rate=None, max_steps=400, eval_every=None)

    def seconds(given: TuneConfig) -> float:
        prepared = prepared_run(llama, rows, given)
        return 60 * estimate_run(llama, prepared, given, Throughput(step=1, evaluation=0)).minutes

    # Two starts and three rates each run a fortieth of the steps, the better three three fortieths.
    assert seconds(given) == pytest.approx(400 * (1 + 6 * 0.025 + 3 * 0.05))
    assert seconds(given.model_copy(update={"budget": "normal"})) == pytest.approx(400)
    assert seconds(given.model_copy(update={"learning_rate": 0.1, "init": "text"})) == pytest.approx(400)


def test_a_forecast_measures_as_the_run_does(llama: FrozenModel) -> None:
    rows = load_data([{"text": f"a film {n}", "label": f"of the year {n % 12}"} for n in range(120)])
    prepared = prepared_run(llama, rows, short())
    throughput = measure_throughput(PromptTrainer(llama, prepared))
    assert throughput.rows == len(prepared.validation or ())
    assert throughput.last > 0  # all labels are scored at the end
    found = estimate_run(llama, prepared, short())
    assert found.step_seconds > 0
    assert 60 * found.minutes > found.steps * found.step_seconds


@pytest.mark.parametrize(("seconds", "steps"), [(1e6, 5), (0.0, 2)])
def test_a_short_run_times_fewer_steps(
    llama: FrozenModel, reviews: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, steps: int
) -> None:
    trainer = PromptTrainer(llama, prepared_run(llama, load_data(reviews), short()))
    before, batch_sizes, gradient = trainer.weights(), [], trainer.gradient
    monkeypatch.setattr(trainer, "gradient", lambda batch: batch_sizes.append(len(batch)) or gradient(batch))
    throughput = measure_throughput(trainer, seconds)
    assert len(batch_sizes) == steps
    assert throughput.step > 0
    assert throughput.evaluation > 0
    assert torch.equal(trainer.weights()["prompt"], before["prompt"])  # nothing is learned


def test_a_run_of_some_minutes_says_how_many_steps_it_took(llama: FrozenModel, reviews: Path, tmp_path: Path) -> None:
    rows, settings = load_data(reviews), short(max_steps=None, eval_every=None, max_minutes=0.1)
    result = tune(llama, rows, settings, out=tmp_path / "run", throughput=Throughput(step=0.75, evaluation=0))
    assert 1 <= result.steps <= 8
    assert result.settings.max_steps == result.steps
    assert tune(llama, rows, settings, out=tmp_path / "run", resume=True).steps == result.steps


def test_of_max_steps_and_minutes_the_fewer_steps_are_taken(llama: FrozenModel, reviews: Path, tmp_path: Path) -> None:
    throughput = Throughput(step=10, evaluation=0)
    rows = load_data(reviews)
    assert tune(llama, rows, short(max_steps=2, eval_every=None, max_minutes=1), throughput=throughput).steps == 2
    whole = short(max_steps=50, eval_every=None, max_minutes=1)
    result = tune(llama, rows, whole, out=tmp_path / "run", throughput=throughput)
    assert 1 < result.steps <= 6
    assert tune(llama, rows, whole, out=tmp_path / "run", resume=True).steps == result.steps
    with pytest.raises(SettingsError, match="max_steps"):
        tune(llama, rows, short(max_steps=1, eval_every=None, max_minutes=1), out=tmp_path / "run", resume=True)
    assert tune(llama, rows, short(max_steps=None, epochs=1 / 20, eval_every=None, max_minutes=1)).steps == 1
