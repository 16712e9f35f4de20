"""The time of a request for one label, next to a plain pass of as many tokens through all layers, without logits.

    python benchmarks/label_requests.py --data ../shared/data

On SmolLM2-135M, with 2 labels (SST-2) and with 77 (Banking77), behind 20 and 240 virtual tokens. The two are timed one
after the other; medians and their ratio are written to `results/label_requests.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

import softprompt as sp
from softprompt.data.encoder import Encoder
from softprompt.data.templates import make_format
from softprompt.evaluation.label_scorer import LabelScorer
from softprompt.prompt.record import Record
from softprompt.training.run_folder import environment

RESULTS = Path(__file__).parent / "results" / "label_requests.json"
SETS, VIRTUAL = ("sst2", "banking77"), (20, 240)
ROUNDS = 31


def seconds(work: Callable[[], object]) -> float:
    """Return the time of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(model: sp.FrozenModel, folder: Path, virtual: int) -> dict[str, Any]:
    """Time the requests of one task; the text is the longest of its first twenty."""
    labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    rows = sp.load_data(folder / "test.jsonl[:20]", task="classification")
    text = max((row["text"] for row in rows), key=len)
    form = make_format("classification", labels)
    weights = torch.randn(virtual, model.embedding_width, generator=torch.Generator().manual_seed(0)) * 0.1
    prompt = sp.SoftPrompt(weights, Record.of(model, form, 512))
    asked = sp.load_data([{"text": text, "label": label} for label in labels[:2]]).pick([0])
    (choices,) = LabelScorer(Encoder(model.tokenizer, form, 512, model.vocabulary_size), asked).choices
    tokens = len(choices.ids)
    ids, last = torch.randint(100, 4000, (tokens,)), torch.tensor([tokens - 1])

    def plain() -> object:
        with torch.no_grad():
            return model.backend.text_pass(model.cached_prefix(prompt.weights), [ids], [last])

    first = seconds(lambda: sp.generate(model, [text], prompt))
    plain()
    pairs = [(seconds(lambda: sp.generate(model, [text], prompt)), seconds(plain)) for _ in range(ROUNDS)]
    request, bare = median(each[0] for each in pairs), median(each[1] for each in pairs)
    return {
        "set": folder.name,
        "labels": len(labels),
        "virtual_tokens": virtual,
        "tokens": tokens,
        "first_ms": round(1e3 * first, 1),
        "request_ms": round(1e3 * request, 1),
        "plain_pass_ms": round(1e3 * bare, 1),
        "ratio": round(median(a / b for a, b in pairs), 3),
    }


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = sp.load_model()
    found = [measure(model, given.data / name, virtual) for name in SETS for virtual in VIRTUAL]
    for each in found:
        print(json.dumps(each))
    record = {
        "date": date.today().isoformat(),
        "threads": given.threads,
        "environment": environment(),
        "requests": found,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
