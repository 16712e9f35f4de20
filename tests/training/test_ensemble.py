"""Ensembles: several prompts from several seeds, saved in one folder and run as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import softprompt as sp
from softprompt.config import GenerateConfig
from softprompt.data.rows import Rows, load_data
from softprompt.decoding import continue_ids
from softprompt.errors import InputError, PromptError, SettingsError
from softprompt.evaluation.evaluate import evaluate
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.base_model import base_model_record
from softprompt.prompt.ensemble import Ensemble, make_ensemble
from softprompt.prompt.loading import load_prompt
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.training.ensemble import tune_ensemble
from softprompt.training.throughput import Throughput
from softprompt.training.tune import TuneResult, tune
from tiny_models import as_prompt
from tiny_runs import SHORT, Command, prompt_bytes, short


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]


def near(model: FrozenModel, length: int, seed: int) -> Tensor:
    """A prompt that moves the model's choice of tokens."""
    return torch.randn(length, model.embedding_width, generator=torch.Generator().manual_seed(seed)) * 2


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_several_prompts_write_what_the_mean_of_their_probabilities_says(llama: FrozenModel, beams: int) -> None:
    """One beam is compared with a plain loop; of several, that they are not what one prompt alone would write."""
    prompts, inputs = [near(llama, 4, 1), near(llama, 7, 2), None], [[5, 6, 7, 8], [9, 10]]
    written = continue_ids(llama, as_prompt(*prompts), inputs, [6, 6], GenerateConfig(num_beams=beams))
    alone = [continue_ids(llama, as_prompt(p), inputs, [6, 6], GenerateConfig(num_beams=beams)) for p in prompts]
    assert written not in alone  # they do not agree, so that there is something to average

    def mean(ids: list[int]) -> Tensor:
        shares = [llama.backend.prefill(llama.prefix(p), [ids])[0][0].softmax(-1) for p in prompts]
        return torch.stack(shares).mean(0)

    for ids, text in zip(inputs, written, strict=True):
        expected = list(ids)
        for _ in range(6):
            token = int(mean(expected).argmax())
            if token == llama.tokenizer.eos_token_id:
                break
            expected.append(token)
        if beams == 1:
            assert text == llama.tokenizer.decode(expected)[len(llama.tokenizer.decode(ids)) :]


def test_members_learn_from_other_orders_and_are_chosen_by_the_same_rows(
    llama: FrozenModel, reviews: Path, tmp_path: Path
) -> None:
    rows = load_data(reviews)
    result = tune_ensemble(llama, rows, short(), members=3, out=tmp_path / "run")
    seeds = [run.settings.seed for run in result.runs]
    assert seeds == [0, 1, 2]
    assert len({run.prompt.weights.sum().item() for run in result.runs}) == 3
    members = [records(tmp_path / "run" / f"member-{n}") for n in (1, 2, 3)]
    assert [r["text"] for r in members[0]] == [r["text"] for r in members[1]] == [r["text"] for r in members[2]]
    shares = np.mean([[r["probabilities"]["positive"] for r in member] for member in members], axis=0)
    found = records(tmp_path / "run")
    assert [f["probabilities"]["positive"] for f in found] == pytest.approx(shares.tolist(), rel=1e-4)
    right = np.mean([f["prediction"] == f["label"] for f in found])
    assert result.metrics["accuracy"] == pytest.approx(right)


def test_members_of_an_ensemble_share_the_sampled_rows(
    llama: FrozenModel, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from softprompt.training import ensemble as module

    sampled: list[list[dict[str, str]]] = []

    def recorded(model: FrozenModel, rows: Rows, *given: Any, **named: Any) -> TuneResult:
        sampled.append(list(rows))
        return tune(model, rows, *given, **named)

    monkeypatch.setattr(module, "tune", recorded)
    tune_ensemble(llama, load_data(reviews), short(train_rows=9), members=2)
    assert len(sampled[0]) == 9
    assert sampled[0] == sampled[1]


def test_members_that_share_a_time_share_one_measurement(llama: FrozenModel, reviews: Path) -> None:
    given = short(max_steps=None, eval_every=None, max_minutes=50)
    throughput = Throughput(step=100, evaluation=0)
    runs = tune_ensemble(llama, load_data(reviews), given, members=3, throughput=throughput).runs
    assert [run.steps for run in runs] == [9] * 3  # of ten; making ready takes a little
    assert all(run.settings.max_minutes == pytest.approx(50 / 3, rel=0.1) for run in runs)


def test_a_text_has_to_fit_behind_the_longest_member(llama: FrozenModel) -> None:
    record = Record(base_model=base_model_record(llama), task="text", max_length=40)
    prompts = [SoftPrompt(near(llama, 4, n), record.model_copy(update={"max_length": 40 - n})) for n in range(3)]
    assert make_ensemble(prompts, {}).record.max_length == 38


def test_an_ensemble_comes_back_as_it_was_and_evaluates_as_the_mean(
    llama: FrozenModel, reviews: Path, tmp_path: Path
) -> None:
    rows = load_data(reviews)
    result = tune_ensemble(llama, rows, short(method="prefix-tuning"), members=2, out=tmp_path / "run")
    again = load_prompt(tmp_path / "run" / "prompt")
    assert isinstance(again, Ensemble)
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(again.members, result.prompt.members, strict=True))
    assert again.record.metrics == result.metrics
    done = evaluate(llama, rows, again)
    alone = [evaluate(llama, rows, one) for one in again.members]
    for record, *each in zip(done.predictions, *(a.predictions for a in alone), strict=True):
        mean = np.mean([one["probabilities"]["positive"] for one in each])
        assert record["probabilities"]["positive"] == pytest.approx(mean, rel=1e-4)
    assert sp.generate(llama, ["a fine film"], again) != [""]


def test_an_ensemble_that_was_stopped_goes_on(llama: FrozenModel, reviews: Path, tmp_path: Path) -> None:
    rows = load_data(reviews)
    tune_ensemble(llama, rows, short(), members=2, out=tmp_path / "whole")

    class StoppedError(Exception): ...

    class Stopper(sp.Callback):
        steps = 0

        def step(self, step: int, loss: float) -> None:
            self.steps += 1
            if self.steps == 9:  # in the second member
                raise StoppedError

    with pytest.raises(StoppedError):
        tune_ensemble(llama, rows, short(), members=2, out=tmp_path / "parts", callback=Stopper())
    begun = tmp_path / "parts"
    with pytest.raises(SettingsError, match="begun with seed = 0, not 1"):
        tune_ensemble(llama, rows, short(seed=1), members=2, out=begun, resume=True)
    with pytest.raises(InputError, match="holds an ensemble; resume it with --ensemble 2"):
        tune_ensemble(llama, rows, None, members=3, out=begun, resume=True)
    with pytest.raises(InputError, match="holds an ensemble; resume it with"):
        tune(llama, rows, None, out=begun, resume=True)
    with pytest.raises(InputError, match="holds one run; resume it without --ensemble"):
        tune_ensemble(llama, rows, None, members=2, out=begun / "member-1", resume=True)
    with pytest.raises(InputError, match="or --resume to go on with it"):
        tune_ensemble(llama, rows, short(), members=2, out=begun)
    counted = Stopper()
    counted.steps = 100
    tune_ensemble(llama, rows, None, members=2, out=begun, resume=True, callback=counted)
    assert counted.steps == 104  # the second member's last four
    assert not (begun / "metrics.jsonl").exists()
    for n in (1, 2):
        assert prompt_bytes(tmp_path / "parts" / f"member-{n}") == prompt_bytes(tmp_path / "whole" / f"member-{n}")


def test_an_ensemble_of_some_minutes_goes_on_with_the_rows_that_it_began_with(
    llama: FrozenModel, reviews: Path, tmp_path: Path
) -> None:
    class StoppedError(Exception): ...

    class Stopper(sp.Callback):
        steps = 0

        def step(self, step: int, loss: float) -> None:
            self.steps += 1
            if self.steps == 12:  # in the second member
                raise StoppedError

    rows, place = load_data(reviews), tmp_path / "run"
    asked = load_data([{"text": f"a film {n}", "label": rows.labels[n % 2]} for n in range(50)])
    given = short(max_steps=None, eval_every=None, eval_rows=50, max_minutes=70, patience=None)
    with pytest.raises(StoppedError):
        throughput = Throughput(step=100, evaluation=6 * 50, rows=50)
        tune_ensemble(
            llama, rows, given, members=3, eval_data=asked, out=place, callback=Stopper(), throughput=throughput
        )
    assert not (place / "member-3").exists()
    throughput = Throughput(step=100, evaluation=6 * 32, rows=32)
    result = tune_ensemble(
        llama, rows, given, members=3, eval_data=asked, out=place, resume=True, throughput=throughput
    )
    assert [run.steps for run in result.runs] == [8] * 3  # of 14, less three evaluations of 32 rows
    assert [run.settings.eval_rows for run in result.runs] == [32] * 3
    assert len(records(place)) == 32
    (place / "member-3" / "state").rename(tmp_path / "gone")
    again = tune_ensemble(llama, rows, given, members=3, eval_data=asked, out=place, resume=True)
    assert again.metrics == result.metrics
    with pytest.raises(SettingsError, match="begun with max_steps = None, not 50"):
        tune_ensemble(llama, rows, sp.TuneConfig(max_steps=50), members=3, eval_data=asked, out=place, resume=True)


def test_a_member_that_was_not_begun_takes_the_settings_that_the_first_one_took(
    llama: FrozenModel, reviews: Path, tmp_path: Path
) -> None:
    class StoppedError(Exception): ...

    class Stopper(sp.Callback):
        def step(self, step: int, loss: float) -> None:
            raise StoppedError

    rows, given = load_data(reviews), short(eval_rows=10, train_rows=20, learning_rate=0.02)
    with pytest.raises(StoppedError):
        tune_ensemble(llama, rows, given, members=2, out=tmp_path / "run", callback=Stopper())
    assert not (tmp_path / "run" / "member-2").exists()
    result = tune_ensemble(llama, rows, None, members=2, out=tmp_path / "run", resume=True)
    for number, run in enumerate(result.runs):
        settings = run.settings.model_dump(include=given.model_fields_set | {"seed"})
        assert settings == {**given.model_dump(include=given.model_fields_set), "seed": number}


def test_what_is_no_ensemble_is_refused(llama: FrozenModel, reviews: Path, tmp_path: Path) -> None:
    rows = load_data(reviews)
    with pytest.raises(SettingsError, match="give two members or more"):
        tune_ensemble(llama, rows, short(), members=1)
    with pytest.raises(SettingsError, match="verbalizer"):
        tune_ensemble(llama, rows, short(verbalizers={"good": "yes"}), members=2, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    folder = tune_ensemble(llama, rows, short(max_steps=1), members=2).prompt.save(tmp_path / "prompt")
    with pytest.raises(PromptError, match="is an ensemble; give one of its members"):
        sp.tune(llama, rows, short(init=f"prompt:{folder}"))
    record = json.loads((folder / "ensemble.json").read_text())
    for members in (["member-1"], ["member-1", ".."], ["member-1", "member-1"], "member-1", None):
        (folder / "ensemble.json").write_text(json.dumps({**record, "members": members}))
        with pytest.raises(PromptError, match="is damaged"):
            load_prompt(folder)
    tune(llama, rows, short(max_steps=1, template="{{ text }} is")).prompt.save(folder / "member-2")
    (folder / "ensemble.json").write_text(json.dumps(record))
    with pytest.raises(PromptError, match="is for another task or model"):
        load_prompt(folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(PromptError, match="is not an ensemble"):
        tune_ensemble(llama, rows, short(max_steps=1), members=2).prompt.save(folder)
    assert (folder / "notes.txt").exists()
    with pytest.raises(PromptError, match="is not an ensemble"):
        tune_ensemble(llama, rows, short(max_steps=1), members=2).prompt.save(folder / "member-1")


def test_the_command_learns_keeps_and_uses_an_ensemble(
    command: Command, llama_folder: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path / "home"))
    tuning = ["tune", reviews, "--model", llama_folder, "--out", "run", "--ensemble", "2", *SHORT]
    done = command(*tuning, "--name", "two", "--json")
    assert done.record["registered"] == "two@1"
    assert done.record["steps"] == 6
    assert [member["settings"]["seed"] for member in done.record["members"]] == [0, 1]
    assert command("evaluate", "two", reviews, "--json").record["metrics"]["accuracy"]["value"] >= 0
    assert command("generate", "run/prompt", "a fine film").code == 0
    beside = command("evaluate", "run/prompt/member-1", reviews, "--json").record["predictions"]
    assert Path(beside) == Path("run/test-predictions.jsonl").resolve()
    assert command("prompts", "list", "--json").record["prompts"][0]["members"] == 2
    shown = command("prompts", "show", "two")
    assert (shown.code, "ensemble" in shown.out) == (0, True)
    again = command(*tuning, "--resume", "--json")
    assert (again.code, again.record["steps"]) == (0, 6)
    assert command(*tuning).code == 2
