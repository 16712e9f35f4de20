"""What is given as a model and is none, or not a whole one; and where a prompt's model is looked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from softprompt.errors import ModelError, PromptError
from softprompt.model.fingerprint import fingerprint
from softprompt.model.fingerprint_v1 import first_fingerprint
from softprompt.model.frozen import FrozenModel
from softprompt.model.load import load_model, require_complete
from softprompt.prompt.base_model import BaseModelRecord, base_model_record
from softprompt.prompt.loading import load_soft_prompt
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import SoftPrompt
from tiny_models import tiny_model
from tiny_runs import Command
from tiny_tokenizers import tiny_tokenizer

SHAPE = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
SHORT = ["--set", "max_steps=1", "--set", "eval_rows=0", "--set", "num_virtual_tokens=3"]


def config(tied: bool = False) -> LlamaConfig:
    return LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)


def saved(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)
    return folder


def weights_changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("kind", "tied", "named"),
    [
        (LlamaForSequenceClassification, False, "lacks lm_head.weight and has score.weight"),
        (LlamaForSequenceClassification, True, "has score.weight"),
        (LlamaModel, False, "lacks lm_head.weight"),
    ],
)
def test_a_checkpoint_of_another_kind_of_model_is_refused(
    kind: type[torch.nn.Module], tied: bool, named: str, fails: Command, reviews: Path, tmp_path: Path
) -> None:
    folder = saved(kind(config(tied)), tmp_path / "model")
    done = fails("evaluate", "none", reviews, "--model", folder)
    assert named in done.err
    assert "Give the causal language model that it came from" in done.err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)}),
            "has model.layers.2.mlp.up_proj.weight, which a causal language model of this kind does not use",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
            "has model.layers.0.self_attn.",
        ),
        (lambda t: t.update({"v_head.summary.weight": torch.zeros(1, 32)}), "has v_head.summary.weight"),
    ],
)
def test_weights_that_are_missing_or_unused_are_named(
    change: Callable[[dict[str, torch.Tensor]], object], named: str, tmp_path: Path
) -> None:
    folder = weights_changed(saved(LlamaForCausalLM(config()), tmp_path / "model"), change)
    with pytest.raises(ModelError, match=named):
        load_model(folder)


def test_what_a_text_never_goes_through_may_be_unused(tmp_path: Path) -> None:
    more = {
        "vision_tower.blocks.0.weight": torch.zeros(2, 2),
        "multi_modal_projector.weight": torch.zeros(2, 2),
        "model.mtp.layers.0.weight": torch.zeros(2, 2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    folder = weights_changed(saved(LlamaForCausalLM(config()), tmp_path / "model"), lambda t: t.update(more))
    load_model(folder)


def test_tied_weights_need_no_head_and_a_sharded_checkpoint_is_whole(tmp_path: Path) -> None:
    whole = LlamaForCausalLM(config(tied=True))
    saved(whole.model, tmp_path / "body")  # no prefix in its names, and no head
    before = fingerprint(load_model(saved(whole, tmp_path / "whole")))
    assert not before.differences(fingerprint(load_model(tmp_path / "body")))
    whole.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert not before.differences(fingerprint(load_model(tmp_path / "shards")))
    next((tmp_path / "shards").glob("*-of-*.safetensors")).unlink()
    with pytest.raises(ModelError, match="cannot load"):
        load_model(tmp_path / "shards")


def test_names_of_weights_beyond_three_are_counted() -> None:
    report = {"missing_keys": {f"model.layers.{i}.weight" for i in range(9)}, "unexpected_keys": set[str]()}
    with pytest.raises(ModelError, match=r"M lacks model.layers.0.weight, .*2.weight and 6 more weights: it was saved"):
        require_complete("M", report, quantized=False)
    require_complete("M", {"missing_keys": set(), "unexpected_keys": {"model.absmax"}}, quantized=True)


def test_pickled_weights_are_never_read(fails: Command, llama_folder: Path, reviews: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(llama_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    done = fails("evaluate", "none", reviews, "--model", folder)
    assert "pytorch_model.bin is a pickle, which can run code and is never read" in done.err
    assert "save_pretrained(NEW)" in done.err
    # The cure that the message names.
    AutoModelForCausalLM.from_pretrained(str(folder), use_safetensors=False).save_pretrained(tmp_path / "new")
    tiny_tokenizer().save_pretrained(tmp_path / "new")
    load_model(tmp_path / "new")


def lora(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "team/x"}))


def pulled(folder: Path, source: Path, *names: str) -> None:
    for name in names:
        shutil.copy(source / name, folder / name)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda f, _: None, "is empty"),
        (lambda f, _: lora(f), "holds a LORA adapter for team/x, not a whole model. Give the base model, or merge"),
        (
            lambda f, s: (lora(f), pulled(f, s, "config.json", "model.safetensors")),
            "holds a LORA adapter beside the model",
        ),
        (lambda f, _: (f / "softprompt.json").write_text("{}"), "is a prompt, not a base model"),
        (lambda f, _: (f / "ensemble.json").write_text("{}"), "is a prompt, not a base model"),
        (lambda f, _: (f / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}'), "is a prompt, not a"),
        (lambda f, _: ((f / "config.yaml").touch(), (f / "prompt").mkdir()), "is a run, not a base model; its prompt"),
        (lambda f, _: (f / "a.gguf").touch(), "it holds GGUF files; give one of them, such as"),
        (lambda f, s: pulled(f, s, "model.safetensors"), "it holds weights alone; put config.json"),
        (lambda f, s: pulled(f, s, "tokenizer.json"), "it holds a tokenizer, but no model"),
        (lambda f, s: shutil.copytree(s, f / "checkpoint-5"), "the models are inside; give "),
        (lambda f, s: pulled(f, s, "config.json", "tokenizer.json"), "holds no weights as safetensors; the download"),
        (lambda f, s: pulled(f, s, "config.json", "model.safetensors"), "but no tokenizer. Put that of the model"),
    ],
)
def test_a_folder_that_is_no_model_is_called_what_it_is(
    made: Callable[[Path, Path], object], said: str, fails: Command, llama_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    made(folder, llama_folder)
    done = fails("evaluate", "none", reviews, "--model", folder)
    assert said in done.err
    assert not done.err.rstrip().endswith(":")


def test_a_file_is_no_model(llama_folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file; give the folder that it is in"):
        load_model(llama_folder / "model.safetensors")


def test_a_home_folder_is_found(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(llama_folder.parent))
    model = load_model(f"~/{llama_folder.name}")
    assert base_model_record(model).path == str(llama_folder)


def test_a_prompt_of_a_relative_model_is_used_from_anywhere(
    command: Command,
    fails: Command,
    llama_folder: Path,
    reviews: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(llama_folder, tmp_path / "models" / "tiny")
    assert command("tune", reviews, "--model", "models/tiny", "--out", "run", *SHORT).code == 0
    record = json.loads((tmp_path / "run/prompt/softprompt.json").read_text())["base_model"]
    assert (record["id"], record["path"]) == ("models/tiny", str(tmp_path / "models" / "tiny"))
    card = (tmp_path / "run/prompt/README.md").read_text()
    assert str(tmp_path) not in card
    assert "base_model: tiny\n" in card
    adapter = json.loads((tmp_path / "run/prompt/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == record["path"]  # as PEFT would look for it

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert command("evaluate", tmp_path / "run/prompt", reviews).code == 0
    shutil.move(tmp_path / "models" / "tiny", tmp_path / "moved")
    done = fails("evaluate", tmp_path / "run/prompt", reviews)
    assert f"the prompt was trained on {record['path']}, a folder or file that is not here" in done.err
    assert "give its path with --model" in done.err
    assert command("evaluate", tmp_path / "run/prompt", reviews, "--model", tmp_path / "moved").code == 0
    # On another machine it may lie where its name says.
    shutil.copytree(tmp_path / "moved", elsewhere / "models" / "tiny")
    assert command("evaluate", tmp_path / "run/prompt", reviews).code == 0


def test_an_old_record_that_names_a_folder_is_never_asked_for_on_the_hub(llama: FrozenModel) -> None:
    first = first_fingerprint(llama)
    for name in ("tiny", "models/tiny", "../models/tiny", "C:\\models\\tiny", "/models/tiny", "~/tiny"):
        with pytest.raises(
            PromptError,
            match=r"trained on .*tiny, a folder or file that is not here; give its path with --model",
        ):
            BaseModelRecord(id=name, fingerprint=first).resolve()
    assert BaseModelRecord(id="team/tiny", revision="1" * 40, fingerprint=first).resolve() == "team/tiny"
    assert BaseModelRecord(id="smollm2-135m", fingerprint=first).resolve() == "smollm2-135m"
    assert BaseModelRecord(id="team/tiny").resolve() == "team/tiny"  # a prompt that PEFT wrote


@pytest.mark.parametrize(
    ("name", "path", "shown"),
    [
        ("team/tiny", None, "team/tiny"),
        ("models/tiny", "/home/me/models/tiny", "tiny"),
        ("C:\\models\\tiny", None, "tiny"),
        ("tiny", "C:\\models\\tiny\\", "tiny"),
        ("/home/me/tiny/", None, "tiny"),
        ("smollm2-135m", None, "smollm2-135m"),
    ],
)
def test_others_read_a_folders_own_name_alone(name: str, path: str | None, shown: str) -> None:
    assert BaseModelRecord(id=name, path=path).name == shown


def test_a_folder_that_peft_saved_under_an_adapters_name_is_pointed_at(llama: FrozenModel, tmp_path: Path) -> None:
    record = Record(base_model=base_model_record(llama))
    SoftPrompt(torch.zeros(3, 32), record).save(tmp_path / "saved" / "mytask")
    with pytest.raises(PromptError, match=r"adapter_config.json is missing; did you mean .*saved/mytask\?"):
        load_soft_prompt(tmp_path / "saved")
    SoftPrompt(torch.zeros(3, 32), record).save(tmp_path / "saved" / "other")
    with pytest.raises(PromptError, match=r"did you mean .*saved/mytask or .*saved/other\?"):
        load_soft_prompt(tmp_path / "saved")


@pytest.mark.parametrize(
    ("named", "warned"),
    [("team/other-model", True), ("OTHER", True), ("team/tiny-llama", False), ("SAME", False), ("", False)],
)
def test_importing_to_another_model_than_the_adapter_names_is_warned_about(
    named: str, warned: bool, command: Command, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path / "home"))
    other = saved(tiny_model("qwen2"), tmp_path / "tiny-llama")
    name = {"OTHER": str(other), "SAME": str(llama_folder)}.get(named, named)
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file({"prompt_embeddings": torch.zeros(3, 32)}, folder / "adapter_model.safetensors")
    adapter = {"peft_type": "PROMPT_TUNING", "base_model_name_or_path": name, "num_virtual_tokens": 3}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    done = command("prompts", "import", "mine", folder, "--model", llama_folder)
    assert done.code == 0, done.err
    assert (f"warning: {folder} names {name} as its base model" in done.err) == warned
