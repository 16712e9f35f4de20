"""Prefix tuning: learned keys and values, compared with transformers' own cache and with PEFT's prefix tuning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from references import relative
from softprompt.config import GenerateConfig, TuneConfig
from softprompt.data.batching import micro_batches
from softprompt.data.example import Example, shared_text
from softprompt.data.rows import load_data
from softprompt.errors import PromptError, SettingsError
from softprompt.evaluation.evaluate import evaluate
from softprompt.generation import generate
from softprompt.model.frozen import FrozenModel
from softprompt.model.gradient import prompt_gradient
from softprompt.prompt.base_model import base_model_record
from softprompt.prompt.loading import load_prompt
from softprompt.prompt.nearest_tokens import nearest_tokens
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.training.callbacks import Callback
from softprompt.training.tune import tune
from tiny_data import examples_of
from tiny_models import ARCHITECTURES, as_prompt, frozen, tiny_model
from tiny_runs import Command, log_without_times, prepared_run, prompt_bytes, short, weights_hash

PREFIX_TUNING = {"method": "prefix-tuning"}


def learned_keys(model: FrozenModel, length: int) -> Tensor:
    """Keys and values like those of a text, with some noise, so that no two are alike."""
    with torch.no_grad():
        near = model.prefix(model.embed(range(20, 20 + length))).stacked()
    return near + 0.1 * torch.randn(near.shape, generator=torch.Generator().manual_seed(1))


def plain_loss(model: FrozenModel, prefix: Tensor, examples: list[Example]) -> Tensor:
    """Text by text, through transformers alone: the keys and values in its own cache."""
    total = torch.zeros(())
    for example in examples:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(prefix):
            cache.update(keys[None], values[None], layer)
        ids = torch.tensor([example.ids])
        mask = torch.ones(1, prefix.shape[-2] + ids.shape[1], dtype=torch.long)
        logits = model.hf_model(input_ids=ids, past_key_values=cache, attention_mask=mask).logits[0]
        places = torch.arange(example.start, len(example.ids))
        total = total + cross_entropy(logits[places - 1], ids[0, places], reduction="sum")
    return total


@pytest.mark.parametrize("kind", ["mixed lengths", "common beginning", "one example"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradient_are_those_of_transformers_cache(architecture: str, kind: str) -> None:
    model, examples = frozen(architecture), examples_of(kind)
    prefix = learned_keys(model, 4).requires_grad_()
    expected = plain_loss(model, prefix, examples) / sum(e.targets for e in examples)
    (wanted,) = torch.autograd.grad(expected, prefix)
    text = shared_text(examples) if len(examples) > 1 else ()
    parts = [[examples[i] for i in part] for part in micro_batches(examples, 20, len(text))]
    loss, gradient = prompt_gradient(model, prefix.detach(), text, parts)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert relative(gradient, wanted) < 1e-4


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "gemma2"])
def test_prefix_starts_as_what_the_model_makes_of_the_text(architecture: str, reviews: Path) -> None:
    model, rows = frozen(architecture), load_data(reviews)
    soft, learned = (prepared_run(model, rows, short(method=method)) for method in ("prompt-tuning", "prefix-tuning"))
    assert soft.scorer is not None
    assert learned.start.shape[-2] == 5
    found, expected = (soft.scorer.score(model, as_prompt(prepared.start)) for prepared in (learned, soft))
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-4, atol=1e-5)


def test_plain_text_without_a_leading_token_is_learned_from_its_second_token_on(llama: FrozenModel) -> None:
    """Nothing predicts the first: no token stands at a prefix's last position."""
    rows = load_data([{"text": f"the parcel never came {n}"} for n in range(30)])
    methods = ("prompt-tuning", "prefix-tuning")
    firsts = {m: {e.start for e in prepared_run(llama, rows, short(method=m)).examples} for m in methods}
    assert firsts == {"prompt-tuning": {0}, "prefix-tuning": {1}}
    tune(llama, rows, short(**PREFIX_TUNING, max_steps=1))


def test_it_learns_and_the_model_stays_as_it_was(llama: FrozenModel, reviews: Path) -> None:
    rows, before = load_data(reviews), weights_hash(llama)
    result = tune(llama, rows, short(**PREFIX_TUNING, max_steps=40, batch_size=8, learning_rate=0.05, eval_rows=0))
    done = evaluate(llama, rows, result.prompt)
    assert done.without_prompt is not None
    assert done.metrics["loss"].value < done.without_prompt["loss"].value - 0.5
    assert weights_hash(llama) == before


def test_a_run_that_was_stopped_ends_as_one_that_was_not(llama: FrozenModel, reviews: Path, tmp_path: Path) -> None:
    rows = load_data(reviews)
    tune(llama, rows, short(**PREFIX_TUNING), out=tmp_path / "whole")

    class StoppedError(Exception): ...

    class Stopper(Callback):
        def step(self, step: int, loss: float) -> None:
            if step == 5:
                raise StoppedError

    with pytest.raises(StoppedError):
        tune(llama, rows, short(**PREFIX_TUNING), out=tmp_path / "parts", callback=Stopper())
    tune(llama, rows, short(**PREFIX_TUNING), out=tmp_path / "parts", resume=True)
    assert prompt_bytes(tmp_path / "parts") == prompt_bytes(tmp_path / "whole")
    assert log_without_times(tmp_path / "parts") == log_without_times(tmp_path / "whole")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "qwen3"])
def test_peft_loads_a_saved_prefix_and_gives_the_same_greedy_tokens(architecture: str, tmp_path: Path) -> None:
    model = frozen(architecture)
    prompt = SoftPrompt(learned_keys(model, 6), Record(base_model=base_model_record(model)))
    prompt.save(tmp_path / "prefix")
    again = load_prompt(tmp_path / "prefix")
    assert again.method == "prefix-tuning"
    assert torch.equal(again.weights, prompt.weights)

    peft_model = PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "prefix")
    text = "the parcel never came and"
    ids = model.tokenizer(text, return_tensors="pt")
    whole = peft_model.generate(**ids, max_new_tokens=16, do_sample=False)[0]
    expected = model.tokenizer.decode(whole[ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert generate(model, [text], again, GenerateConfig(max_new_tokens=16)) == [expected]
    assert "learned prefix" in (tmp_path / "prefix" / "README.md").read_text()


@pytest.mark.parametrize("kind", [PrefixTuningConfig, CartridgeConfig])
@torch.no_grad()
def test_a_prefix_that_peft_saved_gives_the_same_logits(kind: type[PrefixTuningConfig], tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = get_peft_model(tiny_model("llama"), kind(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5)).eval()
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="cannot be checked"):
        prompt = load_prompt(tmp_path)
    model = frozen("llama")
    ids = model.tokenizer("the parcel never came", return_tensors="pt")["input_ids"]
    expected = theirs(input_ids=ids).logits[0, -1]
    found, _ = model.backend.prefill(model.prefix(prompt.weights), [ids[0].tolist()])
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


def test_prefix_can_start_from_a_soft_prompt_but_no_soft_prompt_from_a_prefix(
    llama: FrozenModel, reviews: Path, tmp_path: Path
) -> None:
    rows = load_data(reviews)
    soft = tune(llama, rows, short(max_steps=2)).prompt
    learned = tune(llama, rows, short(**PREFIX_TUNING, max_steps=2)).prompt
    soft.save(tmp_path / "soft")
    learned.save(tmp_path / "learned")
    from_soft = prepared_run(llama, rows, TuneConfig(method="prefix-tuning", init=f"prompt:{tmp_path / 'soft'}")).start
    with torch.no_grad():
        torch.testing.assert_close(from_soft, llama.prefix(soft.weights).stacked())
    from_prefix = prepared_run(
        llama, rows, TuneConfig(method="prefix-tuning", init=f"prompt:{tmp_path / 'learned'}")
    ).start
    assert torch.equal(from_prefix, learned.weights)
    with pytest.raises(SettingsError, match="cannot start from a prefix"):
        prepared_run(llama, rows, TuneConfig(init=f"prompt:{tmp_path / 'learned'}"))


def test_what_does_not_fit_is_refused(llama: FrozenModel, tmp_path: Path) -> None:
    prompt = SoftPrompt(learned_keys(llama, 3), Record(base_model=base_model_record(llama)))
    with pytest.raises(PromptError, match="tiny-gpt2 has 3 with 4 of 8"):
        evaluate(frozen("gpt2"), load_data([{"text": "a fine film"}]), prompt)
    with pytest.raises(SettingsError, match="after a learned prefix there is nothing to continue"):
        generate(llama, [""], prompt)
    with pytest.raises(PromptError, match="no embeddings"):
        nearest_tokens(llama, prompt)
    prompt.save(tmp_path / "prefix")
    file = tmp_path / "prefix" / "adapter_config.json"
    good = json.loads(file.read_text())
    for name, value in (("num_layers", 5), ("num_attention_heads", 3), ("token_dim", None), ("num_layers", "many")):
        file.write_text(json.dumps({**good, name: value}))
        with pytest.raises(PromptError, match="do not make"):
            load_prompt(tmp_path / "prefix")
    file.write_text(json.dumps(good))
    weights = tmp_path / "prefix" / "adapter_model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(PromptError, match="not finite"):
        load_prompt(tmp_path / "prefix")


def test_commands_tune_evaluate_and_show_a_prefix(command: Command, llama_folder: Path, reviews: Path) -> None:
    settings = [x for s in ("method=prefix-tuning", "max_steps=2", "num_virtual_tokens=5") for x in ("--set", s)]
    assert command("tune", reviews, "--model", llama_folder, "--out", "run", *settings).code == 0
    assert command("evaluate", "run/prompt", reviews, "--json").record["metrics"]["accuracy"]["value"] >= 0
    shown = command("prompts", "show", "run/prompt")
    assert (shown.code, "prefix-tuning" in shown.out) == (0, True)
