"""The effect of `torch.compile`: a step with compiled layers, its warm-up included, and a step without.

    python benchmarks/compiled.py --data FOLDER

It does not help: the compiler takes each layer for another function (attention knows its layer's number), compiles the
first eight and leaves the rest; with `torch._dynamo.config.recompile_limit = 100`, twelve steps were not done after
580 s, when a whole run takes 200 to 300 s. So it is off; this file records the figure.

SmolLM2-135M, batches of 16 rows of SST-2 and 20 virtual tokens, as `softprompt tune` takes them. Every decoder layer is
compiled for sizes that change, as the lengths of a step's texts do. Both run with PyTorch's own matrix products, since
the compiler does not take those of `softprompt.model.backends.onednn`. FOLDER is that of `benchmarks/speed.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

import softprompt as sp
from sides import Softprompt
from softprompt.model.backends import onednn
from softprompt.training.prepare import prepare_data, prepare_run
from softprompt.training.run_folder import environment

FILE = Path(__file__).parent / "results" / "compiled.json"
STEPS = 12


def steps(model: sp.FrozenModel, data: Path) -> tuple[list[float], list[float]]:
    """Take steps and return their seconds and losses."""
    settings = sp.TuneConfig(num_virtual_tokens=20, max_steps=STEPS, eval_rows=0)
    prepared = prepare_run(prepare_data(model, sp.load_data(data / "sst2/train.jsonl"), settings), settings)
    seconds, losses = [], []
    with tempfile.TemporaryDirectory() as folder:
        side = Softprompt(model, prepared, Path(folder))
        for _ in range(STEPS):
            began = time.perf_counter()
            losses.append(side.step([]))
            seconds.append(time.perf_counter() - began)
    return seconds, losses


def main() -> None:
    """Measure both and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the data sets")
    options = parser.parse_args()
    disable_progress_bar()
    onednn.mkl_is_slow = lambda: False  # type: ignore[assignment]
    model = sp.load_model()
    plain, losses = steps(model, options.data)
    layers: Any = model.hf_model.get_decoder().layers
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
    compiled, others = steps(model, options.data)
    usual = [statistics.median(each[STEPS // 2 :]) for each in (plain, compiled)]
    warm_up = sum(compiled[: STEPS // 2]) - usual[1] * (STEPS // 2)
    record = {
        "seconds": {"plain": plain, "compiled": compiled},
        "step": {"plain": usual[0], "compiled": usual[1]},
        "warm_up": warm_up,
        "pays_after_steps": warm_up / (usual[0] - usual[1]) if usual[1] < usual[0] else None,
        "losses_differ": max(abs(a - b) / a for a, b in zip(losses, others, strict=True)),
        "cores": os.cpu_count(),
        "date": date.today().isoformat(),
        "environment": environment(),
    }
    FILE.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
