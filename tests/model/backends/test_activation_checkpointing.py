"""Activation checkpointing (Chen et al. 2016) on the packed backend: the same gradient to the bit, in less memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from counting import LiveBytes, saved_bytes
from softprompt import TuneConfig, load_data, tune
from softprompt.data.example import Example
from softprompt.errors import SettingsError
from softprompt.model.backends.verify import freeze
from softprompt.model.frozen import FrozenModel
from softprompt.model.gradient import prompt_gradient
from softprompt.model.memory import measure
from softprompt.training import prompt_trainer
from tiny_data import examples_of
from tiny_models import ARCHITECTURES, frozen, tiny_prompt, with_memory
from tiny_runs import SHORT, Command, prepared_run
from tiny_tokenizers import tiny_tokenizer

PACKED = [name for name, (backend, _) in ARCHITECTURES.items() if backend == "packed"]


@pytest.mark.parametrize("architecture", PACKED)
def test_the_gradient_is_the_same_to_the_bit(architecture: str) -> None:
    """With sliding windows, stand-ins and experts, in one micro-batch and in several, behind a shared beginning."""
    model = frozen(architecture)
    assert model.backend.can_checkpoint
    for kind, text in (("mixed lengths", 0), ("common beginning", 6)):
        examples, prompt = examples_of(kind), tiny_prompt(model, 20)
        for parts in ([examples], [examples[:1], examples[1:3], examples[3:]]):
            once = prompt_gradient(model, prompt, examples[0].ids[:text], parts)
            twice = prompt_gradient(model, prompt, examples[0].ids[:text], parts, activation_checkpointing=True)
            assert twice[0] == once[0]
            assert torch.equal(twice[1], once[1])


@pytest.mark.parametrize("architecture", PACKED)
def test_activation_checkpointing_saves_the_layers_inputs_alone(architecture: str) -> None:
    model = frozen(architecture)
    layers, width = model.hf_model.config.num_hidden_layers, model.hf_model.config.hidden_size
    lengths = [40, 41, 42]
    recomputed, all_of_it = (
        saved_bytes(model, 20, lengths, activation_checkpointing) for activation_checkpointing in (True, False)
    )
    inputs = layers * sum(lengths) * width * 4
    # Beside them the final norm's, and what the layers share: angles of rotary embeddings, a map of windows.
    assert inputs <= recomputed < 1.7 * inputs
    assert recomputed < all_of_it / 4


@pytest.mark.parametrize("architecture", ["llama", "bloom", "gemma2", "mixtral", "gpt2"])
def test_a_steps_peak_is_lower_and_predicted(architecture: str) -> None:
    model = frozen(architecture)
    examples, prompt = [Example(tuple(range(5, 125)), 119)] * 6, tiny_prompt(model, 20)
    memory_estimate, peaks = measure(model, 20), []
    for activation_checkpointing in (False, True):
        with LiveBytes() as live:
            prompt_gradient(model, prompt, (), [examples], activation_checkpointing)
        peaks.append(live.most)
    predicted = replace(memory_estimate, activation_checkpointing=True).step([119] * 6, 6)
    assert 0.97 * peaks[1] < predicted < 2 * peaks[1]  # few layers: one of them counts for much
    assert peaks[1] < 0.75 * peaks[0]  # of three or four layers, one is in memory while it runs again


def test_of_many_layers_their_inputs_are_most_of_what_is_predicted() -> None:
    config = ARCHITECTURES["llama"][1]()
    config.num_hidden_layers = 24
    torch.manual_seed(0)
    model = freeze(AutoModelForCausalLM.from_config(config), tiny_tokenizer())
    examples, prompt = [Example(tuple(range(5, 125)), 119)] * 6, tiny_prompt(model, 4)
    with LiveBytes() as live:
        prompt_gradient(model, prompt, (), [examples], activation_checkpointing=True)
    assert live.most < replace(measure(model, 4), activation_checkpointing=True).step([119] * 6, 6) < 1.4 * live.most


def test_nothing_is_left_on_the_model(llama: FrozenModel) -> None:
    for architecture in ("llama", "bloom"):
        model = frozen(architecture)
        implementation = model.hf_model.config._attn_implementation
        prompt = tiny_prompt(model, 4)
        prompt_gradient(model, prompt, (), [examples_of("mixed lengths")], activation_checkpointing=True)
        assert model.hf_model.config._attn_implementation == implementation
        assert not any("forward" in module.__dict__ for module in model.hf_model.modules())


def in_a_thread(work: Callable[[], Any]) -> Any:
    """Do something in a thread of its own, and fail where it does not come back."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(120)
    assert not thread.is_alive(), "a lock is not given back"
    (result,) = results
    return result


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_the_backward_pass_may_run_in_another_thread(architecture: str) -> None:
    """As it does on a GPU: nothing that the forward pass set up for its own thread is there."""
    model, examples = frozen(architecture), examples_of("mixed lengths")
    gradients = []
    for activation_checkpointing in (False, True):
        leaves = model.prefix(tiny_prompt(model, 20)).leaves()
        loss = model.backend.loss(leaves, examples, activation_checkpointing).sum()
        in_a_thread(loss.backward) if activation_checkpointing else loss.backward()
        gradients.append([leaf.grad for leaf in [*leaves.keys, *leaves.values]])
    for once, twice in zip(*gradients, strict=True):
        assert once is not None
        assert torch.equal(once, twice)


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_threads_that_share_a_model_do_not_disturb_each_other(architecture: str) -> None:
    model = frozen(architecture)
    kinds = ["mixed lengths", "first token is a target", "one example"]
    expected = {kind: prompt_gradient(model, tiny_prompt(model, 20), (), [examples_of(kind)]) for kind in kinds}
    found: list[tuple[str, float, torch.Tensor]] = []

    def learn(kind: str, activation_checkpointing: bool) -> None:
        for _ in range(4):
            found.append(
                (
                    kind,
                    *prompt_gradient(model, tiny_prompt(model, 20), (), [examples_of(kind)], activation_checkpointing),
                )
            )

    def all_at_once() -> None:
        threads = [threading.Thread(target=learn, args=(kind, n != 1), daemon=True) for n, kind in enumerate(kinds)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    in_a_thread(all_at_once)
    assert len(found) == 12
    for kind, loss, gradient in found:
        assert loss == expected[kind][0]
        assert torch.equal(gradient, expected[kind][1])


def settings(**more: object) -> TuneConfig:
    given = {"max_steps": 4, "batch_size": 4, "eval_rows": 8, "num_virtual_tokens": 5, "micro_batch_tokens": 40}
    return TuneConfig(**{**given, **more})  # type: ignore[arg-type]


def test_a_run_learns_the_same_prompt(llama: FrozenModel, reviews: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, asked = load_data(reviews), []

    def recorded(*given: Any) -> Any:
        asked.append(given[4])
        return prompt_gradient(*given)

    monkeypatch.setattr(prompt_trainer, "prompt_gradient", recorded)
    once, twice = (tune(llama, rows, settings(gradient_checkpointing=given)) for given in (False, True))
    assert asked == [False] * 4 + [True] * 4
    assert torch.equal(once.prompt.weights, twice.prompt.weights)
    assert (once.settings.gradient_checkpointing, twice.settings.gradient_checkpointing) == (False, True)


def test_it_is_done_where_the_longest_row_does_not_fit_otherwise(
    llama: FrozenModel,
) -> None:
    rows = load_data([{"text": "the parcel never came " * n} for n in (1, 3, 60)])
    ample = prepared_run(llama, rows, settings(eval_rows=0))
    assert ample.config.gradient_checkpointing is False
    assert ample.reasons["gradient_checkpointing"] == "the longest row fits in memory"
    longest = max(ample.examples[i] for i in range(3))
    needed = ample.step_bytes([longest])
    little, least = (with_memory(llama, lambda free=free: free) for free in (needed * 0.9, 1000))
    tight = prepared_run(little, rows, settings(eval_rows=0))  # a warning would fail this test
    assert tight.config.gradient_checkpointing is True
    assert tight.reasons["gradient_checkpointing"] == "the longest row does not fit in memory otherwise"
    assert tight.step_bytes([longest]) < needed * 0.9
    assert prepared_run(little, rows, settings(eval_rows=0, gradient_checkpointing=True)).step_bytes([longest]) < needed
    for given in (None, False, True):
        with pytest.warns(UserWarning, match="the longest row alone needs about"):
            prepared = prepared_run(least, rows, settings(eval_rows=0, gradient_checkpointing=given))
        assert prepared.config.gradient_checkpointing == (given is not False)


def test_more_is_run_at_once_with_it(llama: FrozenModel, reviews: Path) -> None:
    model = with_memory(llama, lambda: 3 * 10**6)
    given = {"micro_batch_tokens": None, "eval_rows": 0}
    once, twice = (
        prepared_run(model, load_data(reviews), settings(gradient_checkpointing=on, **given)).config.micro_batch_tokens
        for on in (False, True)
    )
    assert once is not None
    assert twice is not None
    assert twice > 1.5 * once


def test_activation_checkpointing_is_refused_by_a_backend_that_cannot(
    reviews: Path,
) -> None:
    gptj, rows = frozen("gptj"), load_data(reviews)
    with pytest.raises(
        SettingsError, match=r"gradient_checkpointing: the .* backend cannot run this model's layers again"
    ):
        prepared_run(gptj, rows, settings(gradient_checkpointing=True))
    with pytest.warns(UserWarning, match="the longest row alone needs about"):
        prepared = prepared_run(with_memory(gptj, lambda: 1000), rows, settings())
    assert prepared.config.gradient_checkpointing is False
    assert prepared.reasons["gradient_checkpointing"] == f"not supported by the {gptj.backend.name} backend"


def test_check_says_it(command: Command, llama_folder: Path, reviews: Path) -> None:
    common = ["check", reviews, "--model", llama_folder, *SHORT, "--set"]
    on, off = (command(*common, f"gradient_checkpointing={on}", "--verbose") for on in ("true", "none"))
    assert "(with activation checkpointing" in " ".join(on.out.split())
    assert "(the layers" not in off.out
    assert "gradient_checkpointing │ False" in off.out
