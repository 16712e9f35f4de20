"""The predicted memory of a step against the measured peak of a fresh process, on Linux.

    python benchmarks/memory.py

Every case is measured in a process of its own: the model is loaded, a step of a few tokens is taken, then the peak is
reset (`/proc/self/clear_refs`), and two equal steps of one micro-batch are taken. `results/memory.md` is the table.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import softprompt as sp
from records import read_records
from softprompt.data.example import Example
from softprompt.model.backends.verify import freeze
from softprompt.model.free_memory import trim_allocator
from softprompt.model.gradient import prompt_gradient
from softprompt.model.memory import measure
from softprompt.training.run_folder import environment
from training import resident

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """A micro-batch of texts of the same length, with P virtual tokens.

    Attributes:
        loss: over one target per text, or all tokens.
    """

    model: str
    virtual_tokens: int
    texts: int
    tokens: int
    loss: str = "target"
    activation_checkpointing: bool = False


CASES = (
    Case("smollm2", 20, 8, 30),
    Case("smollm2", 20, 34, 30),
    Case("smollm2", 100, 34, 30),
    Case("smollm2", 20, 8, 120),
    Case("smollm2", 20, 8, 120, "all"),
    Case("smollm2", 100, 32, 120),
    Case("smollm2", 20, 2, 500),
    Case("smollm2", 100, 8, 500, "all"),
    Case("bloom", 20, 34, 30),
    Case("bloom", 20, 8, 120, "all"),
    Case("bloom", 100, 32, 120),
    Case("bloom", 100, 8, 500),
    Case("smollm2", 20, 1, 4000),
    Case("smollm2", 20, 1, 4000, activation_checkpointing=True),
    Case("bloom", 20, 1, 2000),
    Case("bloom", 20, 1, 2000, activation_checkpointing=True),
)


def load(name: str) -> sp.FrozenModel:
    """Return SmolLM2-135M, or a Bloom of twelve layers with random weights."""
    if name == "smollm2":
        return sp.load_model()
    torch.manual_seed(0)
    made: PreTrainedModel = BloomForCausalLM(BloomConfig(vocab_size=50_000, hidden_size=512, n_layer=12, n_head=8))
    return freeze(made, sp.load_model().tokenizer, source="a Bloom of twelve layers, random weights")


def measured(case: Case) -> dict[str, float]:
    """Return the predicted and the measured peak of a case, above the loaded model, in this process."""
    model = load(case.model)
    prompt = model.embed(range(case.virtual_tokens)).float()
    start = case.tokens if case.loss == "target" else 0
    ids = torch.randint(
        model.vocabulary_size, (case.texts, case.tokens + 1), generator=torch.Generator().manual_seed(0)
    )
    examples = [Example(tuple(row), start) for row in ids.tolist()]
    memory_estimate = replace(
        measure(model, case.virtual_tokens), activation_checkpointing=case.activation_checkpointing
    )
    prompt_gradient(model, prompt, (), [[Example(examples[0].ids[:8], 7)]])  # one-time allocations are not counted
    if case.activation_checkpointing:
        trim_allocator()  # as a run does
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    began = time.perf_counter()
    for _ in range(2):
        prompt_gradient(model, prompt, (), [examples], case.activation_checkpointing)
    seconds = (time.perf_counter() - began) / 2
    predicted = memory_estimate.step([case.tokens] * case.texts, sum(e.targets for e in examples))
    return {"predicted": predicted / 1e9, "peak": (resident("VmHWM") - before) / 1e9, "seconds": seconds}


def table(records: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Memory of a step",
        "",
        "Made by `benchmarks/memory.py`, which says how. Gigabytes above the loaded model, in float32 on a CPU.",
        "",
        "| model | P | texts | tokens each | loss | checkpointing | predicted | peak | predicted/peak | a step |",
        "|---" * 10 + "|",
    ]
    for r in records:
        cells = (
            r["model"],
            r["virtual_tokens"],
            r["texts"],
            r["tokens"],
            r["loss"],
            "yes" if r["activation_checkpointing"] else "",
        )
        figures = f"{r['predicted']:.2f} | {r['peak']:.2f} | **{r['predicted'] / r['peak']:.2f}**"
        seconds = f"{r['seconds']:.1f} s" if "seconds" in r else ""
        lines.append(f"| {' | '.join(map(str, cells))} | {figures} | {seconds} |")
    last = max(records, key=lambda r: str(r["date"]))
    versions = ", ".join(f"{name} {version}" for name, version in last["environment"].items())
    lines += ["", f"{last['date']}, {last['cores']} cores; {versions}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--last", type=int, default=len(CASES), help="only the last cases, so many")
    options = parser.parse_args()
    disable_progress_bar()
    if options.one:
        print(json.dumps(measured(Case(**json.loads(options.one)))))
        return
    file = RESULTS / "memory.jsonl"
    known = read_records(file)
    about = {"cores": os.cpu_count(), "date": date.today().isoformat(), "environment": environment()}
    for case in CASES[-options.last :]:
        command = [sys.executable, __file__, "--one", json.dumps(asdict(case))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        record = {**asdict(case), **json.loads(done.stdout.splitlines()[-1]), **about}
        known = [r for r in known if any(r[key] != value for key, value in asdict(case).items())] + [record]
        file.write_text("".join(json.dumps(r) + "\n" for r in known))
        (RESULTS / "memory.md").write_text(table(known))
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
