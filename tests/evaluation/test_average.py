"""Ensembles: several prompts scored in one mixed batch, and what they found made one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from softprompt.data.encoder import Encoder
from softprompt.data.rows import load_data
from softprompt.data.templates import make_format
from softprompt.distributed.collective import Processes
from softprompt.evaluation.calibration import make_scorer
from softprompt.evaluation.label_scorer import LabelScorer
from softprompt.evaluation.scorer import Scorer
from softprompt.evaluation.scores import LabelScores, TextScores, average_scores
from softprompt.model.frozen import FrozenModel
from tiny_data import TEXTS
from tiny_models import as_prompt, frozen, tiny_prompt

LABELS = {"one token": ["good", "bad", "dull"], "several tokens": ["a good film", "a good waste", "a dull film", "12"]}


@pytest.fixture(scope="module", params=["llama", "mistral", "bloom", "gptj"])
def model(request: pytest.FixtureRequest) -> FrozenModel:
    return frozen(request.param)


def prompts_for(model: FrozenModel) -> list[Tensor | None]:
    """Two of one length, as an ensemble has them; a longer one; and the base model."""
    return [tiny_prompt(model), -tiny_prompt(model), tiny_prompt(model, 19), None]


def scorer_for(model: FrozenModel, kind: str, at_once: int) -> Scorer:
    if kind == "text":
        rows = load_data([{"text": f"{text} {i}"} for i, text in enumerate(TEXTS)])
        return make_scorer(Encoder(model.tokenizer, make_format("text", []), 512), rows, at_once)
    labels = LABELS[kind]
    rows = load_data([{"text": f"{text} {i}", "label": labels[i % 3]} for i, text in enumerate(TEXTS)])
    template = "please classify: {{ text }} label"
    return make_scorer(Encoder(model.tokenizer, make_format("classification", labels, template), 512), rows, at_once)


@pytest.mark.parametrize("at_once", [10_000, 50, 1])
@pytest.mark.parametrize("kind", [*LABELS, "text"])
def test_prompts_scored_at_once_find_what_each_finds_alone(model: FrozenModel, kind: str, at_once: int) -> None:
    scorer, prompts = scorer_for(model, kind, at_once), prompts_for(model)
    together = scorer.score_members(model, as_prompt(*prompts))
    assert scorer.micro_batch_tokens == at_once
    for scores, prompt in zip(together, prompts, strict=True):
        alone = scorer.score(model, as_prompt(prompt))
        assert scores.losses == pytest.approx(alone.losses, abs=2e-4)
        assert list(scores.tokens) == list(alone.tokens)
        if isinstance(alone, LabelScores):
            assert isinstance(scores, LabelScores)
            assert scores.log_likelihoods == pytest.approx(alone.log_likelihoods, abs=2e-4)
    assert len({scores.loss() for scores in together}) == len(prompts)


@pytest.mark.parametrize("kind", ["several tokens", "text"])
def test_what_processes_find_of_several_prompts_adds_up(model: FrozenModel, kind: str) -> None:
    scorer, prompts = scorer_for(model, kind, 50), prompts_for(model)
    with torch.no_grad():
        whole, total = scorer._run(model, prompts), np.zeros((len(prompts), *scorer.shape))
        for rank in range(3):
            scorer.processes = Processes(rank, 3)
            mine = scorer._run(model, prompts)
            assert not (mine * total).any()
            total += mine
    assert total == pytest.approx(whole, abs=2e-4)


def scores_of(likelihoods: NDArray[np.float64], gold: list[int]) -> LabelScores:
    count, labels = likelihoods.shape
    rows = load_data([{"text": "x", "label": str(g)} for g in gold])
    losses = -likelihoods[np.arange(count), gold]
    names = [str(i) for i in range(labels)]
    return LabelScores(rows, losses, np.full(count, 2), likelihoods, names, np.array(gold))


def members_of(draw: np.random.Generator, members: int, rows: int, labels: int) -> list[LabelScores]:
    gold = draw.integers(labels, size=rows).tolist()
    return [scores_of(-draw.exponential(4, size=(rows, labels)), gold) for _ in range(members)]


def test_the_average_is_of_each_labels_share() -> None:
    draw = np.random.default_rng(0)
    for members in (2, 5):
        each = members_of(draw, members, 30, 4)
        made = average_scores(each)
        shares = [np.exp(m.log_likelihoods) / np.exp(m.log_likelihoods).sum(axis=1, keepdims=True) for m in each]
        assert made.probabilities() == pytest.approx(np.mean(shares, axis=0))
        assert np.exp(made.log_likelihoods) == pytest.approx(np.mean(shares, axis=0))
        # The loss is in the members' unit, nats of the target's text: that of a mixture of whole texts.
        gold = np.mean([np.exp(-m.losses) for m in each], axis=0)
        assert made.losses == pytest.approx(-np.log(gold))
        assert made.loss() <= np.mean([m.loss() for m in each]) + 1e-12
        assert list(made.tokens) == list(each[0].tokens)


def test_the_average_of_texts_is_a_mixture_of_whole_texts() -> None:
    draw = np.random.default_rng(1)
    rows = load_data([{"text": "x"}] * 20)
    each = [TextScores(rows, draw.exponential(9, size=20), np.arange(20)) for _ in range(3)]
    made = average_scores(each)
    assert isinstance(made, TextScores)
    assert np.exp(-made.losses) == pytest.approx(np.mean([np.exp(-m.losses) for m in each], axis=0))
    assert made.predictions()[3]["loss"] == pytest.approx(made.losses[3] / 3)


def test_labels_that_are_very_unlikely_do_no_harm() -> None:
    each = [scores_of(np.array([[-3000.0, -10.0, -2900.0]]), [0]), scores_of(np.array([[-4000.0, -9.0, -2000.0]]), [0])]
    made = average_scores(each)  # a warning would fail this test
    assert np.isfinite(made.log_likelihoods).all()
    assert made.predicted[0] == 1
    assert made.loss() == pytest.approx((3000 + np.log(2)) / 2)


def test_an_ensemble_of_one_is_its_member() -> None:
    (member,) = members_of(np.random.default_rng(3), 1, 40, 5)
    made = average_scores([member])
    assert list(made.predicted) == list(member.predicted)
    assert made.losses == pytest.approx(member.losses)
    assert made.values()["accuracy"] == member.values()["accuracy"]


def test_an_ensemble_of_prompts_is_scored_like_a_prompt(model: FrozenModel) -> None:
    scorer = scorer_for(model, "several tokens", 1000)
    assert isinstance(scorer, LabelScorer)
    each = [
        scores
        for scores in scorer.score_members(model, as_prompt(*prompts_for(model)))
        if isinstance(scores, LabelScores)
    ]
    made = average_scores(each)
    assert set(made.metrics()) == {"accuracy", "macro_f1", "loss"}
    assert len(made.predictions()) == len(TEXTS)
    assert made.better_than(replace(made, losses=made.losses + 1))
