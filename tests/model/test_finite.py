"""Numbers that are not finite are said to be so, with what helps; none is decoded or scored in silence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from softprompt.config import GenerateConfig
from softprompt.data.rows import load_data
from softprompt.decoding import continue_ids
from softprompt.errors import ModelError, RunError
from softprompt.evaluation.evaluate import evaluate
from softprompt.model.backends import decode
from softprompt.model.backends.verify import freeze
from softprompt.model.frozen import FrozenModel
from tiny_models import as_prompt, tiny_model
from tiny_runs import Command
from tiny_tokenizers import tiny_tokenizer

WEIGHT = "model.layers.1.mlp.down_proj.weight"
RULES = [{}, {"do_sample": True}, {"do_sample": True, "temperature": 0.5, "top_k": 5}, {"num_beams": 3}]
CHOICES = ["greedy", "drawn", "drawn from a few", "beams"]


def damaged(value: float, dtype: torch.dtype = torch.float32, weight: str = WEIGHT) -> PreTrainedModel:
    model = tiny_model("llama")
    model.get_parameter(weight).data[0, 0] = value
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_checkpoint_that_holds_nan_is_refused_by_the_name_of_the_weight(dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match=f"not finite: its weight {re.escape(WEIGHT)}") as found:
        freeze(damaged(float("nan"), dtype), tiny_tokenizer())
    assert "the checkpoint is damaged" in str(found.value)
    assert "recurrent" not in str(found.value)


def test_weights_beyond_half_precision_say_which_precision_helps() -> None:
    freeze(damaged(7e4), tiny_tokenizer())
    freeze(damaged(7e4, torch.bfloat16), tiny_tokenizer())
    with pytest.raises(ModelError, match=r"infinite values in float16: try --set dtype=bfloat16 or dtype=float32"):
        freeze(damaged(7e4, torch.float16), tiny_tokenizer())


def test_results_beyond_half_precision_say_so_too() -> None:
    model = tiny_model("gpt2")
    for parameter in model.transformer.h[0].mlp.parameters():
        parameter.data.mul_(2000)
    freeze(model, tiny_tokenizer())
    with pytest.raises(ModelError, match="weights are finite, but what it computes goes beyond float16: try --set"):
        freeze(model.to(torch.float16), tiny_tokenizer())


def test_the_command_says_so_in_one_message(tmp_path: Path, fails: Command) -> None:
    damaged(float("nan")).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    done = fails("generate", "none", "good", "--model", tmp_path / "m")
    assert f"its weight {WEIGHT} holds NaN" in done.err


@pytest.fixture
def spoilt() -> FrozenModel:
    """Loaded whole; one token's embedding is NaN, which the load check does not come across."""
    model = freeze(tiny_model("llama"), tiny_tokenizer())
    model.hf_model.get_input_embeddings().weight.data[399] = float("nan")
    return model


@pytest.mark.parametrize("rules", RULES, ids=CHOICES)
def test_logits_that_are_not_finite_are_not_decoded(spoilt: FrozenModel, rules: dict[str, object]) -> None:
    inputs = [[5, 6, 7], [5, 399]]
    assert continue_ids(spoilt, as_prompt(None), inputs[:1], [4], GenerateConfig(**rules))
    with pytest.raises(RunError, match=r"logits are not finite: its weight model\.embed_tokens\.weight holds NaN"):
        continue_ids(spoilt, as_prompt(None), inputs, [4, 4], GenerateConfig(**rules))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rules", RULES, ids=CHOICES)
def test_nor_are_those_that_become_so_later(
    llama: FrozenModel, value: float, rules: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the third pass: all of a row, or one of it where that spoils the row."""
    step, passes = decode.SharedCacheBatch.step, []

    def later(self: decode.SharedCacheBatch, tokens: list[int]) -> torch.Tensor:
        passes.append(1)
        logits = step(self, tokens)
        if len(passes) == 2:
            logits[0, ... if value == -float("inf") else 7] = value
        return logits

    monkeypatch.setattr(decode.SharedCacheBatch, "step", later)
    with pytest.raises(RunError, match="logits are not finite: its weights are finite, but"):
        continue_ids(llama, as_prompt(None), [[5, 6, 7]], [9], GenerateConfig(**rules))


@pytest.mark.parametrize("rules", RULES, ids=CHOICES)
def test_single_tokens_may_be_ruled_out_by_the_model(rules: dict[str, object]) -> None:
    model = freeze(tiny_model("llama"), tiny_tokenizer())
    ruled_out = torch.arange(400) >= 250

    def lm_head(_module: object, _args: object, logits: torch.Tensor) -> torch.Tensor:
        return logits.masked_fill(ruled_out, -torch.inf)

    model.hf_model.get_output_embeddings().register_forward_hook(lm_head)
    (text,) = continue_ids(model, as_prompt(None), [[5, 6, 7]], [6], GenerateConfig(**rules))
    assert text


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-40, 1e-60])
def test_the_coldest_draw_is_the_likeliest_token(llama: FrozenModel, temperature: float) -> None:
    inputs = [[5, 6, 7], [8]]
    drawn = GenerateConfig(do_sample=True, temperature=temperature)
    assert continue_ids(llama, as_prompt(None), inputs, [6, 6], drawn) == continue_ids(
        llama, as_prompt(None), inputs, [6, 6], GenerateConfig()
    )


@pytest.mark.parametrize("task", ["classification", "text", "completion"])
def test_scores_that_are_not_finite_are_none(task: str) -> None:
    rows: list[dict[str, str]] = {
        "classification": [{"text": "a film", "label": "good"}, {"text": "a dull film", "label": "bad"}],
        "text": [{"text": "a film"}, {"text": "a dull film"}],
        "completion": [{"input": "a film", "target": "good"}, {"input": "a dull film", "target": "bad"}],
    }[task]
    model = freeze(tiny_model("llama"), tiny_tokenizer())
    done = evaluate(model, load_data(rows), None)
    assert "NaN" not in json.dumps(done.predictions)
    for token in model.tokenizer(" dull")["input_ids"]:
        model.hf_model.get_input_embeddings().weight.data[token] = float("nan")
    with pytest.raises(RunError, match=r"finite: its weight model\.embed_tokens\.weight holds NaN"):
        evaluate(model, load_data(rows), None)
