"""Parameterizations: what is saved gives what was trained, and starts where the plain prompt starts."""

from __future__ import annotations

from pathlib import Path

import torch

from softprompt.data.rows import load_data
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.ensemble import load_prompt
from softprompt.prompt.parameterization import Residual, parameterize
from softprompt.training.prepare import make_plan
from softprompt.training.prompt_trainer import PromptLoop
from softprompt.training.tune import tune
from test_training import short


def test_a_residual_network_adds_nothing_at_first_and_is_the_same_for_a_seed() -> None:
    start = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    one, same, other = (parameterize(start, "residual", seed) for seed in (0, 0, 1))
    assert torch.equal(one(), start)
    states = [made.state_dict() for made in (one, same, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_a_folded_prompt_gives_the_same_logits_as_its_parameterization(llama: FrozenModel, reviews: Path) -> None:
    plan = make_plan(llama, load_data(reviews), short(parameterization="residual", learning_rate=0.05))
    loop = PromptLoop(llama, plan)
    for _ in range(3):
        loop.step()
    made = loop.prompt
    assert isinstance(made, Residual)
    norm, down, _, up = made.network
    with torch.no_grad():
        plain = made.prompt + up(torch.nn.functional.gelu(down(norm(made.prompt))))
        assert not torch.allclose(plain, made.prompt)  # the network has learned something
        through = [llama.read(llama.prefix(p), [[5, 6, 7]])[0] for p in (made(), loop.weights()["prompt"], plain)]
    assert torch.equal(through[0], through[1])
    torch.testing.assert_close(through[0], through[2])


def test_a_saved_prompt_is_plain(llama: FrozenModel, reviews: Path, tmp_path: Path) -> None:
    result = tune(llama, load_data(reviews), short(parameterization="residual"), out=tmp_path / "run")
    saved = load_prompt(tmp_path / "run" / "prompt")
    assert saved.weights.shape == (5, 32)
    assert torch.equal(saved.weights, result.prompt.weights)
