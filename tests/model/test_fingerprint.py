"""Fingerprints: the same model fits in any precision, and whatever changes its answers is noticed and named."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from softprompt.model.fingerprint import Fingerprint, difference, fingerprint
from softprompt.model.frozen import FrozenModel
from softprompt.model.load import load_model
from tiny_models import ARCHITECTURES, frozen, tiny_model
from tiny_runs import Command
from tiny_tokenizers import tiny_tokenizer

PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)


def as_frozen(hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None) -> FrozenModel:
    """A model whose fingerprint alone is wanted: its backend is not checked."""
    backend: Any = None
    return FrozenModel(hf_model, tokenizer or tiny_tokenizer(), backend, "tiny")


def fingerprint_of(hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None) -> Fingerprint:
    """A fingerprint as a file gives it back."""
    return Fingerprint.model_validate_json(fingerprint(as_frozen(hf_model, tokenizer)).model_dump_json())


def said(before: Fingerprint, now: Fingerprint) -> str:
    """What differs, all of it."""
    return "; ".join(f"{what} ({', '.join(names)})" for what, names in before.differences(now).items())


def merged(hf_model: PreTrainedModel, names: str, relative: float, dtype: torch.dtype) -> PreTrainedModel:
    """A model with a LoRA of rank 8 merged into the weights of some names, which changes them by so much on average."""
    changed = copy.deepcopy(hf_model).to(dtype)
    for name, weight in changed.named_parameters():
        if names in name:
            delta = torch.randn(weight.shape[0], 8) @ torch.randn(8, weight.shape[1])
            delta *= relative * weight.float().norm() / delta.norm()
            weight.data = (weight.float() + delta).to(dtype)
    return changed


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "bloom", "mixtral", "opt"])
@pytest.mark.parametrize("original", PRECISIONS)
def test_the_same_model_fits_in_every_precision(architecture: str, original: torch.dtype) -> None:
    model = tiny_model(architecture).to(original)
    prints = [fingerprint_of(copy.deepcopy(model).to(precision)) for precision in PRECISIONS]
    # Rounded twice, as where a float16 copy is loaded in bfloat16.
    prints.append(fingerprint_of(copy.deepcopy(model).half().bfloat16()))
    for before in prints:
        for now in prints:
            assert not before.differences(now)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_change_to_any_one_weight_of_any_architecture_is_named(architecture: str) -> None:
    model = tiny_model(architecture)
    before = fingerprint_of(model)
    lm_head = model.get_output_embeddings().weight
    for name, weight in model.named_parameters():
        if weight.numel() == 0:
            continue
        original = weight.detach().clone()
        weight.data.mul_(1.02).add_(0.001)
        differs = said(before, fingerprint(as_frozen(model)))
        assert name in differs or (weight is lm_head and "head" in differs)
        weight.data.copy_(original)
    assert not before.differences(fingerprint(as_frozen(model)))


@pytest.mark.parametrize("names", ["layers.1.self_attn.q_proj", "layers.0.mlp.down_proj", "lm_head"])
@pytest.mark.parametrize("relative", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_lora_merged_into_a_single_matrix_is_noticed(names: str, relative: float, precision: torch.dtype) -> None:
    """Of a model that stays in one precision; in bfloat16 a thousandth changes a fifth of the values."""
    torch.manual_seed(3)
    model = tiny_model("llama").to(precision)
    differs = said(fingerprint_of(model), fingerprint_of(merged(model, names, relative, precision)))
    assert names in differs or (names, "head" in differs) == ("lm_head", True)


@pytest.mark.parametrize("relative", [1e-1, 1e-2, 3e-3])
@pytest.mark.parametrize(
    ("before", "now"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)],
)
def test_a_lora_merged_into_each_layer_is_noticed_across_precisions(
    relative: float, before: torch.dtype, now: torch.dtype
) -> None:
    torch.manual_seed(3)
    model = tiny_model("llama").to(before)
    for names in ("q_proj", "down_proj"):
        assert fingerprint_of(model).differences(fingerprint_of(merged(model, names, relative, now)))


def test_a_layer_that_is_another_models_is_noticed() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    before = fingerprint_of(model)
    torch.manual_seed(1)
    for weight in other.model.layers.parameters():
        weight.data.normal_(0, 0.06)
    assert said(before, fingerprint_of(other)).startswith("its weights (model.layers.0")


def test_tied_weights_are_the_same_as_their_untied_copy() -> None:
    shape = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tied = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, tie_word_embeddings=True))
    untied = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, tie_word_embeddings=False))
    untied.load_state_dict(tied.state_dict())
    assert not fingerprint_of(tied).differences(fingerprint_of(untied))
    assert not fingerprint_of(untied).differences(fingerprint_of(tied))
    untied.lm_head.weight.data.mul_(1.1)
    assert said(fingerprint_of(tied), fingerprint_of(untied)) == "its weights (head)"


def test_a_weight_that_only_one_side_has_is_noticed_but_not_a_renamed_one() -> None:
    model = tiny_model("llama")
    before = fingerprint_of(model)
    more = before.model_copy(update={"weights": {**before.weights, "model.layers.0.lora_A": "AAAAAA=="}})
    assert said(before, more) == "its weights (model.layers.0.lora_A)"
    assert said(more, before) == "its weights (model.layers.0.lora_A)"
    renamed = {name.replace("self_attn", "attention"): value for name, value in before.weights.items()}
    assert not before.differences(before.model_copy(update={"weights": renamed}))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters.rope_theta"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, "rope_parameters.rope_type"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps was 1e-06 and is 0.001"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
    ],
)
def test_a_setting_that_changes_answers_is_named(settings: dict[str, Any], named: str) -> None:
    differs = said(fingerprint_of(tiny_model("llama")), fingerprint_of(tiny_model("llama", **settings)))
    assert named in differs
    assert differs.startswith(("its configuration (", "its architecture or size ("))


def test_windows_and_scalings_of_other_architectures_are_settings_too() -> None:
    for architecture, settings in [
        ("mistral", {"sliding_window": 9}),
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"attn_logit_softcapping": 20.0}),
        ("granite", {"logits_scaling": 4.0}),
        ("gpt-oss", {"max_position_embeddings": 512}),  # YaRN scales by it
    ]:
        assert fingerprint_of(tiny_model(architecture)).differences(
            fingerprint_of(tiny_model(architecture, **settings))
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"pad_token_id": 7},
        {"use_cache": False},
        {"attention_dropout": 0.1},
        {"initializer_range": 0.5},
        {"transformers_version": "5.10.0", "_name_or_path": "elsewhere", "architectures": ["X"]},
        {"max_position_embeddings": 512},
        {"eos_token_id": [2, 3]},
        {"a_field_of_a_newer_transformers": 5},
    ],
)
def test_a_setting_that_changes_no_answer_does_not_refuse(settings: dict[str, Any]) -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    for name, value in settings.items():
        setattr(other.config, name, value)
    assert not fingerprint_of(model).differences(fingerprint_of(other))
    assert not fingerprint_of(other).differences(fingerprint_of(model))


def changed(change: Callable[[PreTrainedTokenizerFast], object]) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    change(tokenizer)
    return tokenizer


def fewer_merges(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["model"]["merges"].pop()
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(parts))


def swapped_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = parts["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(parts))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.Lowercase()), "normalizer"),
        (lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.Replace("zzz", "")), "normalizer"),
        (lambda t: setattr(t.backend_tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel()), "pre_tokenizer"),
        (
            lambda t: setattr(
                t.backend_tokenizer,
                "post_processor",
                processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)]),
            ),
            "post_processor",
        ),
        (lambda t: t.add_tokens([AddedToken("fine film")]), "added tokens"),
        (lambda t: setattr(t, "eos_token", "<bos>"), "end of text"),
        (fewer_merges, "merges"),
        (swapped_ids, "vocabulary"),
    ],
)
def test_what_changes_ids_in_a_tokenizer_is_named(
    change: Callable[[PreTrainedTokenizerFast], object], named: str
) -> None:
    model = tiny_model("llama")
    differs = said(fingerprint_of(model), fingerprint_of(model, changed(change)))
    assert differs.startswith("its tokenizer (")
    assert named in differs


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.add_special_tokens({"pad_token": "<|padding|>"}),
        lambda t: setattr(t, "pad_token", "<eos>"),
        lambda t: setattr(t, "pad_token", None),
        lambda t: t.backend_tokenizer.enable_padding(length=20),
        lambda t: t.backend_tokenizer.enable_truncation(20),
        lambda t: setattr(t, "padding_side", "left"),
        lambda t: setattr(t, "model_max_length", 100),
    ],
)
def test_what_changes_no_ids_does_not_refuse(change: Callable[[PreTrainedTokenizerFast], object]) -> None:
    model = tiny_model("llama")
    before, now = fingerprint_of(model), fingerprint_of(model, changed(change))
    assert not before.differences(now)
    assert not now.differences(before)


def test_a_newer_librarys_further_settings_do_not_refuse() -> None:
    before = fingerprint_of(tiny_model("llama"))
    newer = json.loads(before.model_dump_json())
    newer["tokenizer"]["pre_tokenizer"]["a_new_one"] = True
    newer["tokenizer"]["a_new_part"] = "x"
    assert not before.differences(Fingerprint(**newer))


@pytest.mark.parametrize(
    "damage",
    [
        {"weights": {"a": "no base64!"}},
        {"weights": {"a": "AAA="}},
        {"weights": {"a": 5}},
        {"skipped": -1},
        {"version": 3},
        {"embeddings": [0.0]},
        {"configuration": "x"},
    ],
)
def test_a_damaged_fingerprint_is_refused_when_it_is_read(damage: dict[str, Any]) -> None:
    whole = json.loads(fingerprint_of(tiny_model("llama")).model_dump_json())
    with pytest.raises(ValidationError):
        Fingerprint(**{**whole, **damage})


def test_the_chat_template_counts_where_it_is_used() -> None:
    other = changed(lambda t: setattr(t, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}"))
    before, now = fingerprint_of(tiny_model("llama")), fingerprint_of(tiny_model("llama"), other)
    assert not before.differences(now)
    assert before.differences(now, chat_template=True).keys() == {"its chat template"}


def test_a_folder_gives_the_fingerprint_of_what_was_saved(llama: FrozenModel, llama_folder: Path) -> None:
    assert fingerprint(load_model(llama_folder)) == fingerprint(llama)


def test_weights_that_cannot_be_read_are_counted_and_said() -> None:
    model = tiny_model("llama")
    before = fingerprint_of(model)
    model.model.layers[1].to("meta")
    now = as_frozen(model)
    assert fingerprint(now).skipped == 9
    with pytest.warns(UserWarning, match="9 of the weights of tiny are quantized or not on the device"):
        assert difference(before, now) is None


def test_a_fingerprint_takes_a_millisecond_or_two() -> None:
    """It is computed at every request. On a busy machine the quickest of many counts."""
    shape = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 30}
    model = as_frozen(LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4)))
    seconds = []
    for _ in range(30):
        began = time.perf_counter()
        fingerprint(model)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 3e-3


def test_a_prompt_is_refused_on_a_model_with_a_lora_merged_in(
    fails: Command, command: Command, llama_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    short = ["--set", "max_steps=1", "--set", "eval_rows=0", "--set", "num_virtual_tokens=3"]
    assert command("tune", reviews, "--model", llama_folder, "--out", "run", *short).code == 0
    other = tmp_path / "merged"
    merged(frozen("llama").hf_model, "layers.2.mlp.down_proj", 1e-2, torch.float32).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    done = fails("evaluate", "run/prompt", reviews, "--model", other)
    assert "is another model: its weights differs (model.layers.2.mlp.down_proj.weight)." in done.err
    done = fails("tune", reviews, "--model", other, "--out", "run", "--resume")
    assert (
        "the base model of run is another: its weights differs (model.layers.2.mlp.down_proj.weight); resume"
        in done.err
    )
