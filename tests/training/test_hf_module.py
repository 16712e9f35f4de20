"""A prompt under `transformers.Trainer`."""

from __future__ import annotations

import hashlib
import runpy
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from softprompt import TrainablePrompt, load_prompt
from softprompt.errors import SettingsError
from softprompt.model.frozen import FrozenModel
from tiny_models import ARCHITECTURES, frozen, tiny_model

TEXTS = ["what a fine film", "the parcel never came and I want my money back please", "a dull film", "hello world"] * 4


def batch(model: FrozenModel, side: str, texts: list[str] = TEXTS[:4]) -> dict[str, torch.Tensor]:
    """A padded batch as the collator makes it; padding has no labels."""
    model.tokenizer.padding_side = side
    made = dict(model.tokenizer(texts, padding=True, return_tensors="pt"))
    model.tokenizer.padding_side = "right"
    labels = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
    labels[0, labels[0].ne(-100).nonzero()[2]] = -100  # not learned, in the middle of a text
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"], "labels": labels}


def loss_and_gradient(prompt: TrainablePrompt, **inputs: Any) -> tuple[float, torch.Tensor]:
    prompt.zero_grad()
    loss = prompt(**inputs).loss
    loss.backward()
    return float(loss.detach()), prompt.prompt.grad.clone()


def trainer(prompt: TrainablePrompt, folder: Path, **arguments: Any) -> Trainer:
    given = {
        "use_cpu": True,
        "auto_find_batch_size": True,
        "learning_rate": 3e-2,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
    }
    tokenizer = prompt.frozen.tokenizer
    return Trainer(
        model=prompt,
        args=TrainingArguments(output_dir=str(folder), report_to=[], disable_tqdm=True, **(given | arguments)),
        train_dataset=[tokenizer(text) for text in TEXTS],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


def weights(model: FrozenModel) -> str:
    return hashlib.sha256(b"".join(p.numpy().tobytes() for p in model.hf_model.parameters())).hexdigest()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_loss_and_gradient_are_those_of_peft(architecture: str) -> None:
    model = frozen(architecture)
    ours = TrainablePrompt(model, "classify this text", num_virtual_tokens=6)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    theirs = peft.get_peft_model(tiny_model(architecture), config)
    embedding = theirs.prompt_encoder["default"].embedding.weight
    embedding.data.copy_(ours.prompt.data)
    inputs = batch(model, "right")
    expected = theirs(**inputs).loss
    expected.backward()
    loss, gradient = loss_and_gradient(ours, **inputs)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert float((gradient - embedding.grad).norm() / embedding.grad.norm()) < 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_on_the_left_on_the_right_and_none_give_the_same(architecture: str) -> None:
    model = frozen(architecture)
    prompt = TrainablePrompt(model, "classify this text", num_virtual_tokens=6)
    right, left = batch(model, "right"), batch(model, "left")
    loss, gradient = loss_and_gradient(prompt, **right)
    for side in (right, left):
        other, other_gradient = loss_and_gradient(prompt, **side)
        assert other == pytest.approx(loss, rel=1e-5)
        assert float((other_gradient - gradient).norm() / gradient.norm()) < 1e-4
    with torch.no_grad():
        by_side = [prompt(side["input_ids"], side["attention_mask"]).logits for side in (right, left)]
        for row in range(4):
            ids = right["input_ids"][row : row + 1, : int(right["attention_mask"][row].sum())]
            alone = prompt(ids).logits[0]
            for side, logits in zip((right, left), by_side, strict=True):
                assert torch.allclose(logits[row][side["attention_mask"][row].bool()], alone, atol=1e-4)


def test_accumulated_batches_give_the_gradient_of_one(llama: FrozenModel) -> None:
    prompt = TrainablePrompt(llama, "classify this text")
    whole = batch(llama, "right")
    count = int((whole["labels"] != -100).sum())
    _, expected = loss_and_gradient(prompt, **whole)
    prompt.zero_grad()
    for part in (slice(0, 1), slice(1, 4)):
        prompt(**{name: value[part] for name, value in whole.items()}, num_items_in_batch=count).loss.backward()
    assert torch.allclose(prompt.prompt.grad, expected, atol=1e-6, rtol=1e-4)


def test_the_trainer_lowers_the_loss_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = frozen("llama")
    before = weights(model)
    prompt = TrainablePrompt(model, "classify this text")
    first = prompt.prompt.detach().clone()
    run = trainer(prompt, tmp_path, num_train_epochs=8, logging_steps=4)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert not torch.equal(prompt.prompt, first)
    assert weights(model) == before
    assert not any(module.training for module in model.hf_model.modules())
    assert run.evaluate(run.train_dataset)["eval_loss"] < losses[0]


def test_a_checkpoint_holds_the_prompt_alone_and_training_goes_on_from_it(tmp_path: Path) -> None:
    def fresh() -> TrainablePrompt:
        return TrainablePrompt(frozen("llama"), "classify this text")

    whole = fresh()
    trainer(whole, tmp_path / "whole").train()
    half = fresh()
    stopped = trainer(half, tmp_path / "half", save_steps=3)
    stopped.train()
    checkpoint = tmp_path / "half" / "checkpoint-3"
    saved = load_file(checkpoint / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == {"prompt": tuple(half.prompt.shape)}
    resumed = fresh()
    trainer(resumed, tmp_path / "half").train(resume_from_checkpoint=str(checkpoint))
    assert torch.allclose(resumed.prompt, whole.prompt, atol=1e-6)


def test_peft_and_softprompt_read_what_the_trainer_made(tmp_path: Path) -> None:
    model = frozen("llama")
    prompt = TrainablePrompt(model, "classify this text")
    trainer(prompt, tmp_path / "run").train()
    folder = prompt.soft_prompt().save(tmp_path / "prompt")
    loaded = load_prompt(folder)
    assert torch.equal(loaded.weights, prompt.prompt.detach())
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), folder)
    inputs = batch(model, "right")
    with torch.no_grad():
        expected = theirs(inputs["input_ids"], inputs["attention_mask"]).logits[:, prompt.prompt.shape[0] :]
        ours = prompt(inputs["input_ids"], inputs["attention_mask"]).logits
    real = inputs["attention_mask"].bool()
    assert torch.allclose(ours[real], expected[real], atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "bloom", "gptj"])
def test_metrics_are_computed_from_the_logits_when_evaluating(architecture: str, tmp_path: Path) -> None:
    """Those of a model that has no labels, whatever the padding; in training nothing but the loss is computed."""
    model = frozen(architecture)
    prompt = TrainablePrompt(model, "classify this text")
    inputs = batch(model, "left")
    trained = prompt(**inputs)
    prompt.eval()
    with torch.no_grad():
        evaluated = prompt(**inputs)
        plain = prompt(inputs["input_ids"], inputs["attention_mask"])
    assert trained.logits is None
    torch.testing.assert_close(evaluated.loss, trained.loss.detach())
    torch.testing.assert_close(evaluated.logits, plain.logits)

    seen = []
    run = trainer(prompt, tmp_path)
    run.compute_metrics = lambda given: seen.append(given) or {"rows": len(given.predictions)}  # type: ignore[func-returns-value]
    metrics = run.evaluate(run.train_dataset)
    assert metrics["eval_rows"] == len(TEXTS)
    (given,) = seen
    right = given.predictions[:, :-1].argmax(-1) == given.label_ids[:, 1:]
    assert given.predictions.shape == (*given.label_ids.shape, 400)
    assert 0 <= right[given.label_ids[:, 1:] != -100].mean() < 1


def test_layers_that_run_again_give_the_same_prompt(tmp_path: Path) -> None:
    made = []
    for again in (False, True):
        prompt = TrainablePrompt(frozen("llama"), "classify this text")
        trainer(prompt, tmp_path / str(again), gradient_checkpointing=again).train()
        assert prompt.activation_checkpointing == again
        made.append(prompt.prompt.detach())
    torch.testing.assert_close(*made)


@pytest.mark.parametrize(
    ("architecture", "arguments", "said"),
    [
        ("llama", {"label_smoothing_factor": 0.1}, "label_smoothing_factor is not supported"),
        ("llama", {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is not supported"),
        ("gptj", {"gradient_checkpointing": True}, "gradient_checkpointing is not supported for tiny-gptj"),
    ],
)
def test_what_is_not_supported_is_said(architecture: str, arguments: dict[str, Any], said: str, tmp_path: Path) -> None:
    prompt = TrainablePrompt(frozen(architecture), "classify this text")
    with pytest.raises(SettingsError, match=said):
        trainer(prompt, tmp_path, **arguments).train()


def test_the_trainer_cannot_generate_and_says_what_can() -> None:
    prompt = TrainablePrompt(frozen("llama"), "classify this text")
    assert not hasattr(prompt, "config")  # asked for by the Trainer, and nothing to fail for
    with pytest.raises(SettingsError, match="predict_with_generate is not supported"):
        prompt.generate(torch.tensor([[5]]))


def test_compiling_changes_nothing() -> None:
    model = frozen("llama")
    prompt = TrainablePrompt(model, "classify this text")
    inputs = batch(model, "right")
    torch.testing.assert_close(torch.compile(prompt)(**inputs).loss, prompt(**inputs).loss)


def test_the_example_runs(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    lines = ["act,prompt", *(f'"{i}","I want you to act as a {i} and hello world"' for i in range(20))]
    (tmp_path / "prompts.csv").write_text("\n".join(lines))
    arguments = ["prompts.csv", "--column", "prompt", "--model", str(llama_folder), "--rows", "12", "--epochs", "2"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["trainer.py", *arguments])
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "trainer.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "loss on 8 rows" in printed
    assert "tuned:" in printed
    assert load_prompt("runs/trainer/prompt").num_virtual_tokens == 8
