"""On a GPU: what it gives is what the CPU gives, and a run ends where the GPU's memory does."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from references import relative
from softprompt import Callback, SoftPrompt, TuneConfig, load_data, load_prompt, tune
from softprompt.config import GenerateConfig
from softprompt.data.example import Example
from softprompt.decoding import continue_ids
from softprompt.model.backends.verify import freeze
from softprompt.model.frozen import FrozenModel
from softprompt.model.gradient import prompt_gradient
from tiny_data import TEXTS, examples_of
from tiny_models import ARCHITECTURES, as_prompt, frozen, tiny_model, tiny_prompt
from tiny_runs import SHORT, Command
from tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


def on_gpu(architecture: str) -> FrozenModel:
    return freeze(tiny_model(architecture).to("cuda"), tiny_tokenizer(), f"tiny-{architecture}")


@pytest.mark.parametrize("learned", ["soft prompt", "prefix"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradient_are_those_of_the_cpu(architecture: str, learned: str) -> None:
    here, there = frozen(architecture), on_gpu(architecture)
    assert type(here.backend) is type(there.backend)
    prompt = tiny_prompt(here)
    prompt = here.prefix(prompt).stacked().detach() if learned == "prefix" else prompt
    examples: list[list[Example]] = [examples_of("mixed lengths")]
    loss, gradient = prompt_gradient(here, prompt, (), examples)
    theirs, gpu_gradient = prompt_gradient(there, prompt, (), examples)
    assert theirs == pytest.approx(loss, rel=1e-4)
    assert relative(gpu_gradient.cpu(), gradient) < 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generated_text_is_that_of_the_cpu(architecture: str) -> None:
    here, there = frozen(architecture), on_gpu(architecture)
    inputs = [here.tokenizer(text)["input_ids"] for text in TEXTS]
    config, prompt = GenerateConfig(), tiny_prompt(here)
    made = [continue_ids(model, as_prompt(prompt), inputs, [12, 3, 12, 7, 1, 12], config) for model in (here, there)]
    assert made[0] == made[1]


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_commands_run(command: Command, reviews: Path, llama_folder: Path, method: str, dtype: str) -> None:
    base = ["--model", llama_folder, "--set", "device=cuda", "--set", f"dtype={dtype}"]
    done = command("tune", reviews, *base, "--out", "run", "--json", *SHORT, "--set", f"method={method}")
    assert done.code == 0, done.err
    scored = command("evaluate", "run/prompt", reviews, "--json")
    assert scored.code == 0, scored.err
    written = command("generate", "run/prompt", "a fine film")
    assert written.code == 0, written.err


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_a_run_that_was_interrupted_goes_on(
    method: Literal["prompt-tuning", "prefix-tuning"], reviews: Path, tmp_path: Path
) -> None:
    model, rows = on_gpu("llama"), load_data(reviews)
    config = TuneConfig(max_steps=6, batch_size=4, num_virtual_tokens=5, eval_every=3, method=method)

    class Interrupts(Callback):
        def step(self, step: int, loss: float) -> None:
            if step == 4:
                raise KeyboardInterrupt

    whole = tune(model, rows, config, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        tune(model, rows, config, out=tmp_path / "cut", callback=Interrupts())
    assert tune(model, rows, None, out=tmp_path / "cut", resume=True).steps == 6
    resumed = load_prompt(tmp_path / "cut" / "prompt")
    assert isinstance(resumed, SoftPrompt)
    assert relative(resumed.weights, whole.prompt.weights.cpu()) < 1e-3


def test_all_methods_are_compared(command: Command, reviews: Path, llama_folder: Path) -> None:
    methods = "zero-shot,few-shot,prompt-tuning,prefix-tuning,lora,full"
    base = ["--model", llama_folder, "--set", "device=cuda", "--set", "max_minutes=0.02"]
    done = command("compare", reviews, *base, "--methods", methods, "--out", "compared", "--json")
    assert done.code == 0, done.err


def test_where_memory_runs_out_micro_batches_are_halved() -> None:
    """Really: the process may take a little more than what is there before the first step."""
    model, smaller = on_gpu("llama"), list[int]()

    class Noted(Callback):
        def micro_batch_reduced(self, step: int, micro_batch_tokens: int) -> None:
            smaller.append(micro_batch_tokens)

    rows = load_data(
        [{"text": f"the parcel never came {i} " * 15, "label": "good" if i % 2 else "bad"} for i in range(64)]
    )
    settings = {"max_steps": 2, "batch_size": 64, "num_virtual_tokens": 5, "eval_rows": 0}
    torch.cuda.empty_cache()
    whole, reserved = torch.cuda.get_device_properties(0).total_memory, torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((reserved + 40 * 2**20) / whole)
    try:
        tune(model, rows, TuneConfig(**settings, micro_batch_tokens=100_000), callback=Noted())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert smaller
    assert smaller[-1] < 50_000
