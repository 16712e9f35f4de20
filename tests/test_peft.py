"""PEFT reads a saved prompt as it is, and generates the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model

from conftest import frozen, tiny_model
from softprompt.config import GenerateConfig
from softprompt.generation import generate
from softprompt.prompt.soft_prompt import Record, SoftPrompt, base_model_record, load_prompt


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
    assert torch.equal(prompt.embeddings, peft_model.prompt_encoder["default"].embedding.weight.detach())
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
    assert torch.equal(again.embeddings, prompt.embeddings)
    assert again.record == record
    again.save(tmp_path / "two")
    for name in ("adapter_model.safetensors", "adapter_config.json", "softprompt.json", "README.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "\n3 virtual tokens" in (tmp_path / "one" / "README.md").read_text()
