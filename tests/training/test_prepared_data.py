"""What runs on the same rows share is computed once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.config import TuneConfig
from softprompt.data.encoder import Encoder
from softprompt.data.rows import Row, load_data
from softprompt.evaluation.scorer import Scorer
from softprompt.model.frozen import FrozenModel
from softprompt.training import prepared_data as module
from softprompt.training.prepare import PreparedRun, prepare_data, prepare_run
from softprompt.training.prompt_trainer import PromptTrainer
from softprompt.training.tune import tune

SETTINGS = TuneConfig(num_virtual_tokens=5, batch_size=4, max_steps=20, max_length=64, eval_rows=4)


class Counts:
    """Counts what preparing costs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.measured: list[int] = []
        self.scorers = 0
        self.tokenized: Counter[str] = Counter()
        measure, make_scorer, choices = module.measure, module.make_scorer, Encoder.choices

        def counted_measure(model: FrozenModel, prefix_length: int) -> Any:
            self.measured.append(prefix_length)
            return measure(model, prefix_length)

        def counted_scorer(*given: Any) -> Scorer:
            self.scorers += 1
            return make_scorer(*given)

        def counted_choices(encoder: Encoder, rows: Any) -> Any:
            self.tokenized.update(row["text"] for row in rows)
            return choices(encoder, rows)

        monkeypatch.setattr(module, "measure", counted_measure)
        monkeypatch.setattr(module, "make_scorer", counted_scorer)
        monkeypatch.setattr(Encoder, "choices", counted_choices)


def test_a_thorough_run_of_some_minutes_prepares_its_rows_once(
    llama: FrozenModel, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It prepares a pilot, a candidate for each start, and the run."""
    counts, examples, example = Counts(monkeypatch), Counter[str](), Encoder.example

    def counted_example(encoder: Encoder, row: Row, where: str) -> Any:
        examples[row["text"]] += 1
        return example(encoder, row, where)

    monkeypatch.setattr(Encoder, "example", counted_example)
    prepared_runs: list[PreparedRun] = []

    def recorded(*given: Any) -> PreparedRun:
        prepared_runs.append(prepare_run(*given))
        return prepared_runs[-1]

    monkeypatch.setattr("softprompt.training.tune.prepare_run", recorded)
    monkeypatch.setattr("softprompt.training.search.prepare_run", recorded)
    monkeypatch.setattr(PromptTrainer, "step", lambda trainer: setattr(trainer.state, "step", trainer.state.step + 1))
    monkeypatch.setattr(PromptTrainer, "gradient", lambda _trainer, _batch: 0.0)
    settings = SETTINGS.model_copy(update={"max_steps": None, "max_minutes": 1, "budget": "thorough"})
    rows = load_data(reviews)
    tune(llama, rows, settings)
    assert len(prepared_runs) == 4
    assert counts.scorers == 1
    validation = [row["text"] for row in prepared_runs[0].validation or ()]
    assert counts.tokenized == Counter(validation)
    assert len(counts.measured) == len(set(counts.measured)) == 1
    measured = prepared_runs[0].train
    # Each for its length, and once more where the throughput is measured: its first steps.
    assert {row["text"] for row in measured} <= examples.keys()
    timed = 5 * 4
    assert sum(examples.values()) <= len(measured) + timed


def test_runs_with_other_settings_share_what_is_the_same(
    llama: FrozenModel, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Counts(monkeypatch)
    data = prepare_data(llama, load_data(reviews), SETTINGS)
    first = prepare_run(data, SETTINGS)
    second = prepare_run(data, SETTINGS.model_copy(update={"learning_rate": 1.0, "max_steps": 19}))
    alone = prepare_run(prepare_data(llama, load_data(reviews), SETTINGS), SETTINGS)
    assert second.config.learning_rate == 1
    assert first.config == alone.config
    assert first.reasons == alone.reasons
    assert torch.equal(first.start, alone.start)
    assert (first.indices_seen == alone.indices_seen).all()
    assert first.shared_text_ids == second.shared_text_ids == alone.shared_text_ids
    assert counts.scorers == len(counts.measured) == 2
    assert first.scorer is not second.scorer  # each with its own number of tokens at once
    other = prepare_run(data, SETTINGS.model_copy(update={"seed": 1}))
    assert counts.scorers == 3
    assert other.validation is not None
    assert first.validation is not None
    assert [*other.validation] != [*first.validation]


def test_a_warning_is_given_once(llama: FrozenModel, reviews: Path) -> None:
    rows = load_data(reviews)
    data = prepare_data(llama, rows, SETTINGS, rows)
    with pytest.warns(UserWarning, match="validation rows have the same input as a training row") as warned:
        prepare_run(data, SETTINGS)
        prepare_run(data, SETTINGS.model_copy(update={"learning_rate": 1.0}))
    assert len(warned) == 1
