"""Training: repeatable bit by bit, resumable after a kill, and the base model stays as it was."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from softprompt.cli.main import main
from softprompt.config import TuneConfig
from softprompt.data.rows import load_data
from softprompt.distributed.collective import ALONE
from softprompt.errors import InputError, PromptError, RunError, SettingsError
from softprompt.evaluation.evaluate import evaluate
from softprompt.model.backends.verify import freeze
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.initialization import labels_prompt, random_prompt, text_prompt, vocabulary_prompt
from softprompt.prompt.loading import load_prompt
from softprompt.training import prompt_trainer
from softprompt.training.schedule import learning_rate
from softprompt.training.tune import tune
from tiny_models import tiny_model
from tiny_runs import SHORT_SETTINGS, log_without_times, prompt_bytes, short, weights_hash
from tiny_tokenizers import tiny_tokenizer


def test_a_prompt_learns_what_the_rows_say(llama: FrozenModel, reviews: Path) -> None:
    rows = load_data(reviews)
    config = short(max_steps=60, batch_size=8, learning_rate=0.05, eval_rows=0)
    before = evaluate(llama, rows)
    result = tune(llama, rows, config)
    after = evaluate(llama, rows, result.prompt)
    assert after.metrics["loss"].value < before.metrics["loss"].value - 0.5
    assert after.without_prompt == before.metrics


@pytest.mark.parametrize("method", ["packed", "padded"])
def test_the_base_model_is_unchanged_after_a_run(method: str, reviews: Path) -> None:
    model = freeze(tiny_model("llama" if method == "packed" else "gptj"), tiny_tokenizer())
    assert model.backend.name == method
    before = weights_hash(model)
    prompt = tune(model, load_data(reviews), short()).prompt
    evaluate(model, load_data(reviews), prompt)
    assert weights_hash(model) == before
    assert not torch.are_deterministic_algorithms_enabled()


def test_two_runs_with_one_seed_are_the_same_and_another_seed_is_not(
    llama: FrozenModel, reviews: Path, tmp_path: Path
) -> None:
    rows = load_data(reviews)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tune(llama, rows, short(seed=seed), out=tmp_path / name)
    assert prompt_bytes(tmp_path / "a") == prompt_bytes(tmp_path / "b")
    assert log_without_times(tmp_path / "a") == log_without_times(tmp_path / "b")
    weights = "adapter_model.safetensors"
    assert prompt_bytes(tmp_path / "a")[weights] != prompt_bytes(tmp_path / "c")[weights]


def test_a_killed_run_ends_as_one_that_was_not(llama_folder: Path, reviews: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from softprompt.cli.main import main; main()"]
    command += ["tune", str(reviews), "--model", str(llama_folder), "--json"]
    for name, value in {**SHORT_SETTINGS, "max_steps": 60, "eval_every": 10, "save_every": 3}.items():
        command += ["--set", f"{name}={value}"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}

    whole = tmp_path / "whole"
    subprocess.run([*command, "--out", str(whole)], check=True, capture_output=True, env=environment)

    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [*command, "--out", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:  # the log says how far it is: no clock
        if line.startswith("step 30/60"):
            process.send_signal(signal.SIGKILL)
            break
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "prompt").exists()
    assert list((killed / "state").glob("step-*"))

    subprocess.run([*command, "--out", str(killed), "--resume"], check=True, capture_output=True, env=environment)
    assert prompt_bytes(killed) == prompt_bytes(whole)
    assert log_without_times(killed) == log_without_times(whole)
    assert (killed / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()


@pytest.mark.parametrize("until", [1, 2, 3, 5])
def test_resuming_after_any_step_gives_the_same_prompt(
    llama: FrozenModel, reviews: Path, tmp_path: Path, until: int
) -> None:
    class StopError(Exception):
        pass

    from softprompt.training.callbacks import Callback

    class Stopping(Callback):
        def step(self, step: int, loss: float) -> None:
            if step == until:
                raise StopError

    rows = load_data(reviews)
    tune(llama, rows, short(), out=tmp_path / "whole")
    with pytest.raises(StopError):
        tune(llama, rows, short(), out=tmp_path / "cut", callback=Stopping())
    result = tune(llama, rows, short(), out=tmp_path / "cut", resume=True)
    assert result.steps == SHORT_SETTINGS["max_steps"]
    assert prompt_bytes(tmp_path / "cut") == prompt_bytes(tmp_path / "whole")
    assert log_without_times(tmp_path / "cut") == log_without_times(tmp_path / "whole")


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(llama: FrozenModel, reviews: Path, tmp_path: Path) -> None:
    rows = load_data(reviews)
    tune(llama, rows, short(), out=tmp_path / "run")
    before = prompt_bytes(tmp_path / "run"), log_without_times(tmp_path / "run")
    tune(llama, rows, None, out=tmp_path / "run", resume=True)
    assert (prompt_bytes(tmp_path / "run"), log_without_times(tmp_path / "run")) == before


def test_a_run_is_not_resumed_with_something_else(llama: FrozenModel, reviews: Path, tmp_path: Path) -> None:
    rows = load_data(reviews)
    tune(llama, rows, short(), out=tmp_path / "run")
    with pytest.raises(SettingsError, match=r"learning_rate = 0\.03, not 0\.1"):
        tune(llama, rows, TuneConfig(learning_rate=0.1), out=tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="training data"):
        tune(llama, rows[:30], short(), out=tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="holds another run"):
        tune(llama, rows, short(), out=tmp_path / "run")


def test_resuming_takes_the_saved_precision_again(llama_folder: Path, reviews: Path, tmp_path: Path) -> None:
    command = ["tune", str(reviews), "--model", str(llama_folder), "--out", str(tmp_path / "run"), "--json"]
    command += ["--set", "max_steps=2", "--set", "eval_rows=0"]
    for more in (["--set", "dtype=bfloat16"], ["--resume"]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, *more])
        assert stopped.value.code == 0


def test_epochs_or_steps_whichever_is_sooner(llama: FrozenModel, reviews: Path) -> None:
    rows = load_data(reviews)
    assert tune(llama, rows, short(max_steps=None, epochs=0.5, eval_rows=0)).steps == 5  # 40 rows, 4 a step
    assert tune(llama, rows, short(max_steps=3, epochs=0.5, eval_rows=0)).steps == 3


def test_tune_returns_the_best_prompt_not_the_last(llama: FrozenModel, reviews: Path, tmp_path: Path) -> None:
    # A rate this high ruins the prompt after a while.
    config = short(max_steps=30, learning_rate=3.0, schedule="constant", eval_every=1, warmup_ratio=0)
    result = tune(llama, load_data(reviews), config, out=tmp_path / "run")
    logged = [r for r in log_without_times(tmp_path / "run") if "validation" in r]
    best = min(logged, key=lambda r: r["validation"]["loss"])  # type: ignore[index]
    assert result.metrics == best["validation"]
    assert result.best_step == best["step"]
    assert load_prompt(tmp_path / "run" / "prompt").record.metrics == result.metrics
    again = evaluate(
        llama, load_data([json.loads(x) for x in (tmp_path / "run/predictions.jsonl").open()]), result.prompt
    )
    assert again.metrics["accuracy"].value == pytest.approx(result.metrics["accuracy"])


def test_tune_without_validation_rows_returns_the_last_prompt(llama: FrozenModel, reviews: Path) -> None:
    result = tune(llama, load_data(reviews), short(eval_rows=0))
    assert result.best_step == result.steps == SHORT_SETTINGS["max_steps"]
    assert result.metrics == {}


def test_how_a_step_is_cut_changes_nothing_but_rounding(llama: FrozenModel, reviews: Path) -> None:
    rows = load_data(reviews)
    one = tune(llama, rows, short(micro_batch_tokens=10_000)).prompt.weights
    many = tune(llama, rows, short(micro_batch_tokens=1)).prompt.weights
    assert torch.allclose(one, many, atol=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(
    llama: FrozenModel, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, 1.0, 1.0, math.nan])
    monkeypatch.setattr(
        prompt_trainer, "prompt_gradient", lambda model, prompt, *_: (next(losses), torch.ones_like(prompt))
    )
    with pytest.raises(RunError, match="not finite at step 4"):
        tune(llama, load_data(reviews), short(save_every=1), out=tmp_path / "run")
    states = sorted(folder.name for folder in (tmp_path / "run" / "state").iterdir())
    assert states == ["step-2", "step-3"]


def test_the_metrics_file_has_a_line_a_step_and_a_line_an_evaluation(
    llama: FrozenModel, reviews: Path, tmp_path: Path
) -> None:
    tune(llama, load_data(reviews), short(), out=tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    assert [set(r) for r in steps] == [{"step", "loss", "learning_rate", "tokens", "step_seconds"}] * 6
    assert [r["step"] for r in records if "validation" in r] == [0, 2, 4, 6]
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "predictions.jsonl",
        "environment.json",
        "prompt",
        "state",
    }


def test_the_learning_rate_rises_and_falls() -> None:
    config = TuneConfig(learning_rate=1.0, max_steps=110, warmup_ratio=10 / 110)
    rates = [learning_rate(config, step) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 100)) for i in range(100)])
    linear = config.model_copy(update={"schedule": "linear"})
    assert learning_rate(linear, 60) == pytest.approx(0.5)


def test_initializations_start_where_real_tokens_are(llama: FrozenModel) -> None:
    table = llama.hf_model.get_input_embeddings().weight
    tokenizer = llama.tokenizer
    ids = tokenizer("a fine film")["input_ids"]
    assert torch.equal(text_prompt(llama, None, "a fine film"), table[(ids * 20)[:20]])
    assert torch.equal(text_prompt(llama, 2, "a fine film"), table[ids[:2]])
    longer = [*ids, *ids][: len(ids) + 2]
    assert torch.equal(text_prompt(llama, len(ids) + 2, "a fine film"), table[longer])
    means = torch.stack([table[tokenizer(f" {label}")["input_ids"]].mean(dim=0) for label in ("good", "delivery")])
    assert torch.allclose(labels_prompt(llama, 2, ["good", "delivery"]), means)
    assert torch.allclose(labels_prompt(llama, None, ["good", "delivery"]), means.repeat(10, 1))
    assert torch.equal(vocabulary_prompt(llama, 2, [[7, 7, 7, 5, 9, 5]]), table[[7, 5]])
    weights = random_prompt(llama, 500, seed=1)
    assert float(weights.std()) == pytest.approx(float(table.std()), rel=0.1)
    assert torch.equal(weights, random_prompt(llama, 500, seed=1))


def test_a_damaged_state_is_passed_over_for_the_one_before(llama: FrozenModel, reviews: Path, tmp_path: Path) -> None:
    rows = load_data(reviews)
    tune(llama, rows, short(), out=tmp_path / "whole")
    tune(llama, rows, short(), out=tmp_path / "cut")
    newest = tmp_path / "cut" / "state" / "step-6" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    tune(llama, rows, short(), out=tmp_path / "cut", resume=True)
    assert prompt_bytes(tmp_path / "cut") == prompt_bytes(tmp_path / "whole")


def test_saving_a_prompt_does_not_replace_what_is_not_one(llama: FrozenModel, reviews: Path, tmp_path: Path) -> None:
    prompt = tune(llama, load_data(reviews), short(max_steps=1, eval_rows=0)).prompt
    prompt.save(tmp_path / "prompt")
    prompt.save(tmp_path / "prompt")
    (tmp_path / "prompt" / "notes.txt").write_text("mine")
    with pytest.raises(PromptError, match="is not a prompt"):
        prompt.save(tmp_path / "prompt")
    assert (tmp_path / "prompt" / "notes.txt").read_text() == "mine"


def test_train_rows_are_sampled_from_all_labels(llama: FrozenModel, reviews: Path) -> None:
    rows = load_data(reviews)
    by_label = rows.pick(sorted(range(len(rows)), key=lambda i: rows[i]["label"]))
    result = tune(llama, by_label, short(max_steps=1, train_rows=6, eval_rows=0))
    assert result.prompt.record.training["train_rows"] == 6


@pytest.mark.parametrize("setting", [{"dtype": "bfloat16"}, {"device": "cuda"}])
def test_settings_that_the_model_does_not_have_are_refused(
    llama: FrozenModel, reviews: Path, setting: dict[str, str]
) -> None:
    with pytest.raises(SettingsError, match="the model is loaded on cpu in float32"):
        tune(llama, load_data(reviews), short(**setting))


def test_determinism_is_left_as_it_was(llama: FrozenModel, reviews: Path) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        tune(llama, load_data(reviews), short(max_steps=1, eval_rows=0))
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_of_many_labels_only_the_right_one_is_run_until_the_best_prompt_is_found(
    llama: FrozenModel, tmp_path: Path
) -> None:
    """The tokens of all labels behind every validation row would cost more than the steps."""
    labels = [f"team_{name}" for name in "abcdefghijkl"]
    rows = load_data([{"text": f"a parcel for {n}", "label": labels[n % 12]} for n in range(120)])
    result = tune(llama, rows, short(), out=tmp_path / "run")
    logged = [set(r["validation"]) for r in log_without_times(tmp_path / "run") if "validation" in r]  # type: ignore[arg-type]
    assert logged == [{"loss", "perplexity"}] * 4
    assert set(result.metrics) == {"accuracy", "macro_f1", "loss"}
    predicted = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert all(len(record["probabilities"]) == 12 for record in predicted)
    right = sum(record["prediction"] == record["label"] for record in predicted) / len(predicted)
    assert result.metrics["accuracy"] == pytest.approx(right)
    losses = [r["validation"]["loss"] for r in log_without_times(tmp_path / "run") if "validation" in r]  # type: ignore[index]
    assert result.metrics["loss"] == pytest.approx(min(losses), rel=1e-5)
    assert result.prompt.record.verbalizers["team_a"] == "team a"


def test_a_process_that_is_told_so_is_alone(
    llama: FrozenModel, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of Ray have the environment of one of several processes that train together."""
    expected = tune(llama, load_data(reviews), short(), out=tmp_path / "plain")
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "RANK": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    found = tune(llama, load_data(reviews), short(), out=tmp_path / "worker", processes=ALONE)
    assert torch.equal(found.prompt.weights, expected.prompt.weights)
    assert (tmp_path / "worker" / "prompt").exists()
