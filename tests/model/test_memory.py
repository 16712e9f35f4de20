"""Memory: what a step takes is predicted from a few tokens, and a step that would not fit is not tried."""

from __future__ import annotations

import gc
import json
import os
import shlex
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from counting import LiveBytes, saved_bytes
from softprompt import Callback, TuneConfig, load_data, tune
from softprompt.data.example import Example
from softprompt.model import memory
from softprompt.model.free_memory import available_memory
from softprompt.model.frozen import FrozenModel
from softprompt.model.gradient import prompt_gradient
from softprompt.model.memory import measure, micro_batch_tokens
from softprompt.training import prompt_trainer
from softprompt.training.prepare import PreparedRun
from tiny_models import ARCHITECTURES, frozen, with_memory
from tiny_runs import SHORT, prepared_run
from tiny_tokenizers import tiny_tokenizer

SIZES = [(1, 100), (9, 30), (3, 61)]  # texts, and tokens of each


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_measured_bytes_of_many_tokens_predict_those_of_other_lengths(architecture: str) -> None:
    model = frozen(architecture)
    for prefix_length in (3, 40):
        memory_estimate = measure(model, prefix_length)
        for texts, tokens in SIZES:
            counted = saved_bytes(model, prefix_length, [tokens] * texts)
            # Some models save views of a single text, and copies of several.
            near = 0.1 if model.backend.pads and texts == 1 else 0.01
            assert memory_estimate.saved([tokens] * texts) == pytest.approx(counted, rel=near)


@pytest.mark.parametrize("architecture", ["llama", "bloom", "gemma2", "mixtral", "falcon-alibi"])
def test_texts_of_unlike_length_keep_no_more_than_is_predicted(architecture: str) -> None:
    model, lengths = frozen(architecture), [7, 8, 9, 10, 30, 31, 44, 90]
    counted = saved_bytes(model, 20, lengths)
    assert counted <= 1.001 * measure(model, 20).saved(lengths) < 1.3 * counted


@pytest.mark.parametrize("prefix_lengths", [(50, 50, 50), (3, 20, 12)], ids=["alike", "unlike"])
@pytest.mark.parametrize("architecture", ["llama", "bloom", "gemma2", "mixtral", "falcon-alibi", "mpt", "gptj"])
def test_texts_behind_several_prefixes_take_no_more_than_is_predicted(
    architecture: str, prefix_lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "ALLOCATOR", 1)
    model = frozen(architecture)
    memory_estimate = replace(measure(model, max(prefix_lengths)), prefixes=3)
    for lengths in ([30] * 9, [7, 8, 9, 10, 30, 31, 44, 64, 90], [2, 1, 2]):
        examples = [Example(tuple(range(5, 6 + length)), length) for length in lengths]
        with LiveBytes() as live:
            leaves = []
            for prefix_length in prefix_lengths:
                prefix = model.prefix(torch.randn(prefix_length, model.embedding_width).requires_grad_())
                leaves.append((prefix, prefix.leaves()))
            model.backend.loss([leaves[i % 3][1] for i in range(len(lengths))], examples).sum().backward()
            for prefix, leaf in leaves:
                prefix.backward(leaf)
        assert live.most < memory_estimate.step(lengths, len(lengths)) < 3 * live.most


@pytest.mark.parametrize("loss", ["target", "all"])
@pytest.mark.parametrize("prefix_length", [3, 100])
@pytest.mark.parametrize("architecture", ["llama", "bloom", "gemma2", "mixtral", "gpt2", "falcon-alibi", "gptj"])
def test_a_steps_peak_is_predicted(
    architecture: str, prefix_length: int, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the bytes of all tensors at once; what an allocator loses between them is known from benchmarks alone."""
    monkeypatch.setattr(memory, "ALLOCATOR", 1)
    model = frozen(architecture)
    memory_estimate, prompt = measure(model, prefix_length), torch.randn(prefix_length, model.embedding_width)
    for texts, tokens in SIZES:
        examples = [Example(tuple(range(5, 6 + tokens)), tokens if loss == "target" else 0)] * texts
        with LiveBytes() as live:
            prompt_gradient(model, prompt, (), [examples])
        predicted = memory_estimate.step([tokens] * texts, sum(e.targets for e in examples))
        assert 0.97 * live.most < predicted < 1.6 * live.most  # few layers: one of them counts for much


def test_scoring_takes_far_less_than_training(llama: FrozenModel) -> None:
    memory_estimate, prompt = measure(llama, 5), torch.randn(5, 32)
    examples = [Example(tuple(range(5, 106)), 100)] * 9
    with torch.no_grad(), LiveBytes() as live:
        llama.backend.loss(llama.prefix(prompt), examples)
    predicted = memory_estimate.scoring([100] * 9, 9)
    assert live.most < predicted < 0.7 * memory_estimate.step([100] * 9, 9)


@pytest.mark.parametrize("prefix_lengths", [(20,), (100,), (20, 20, 20), (3, 100, 12)], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "bloom", "gemma2", "mixtral", "falcon-alibi", "mpt", "gptj"])
def test_scoring_takes_no_more_than_is_predicted(
    architecture: str, prefix_lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind one prefix or several; on the padded backend, the keys and values of all layers are there at once."""
    monkeypatch.setattr(memory, "ALLOCATOR", 1)
    model, count = frozen(architecture), len(prefix_lengths)
    memory_estimate = replace(measure(model, max(prefix_lengths)), prefixes=count)
    prefixes = [
        model.prefix(torch.randn(prefix_length, model.embedding_width)).leaves() for prefix_length in prefix_lengths
    ]
    for lengths in ([30] * 9, [7, 8, 9, 10, 30, 31, 44, 64, 90], [1] * 200):
        examples = [Example(tuple(range(5, 6 + length)), length) for length in lengths]
        with torch.no_grad(), LiveBytes() as live:
            model.backend.loss([prefixes[i % count] for i in range(len(lengths))], examples)
        assert 0.95 * live.most < memory_estimate.scoring(lengths, len(lengths))


@pytest.mark.parametrize("scoring", [False, True])
@pytest.mark.parametrize("free", [10**5, 2 * 10**6, 10**7])
def test_no_more_is_run_at_once_than_fits_in_half_of_the_free_memory(
    llama: FrozenModel, free: int, scoring: bool
) -> None:
    memory_estimate = measure(llama, 30)
    needed = memory_estimate.scoring if scoring else memory_estimate.step
    tokens = micro_batch_tokens(with_memory(llama, lambda: free), memory_estimate, 3, 60, 0.5, scoring)

    def most(tokens: int) -> float:
        """Of texts of either length."""
        texts = [[min(length, tokens)] * max(1, tokens // length) for length in (3, 60)]
        return max(needed(each, sum(each) / 2) for each in texts)

    assert 1 <= tokens <= 1024
    assert tokens == 1 or most(tokens) <= free / 2
    assert tokens == 1024 or free / 2 < most(tokens + 1)


def test_a_context_that_the_prompt_fills_is_measured_too() -> None:
    gpt2 = frozen("gpt2")
    memory_estimate = measure(gpt2, 254)  # of 256 positions
    assert memory_estimate.saved([2]) == pytest.approx(saved_bytes(gpt2, 254, [2]), rel=0.2)


class Sizes(Callback):
    """Notes what was run at once."""

    def __init__(self) -> None:
        self.prepared: PreparedRun | None = None
        self.seen: list[tuple[int, int]] = []

    def begin(self, prepared: PreparedRun, step: int) -> None:
        self.prepared = prepared

    def micro_batch_reduced(self, step: int, micro_batch_tokens: int) -> None:
        self.seen.append((step, micro_batch_tokens))


def settings(**more: object) -> TuneConfig:
    given = {"max_steps": 6, "batch_size": 8, "save_every": 2, "eval_rows": 0, "num_virtual_tokens": 5}
    return TuneConfig(**{**given, **more})  # type: ignore[arg-type]


def watched(callback: Sizes, free: Callable[[], float], ran: list[int]) -> Callable[..., Any]:
    """A gradient that notes how many micro-batches it took, and stands no micro-batch that does not fit."""
    right = prompt_gradient

    def run(model: FrozenModel, weights: torch.Tensor, ids: Any, parts: list[list[Example]], *rest: Any) -> Any:
        assert callback.prepared is not None
        for part in parts:
            assert len(part) == 1 or callback.prepared.step_bytes(part) <= free()
        ran.append(len(parts))
        return right(model, weights, ids, parts, *rest)

    return run


def test_where_memory_shrinks_less_is_run_at_once_before_the_step_is_tried(
    llama: FrozenModel, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = load_data(reviews)
    whole = tune(llama, rows, settings()).prompt.weights
    prepared = prepared_run(llama, rows, settings())
    third = prepared.step_bytes([prepared.examples[i] for i in range(8)]) / 3
    ran: list[int] = []
    callback = Sizes()

    def free(*_: object) -> float:
        return third if len(ran) >= 3 else 1e12  # other programs take it after three steps

    with monkeypatch.context() as patch:
        patch.setattr(prompt_trainer, "prompt_gradient", watched(callback, free, ran))
        model = with_memory(llama, free)
        squeezed = tune(model, rows, settings(), out=tmp_path / "run", callback=callback).prompt.weights
    assert ran[:3] == [1, 1, 1]
    assert min(ran[3:]) > 1
    assert {step for step, _ in callback.seen} == {4}  # found once, and used from then on
    torch.testing.assert_close(squeezed, whole, atol=1e-4, rtol=1e-4)
    newest = tmp_path / "run" / "state" / "step-6"
    assert json.loads((newest / "state.json").read_text())["micro_batch_tokens"] == callback.seen[-1][1]
    # A run that is resumed goes on with what was run at once, though all memory is free again, and ends the same.
    before = (tmp_path / "run" / "prompt" / "adapter_model.safetensors").read_bytes()
    for file in newest.iterdir():
        file.unlink()
    again = Sizes()
    resumed = tune(llama, rows, None, out=tmp_path / "run", resume=True, callback=again)
    assert torch.equal(resumed.prompt.weights, squeezed)
    assert (tmp_path / "run" / "prompt" / "adapter_model.safetensors").read_bytes() == before
    assert again.seen == []


def test_rows_that_do_not_fit_even_alone_are_tried(
    llama: FrozenModel, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prediction is on the safe side, and a warning was given."""
    ran: list[int] = []
    callback = Sizes()
    monkeypatch.setattr(prompt_trainer, "prompt_gradient", watched(callback, lambda: 1000, ran))
    model = with_memory(llama, lambda: 1000)
    with pytest.warns(UserWarning, match="the longest row alone needs about"):
        assert tune(model, load_data(reviews), settings(micro_batch_tokens=1024), callback=callback).steps == 6
    assert ran == [8] * 6


def test_what_the_allocator_holds_is_given_back_before_less_is_run_at_once(
    llama: FrozenModel, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holes = [True]
    monkeypatch.setattr(prompt_trainer, "trim_allocator", holes.clear)
    callback = Sizes()
    model = with_memory(llama, lambda: 1000 if holes and callback.prepared else 10**12)
    tune(model, load_data(reviews), settings(), callback=callback)
    assert not holes
    assert callback.seen == []


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_what_was_measured_is_freed_with_the_model(name: str) -> None:
    model = frozen(name)
    weights = [weakref.ref(weight) for weight in model.hf_model.parameters()]
    measure(model, 5)
    del model
    gc.collect()
    assert [ref() is None for ref in weights] == [True] * len(weights)


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v is Linux's")
def test_more_at_once_than_there_is_memory_for_is_never_tried(tmp_path: Path) -> None:
    """For real, in 500 MB: the step would take twice that, and an allocation that fails is not caught here."""
    shape = {"vocab_size": 400, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4)).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": "the parcel never came and I want my money back " * 80}] * 8
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ready = (
        "import psutil, softprompt.cli.progress, softprompt.training.tune; print(psutil.Process().memory_info().vms)"
    )
    # Of PyTorch, that is a RuntimeError.
    uncaught = (
        "import softprompt.training.trainer as loop; loop.is_out_of_memory = lambda e: isinstance(e, MemoryError)"
    )
    command = [sys.executable, "-c", f"{uncaught}; from softprompt.cli.main import main; main()", "tune", "rows.jsonl"]
    command += ["--model", "model", "--out", "run", *SHORT, "--set", "batch_size=8", "--set", "max_steps=2"]
    command += ["--set", "eval_rows=0", "--set", "micro_batch_tokens=100000"]
    one = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    probe = [sys.executable, "-c", ready]
    used = int(subprocess.run(probe, capture_output=True, text=True, check=True, env=one).stdout)
    limited = f"ulimit -v {used // 1024 + 500_000}; {shlex.join(command)}"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, cwd=tmp_path, env=one, check=False)
    assert done.returncode == 0, done.stderr
    assert "step 1: memory is short; continuing with micro-batches of" in done.stderr


def test_files_that_were_read_leave_memory_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's own count of what is used has the pages of files in it (cgroup v2 and v1)."""
    for folder, limit, used, total in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", ""),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        there = {
            f"{folder}/{limit}": "1000000",
            f"{folder}/{used}": "900000",
            f"{folder}/memory.stat": f"anon 5\n{total}active_file 300000\n{total}inactive_file 400000\n",
        }

        def text(path: Path, *_: object, there: dict[str, str] = there, **__: object) -> str:
            if str(path) not in there:
                raise FileNotFoundError(str(path))
            return there[str(path)]

        monkeypatch.setattr(Path, "read_text", text)
        assert available_memory(torch.device("cpu")) == 800_000
