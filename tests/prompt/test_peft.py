"""PEFT reads a saved prompt as it is, and generates the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from softprompt.config import GenerateConfig
from softprompt.errors import PromptError
from softprompt.generation import generate
from softprompt.prompt.base_model import base_model_record
from softprompt.prompt.loading import load_prompt
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.training.hf_module import TrainablePrompt
from tiny_models import frozen, tiny_model
from tiny_tokenizers import tiny_tokenizer


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_peft_loads_a_saved_prompt_and_gives_the_same_greedy_tokens(architecture: str, tmp_path: Path) -> None:
    model = frozen(architecture)
    embeddings = torch.randn(6, model.embedding_width, generator=torch.Generator().manual_seed(5)) * 0.3
    prompt = SoftPrompt(embeddings, Record(base_model=base_model_record(model)))
    prompt.save(tmp_path / "prompt")

    peft_model = PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "prompt")
    assert torch.equal(peft_model.prompt_encoder["default"].embedding.weight, embeddings)
    text = "the parcel never came and"
    ids = model.tokenizer(text, return_tensors="pt")
    whole = peft_model.generate(**ids, max_new_tokens=16, do_sample=False)[0]
    expected = model.tokenizer.decode(whole[ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert generate(model, [text], prompt, GenerateConfig(max_new_tokens=16)) == [expected]


def test_a_prompt_that_peft_saved_is_read_with_a_warning(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5)
    peft_model = get_peft_model(tiny_model("llama"), config)
    peft_model.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="cannot be checked"):
        prompt = load_prompt(tmp_path / "theirs")
    assert torch.equal(prompt.weights, peft_model.prompt_encoder["default"].embedding.weight.detach())
    model = frozen("llama")
    ids = model.tokenizer("hello", return_tensors="pt")
    whole = peft_model.generate(**ids, max_new_tokens=8, do_sample=False)[0]
    expected = model.tokenizer.decode(whole[ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert generate(model, ["hello"], prompt, GenerateConfig(max_new_tokens=8)) == [expected]


def test_a_saved_prompt_comes_back_as_it_was(tmp_path: Path) -> None:
    model = frozen("llama")
    record = Record(
        base_model=base_model_record(model),
        task="classification",
        template="{{ text }}\nIs it ä good?",
        verbalizers={"1": "yes", "0": "no"},
        metrics={"accuracy": 0.5},
    )
    prompt = SoftPrompt(torch.randn(3, model.embedding_width), record)
    prompt.save(tmp_path / "one")
    again = load_prompt(tmp_path / "one")
    assert torch.equal(again.weights, prompt.weights)
    assert again.record == record
    again.save(tmp_path / "two")
    for name in ("adapter_model.safetensors", "adapter_config.json", "softprompt.json", "README.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "\n3 virtual tokens" in (tmp_path / "one" / "README.md").read_text()


TEXTS = ["the parcel never came and I want my money back", "a fine film", "hello world what a waste of time", "good"]


def trained_by_peft(architecture: str, config: PeftConfig) -> PeftModel:
    """A prompt after a few steps of a plain loop."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(architecture), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    batch = tiny_tokenizer()(TEXTS, return_tensors="pt", padding=True)
    for _ in range(4):
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("init", ["RANDOM", "SAMPLE_VOCAB", "TEXT", "P_TUNING"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
@torch.no_grad()
def test_a_prompt_that_peft_trained_gives_the_same_logits(architecture: str, init: str, tmp_path: Path) -> None:
    """However its rows are padded here; there they are padded on the right, which PEFT gets right."""
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    usual = {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": 5}
    if init == "P_TUNING":
        config: PeftConfig = PromptEncoderConfig(**usual, encoder_hidden_size=16)
    else:
        text = {"prompt_tuning_init_text": "good or bad", "tokenizer_name_or_path": str(tmp_path / "tokenizer")}
        config = PromptTuningConfig(**usual, prompt_tuning_init=init, **(text if init == "TEXT" else {}))
    with torch.enable_grad():
        peft_model = trained_by_peft(architecture, config)
    peft_model.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="cannot be checked"):
        prompt = load_prompt(tmp_path / "theirs")
    ours = TrainablePrompt(frozen(architecture), prompt.weights)
    tokenizer = tiny_tokenizer()
    right = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    expected = peft_model(**right).logits[:, 5:]
    real = right["attention_mask"].bool()
    assert not torch.allclose(expected[real], tiny_model(architecture)(**right).logits[real], atol=0.1)

    found = {"right": ours(**right).logits[real]}
    left = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    found["left"] = ours(**left).logits[left["attention_mask"].bool()]
    alone = [ours(**tokenizer([text], return_tensors="pt")).logits[0] for text in TEXTS]
    found["one at a time"] = torch.cat(alone)
    for logits in found.values():
        assert (logits - expected[real]).norm() / expected[real].norm() < 1e-4


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (IA3Config(task_type=TaskType.CAUSAL_LM, target_modules=["k_proj"], feedforward_modules=[]), "IA3"),
        (LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, target_modules=["q_proj"]), "LORA"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(config: PeftConfig, kind: str, tmp_path: Path) -> None:
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(
        PromptError, match=f"holds a {kind} adapter; softprompt reads PROMPT_TUNING, P_TUNING, PREFIX_TUNING"
    ):
        load_prompt(tmp_path)


def test_a_prompt_of_an_encoder_decoder_model_is_refused(tmp_path: Path) -> None:
    get_peft_model(
        tiny_model("llama"), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5)
    ).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_transformer_submodules": 2}))
    with pytest.raises(PromptError, match="is for an encoder-decoder model"):
        load_prompt(tmp_path)


def test_weights_beside_the_virtual_tokens_are_refused(tmp_path: Path) -> None:
    """PEFT's `modules_to_save`: without them the prompt would give something else."""
    model = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5))
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(weights), "lm_head.weight": torch.zeros(4, 4)}, weights)
    with pytest.raises(PromptError, match="must hold one tensor 'prompt_embeddings', it holds lm_head"):
        load_prompt(tmp_path)


def test_the_revision_that_peft_names_is_the_base_models(tmp_path: Path) -> None:
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5, base_model_name_or_path="some/model", revision="v1.0"
    )
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="cannot be checked"):
        assert load_prompt(tmp_path / "theirs").record.base_model.revision == "v1.0"
