"""A step of prompt tuning on a GPU in bfloat16, ours and PEFT's in a plain loop, interleaved.

Rows of one length and random ids, in SmolLM2-135M and in a random model of SmolLM2-1.7B's shape: the times do not
depend on the values.

    python benchmarks/gpu.py            # prints the table, and writes results/gpu.json and results/gpu.md
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import softprompt as sp
from sides import collate, virtual_tokens
from softprompt.data.example import Example
from softprompt.model.backends.verify import freeze
from softprompt.model.gradient import prompt_gradient
from softprompt.training.run_folder import environment

RESULTS = Path(__file__).parent / "results"
# rows, tokens of each, virtual tokens
CASES = {
    "135M": [(16, 40, 20), (16, 40, 100), (64, 128, 20), (64, 128, 100), (256, 128, 100)],
    "1.7B": [(16, 40, 20), (16, 128, 100), (64, 128, 100)],
}
_WARM, _TIMED = 3, 7


def load(size: str) -> sp.FrozenModel:
    """Return a base model."""
    small = sp.load_model(device="cuda", dtype="bfloat16")
    if size == "135M":
        return small
    shape = LlamaConfig(
        vocab_size=49_152,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        tie_word_embeddings=True,
    )
    with torch.device("cuda"):
        made = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    return freeze(made, small.tokenizer, source="SmolLM2-1.7B's shape, random weights")


def stepped(parameter: Tensor, gradient: Callable[[], None]) -> Callable[[], None]:
    """Return a training step."""
    optimizer = torch.optim.AdamW([parameter], 0.01)

    def step() -> None:
        optimizer.zero_grad()
        gradient()
        optimizer.step()

    return step


def ours(model: sp.FrozenModel, rows: list[Example], virtual: int) -> Callable[[], None]:
    """Return our step."""
    prompt = torch.nn.Parameter(0.1 * torch.randn(virtual, model.embedding_width))

    def gradient() -> None:
        _, prompt.grad = prompt_gradient(model, prompt, (), [rows], activation_checkpointing=False)

    return stepped(prompt, gradient)


def theirs(model: sp.FrozenModel, rows: list[Example], virtual: int) -> Callable[[], None]:
    """Return PEFT's step, all of its batch at once."""
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=virtual)
    wrapped = get_peft_model(model.hf_model, config)
    batch = {name: tensor.to(model.device) for name, tensor in collate(rows).items()}

    def gradient() -> None:
        wrapped(**batch).loss.backward()

    return stepped(virtual_tokens(wrapped), gradient)


def measured(step: Callable[[], None]) -> tuple[float, int]:
    """Return the seconds and the peak bytes of a step."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, began = torch.cuda.memory_allocated(), time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() - before


def main() -> None:
    """Run all cases."""
    records = []
    for size, cases in CASES.items():
        model = load(size)
        for count, length, virtual in cases:
            draw = torch.Generator().manual_seed(0)
            ids = torch.randint(5, 40_000, (count, length), generator=draw).tolist()
            rows = [Example(tuple(row), length - 2) for row in ids]
            record: dict[str, Any] = {"model": size, "rows": count, "tokens": length, "virtual": virtual}
            try:
                sides = {"softprompt": ours(model, rows, virtual), "peft": theirs(model, rows, virtual)}
                found: dict[str, list[tuple[float, int]]] = {side: [] for side in sides}
                for number in range(_WARM + _TIMED):
                    for side, step in sides.items():
                        once = measured(step)
                        if number >= _WARM:
                            found[side].append(once)
            except torch.OutOfMemoryError:
                continue
            for side, steps in found.items():
                record[side] = statistics.median(seconds for seconds, _ in steps)
                record[f"{side}_bytes"] = max(peak for _, peak in steps)
            record["faster"] = statistics.median(
                b[0] / a[0] for a, b in zip(found["softprompt"], found["peft"], strict=True)
            )
            print(json.dumps(record), flush=True)
            records.append(record)
    lines = [
        "| | rows × tokens | virtual | PEFT | ours | faster | memory: PEFT | ours |",
        "|---" * 8 + "|",
        *(
            f"| {r['model']} | {r['rows']} × {r['tokens']} | {r['virtual']} | {1000 * r['peft']:.0f} ms | "
            f"{1000 * r['softprompt']:.0f} ms | **{r['faster']:.2f}** | {r['peft_bytes'] / 1e9:.2f} GB | "
            f"{r['softprompt_bytes'] / 1e9:.2f} GB |"
            for r in records
        ),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in environment().items())
    text = "\n".join(["# A step on a GPU", "", *lines, "", f"{date.today().isoformat()}; {versions}.", ""])
    (RESULTS / "gpu.json").write_text(json.dumps(records, indent=1) + "\n")
    (RESULTS / "gpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
