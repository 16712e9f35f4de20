"""Run by torchrun, see distributed/test_collective.py: tunes with several settings, and writes what each process saw.

Each process has an output folder of its own, as on machines that share no file system.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import softprompt as sp
from softprompt.distributed.collective import launched
from softprompt.evaluation.label_scorer import LabelScorer
from softprompt.training import prompt_trainer

SETTINGS = {
    "max_steps": 4,
    "batch_size": 4,
    "eval_every": 2,
    "num_virtual_tokens": 5,
    "threads": 1,
    "max_grad_norm": 1e9,
}
# What a step is made of; each gives the same as in one process.
CASES: dict[str, dict[str, Any]] = {
    "usual": {},
    "micro-batches": {"micro_batch_tokens": 20},
    "odd": {"batch_size": 5},
    "one-row": {"batch_size": 1},
    "no-validation": {"eval_rows": 0},
}
OUT_OF_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory")


class Told(sp.Callback):
    """What a process was told."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.sizes: list[int] = []

    def step(self, step: int, loss: float) -> None:
        self.losses.append(loss)

    def micro_batch_reduced(self, step: int, micro_batch_tokens: int) -> None:
        self.sizes.append(micro_batch_tokens)


@contextmanager
def noted_gradients() -> Iterator[list[list[list[float]]]]:
    """The gradient of every step of the optimizer."""
    seen: list[list[list[float]]] = []
    step = torch.optim.AdamW.step

    def noting(self: torch.optim.AdamW) -> None:
        seen.append(self.param_groups[0]["params"][0].grad.tolist())
        step(self)

    with patch.object(torch.optim.AdamW, "step", noting):
        yield seen


def tuned(model: sp.FrozenModel, rows: sp.Rows, out: Path, resume: bool = False, **settings: Any) -> dict[str, Any]:
    """Tune, and tell the result or the error."""
    told = Told()
    with noted_gradients() as gradients:
        try:
            config = None if resume else sp.TuneConfig(**{**SETTINGS, **settings})
            result = sp.tune(model, rows, config, out=out, resume=resume, callback=told)
        except (sp.SoftpromptError, KeyboardInterrupt) as error:
            return {"error": f"{type(error).__name__}: {error}", "wrote": out.exists()}
    return {
        "prompt": result.prompt.weights.tolist(),
        "metrics": result.metrics,
        "gradients": gradients,
        "told": told.losses,
        "smaller": told.sizes,
        "wrote": out.exists(),
    }


def on(rank: int, place: object, name: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    """Change a function in one process alone."""
    right = getattr(place, name)
    return patch.object(place, name, change(right) if launched().rank == rank else right)


def little_memory(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(model: object, prompt: object, text: object, parts: list[list[Any]], *rest: Any) -> Any:
        if any(len(part) > 1 for part in parts):
            raise OUT_OF_MEMORY
        return right(model, prompt, text, parts, *rest)

    return wrapped


def little_memory_to_score(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: LabelScorer, *arguments: Any) -> Any:
        if self.micro_batch_tokens > 40:
            raise OUT_OF_MEMORY
        return right(self, *arguments)

    return wrapped


def noting_rows(into: list[int]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def change(right: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(model: object, prompt: object, text: object, parts: list[list[Any]], *rest: Any) -> Any:
            into.append(sum(len(part) for part in parts))
            return right(model, prompt, text, parts, *rest)

        return wrapped

    return change


def no_number(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, prompt, *_: (float("nan"), torch.zeros_like(prompt))


def interrupted(call: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Ctrl-C in call number `call`."""

    def change(right: Callable[..., Any]) -> Callable[..., Any]:
        calls = iter(range(1000))

        def wrapped(*arguments: Any, **options: Any) -> Any:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGINT)
            return right(*arguments, **options)

        return wrapped

    return change


def texts(rows: sp.Rows) -> sp.Rows:
    return sp.load_data([{"text": row["text"]} for row in rows])


def main() -> None:
    model_folder, data, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    processes = launched()
    model, rows, out = sp.load_model(model_folder), sp.load_data(data), folder / str(processes.rank)
    seen: dict[str, Any] = {"shared": [processes.broadcast(b"of 0" if processes.first else b"").decode()]}
    seen["shared"].append(processes.broadcast(b"" if processes.first else b"of another").decode())
    for name, settings in CASES.items():
        seen[name] = tuned(model, rows, out / name, **settings)
    seen["text"] = tuned(model, texts(rows), out / "text", micro_batch_tokens=20)
    with on(1, prompt_trainer, "prompt_gradient", little_memory):
        seen["memory"] = tuned(model, rows, out / "memory")
    with on(1, LabelScorer, "_run", little_memory_to_score):
        seen["memory-to-score"] = tuned(model, rows, out / "memory-to-score")
    with on(1, prompt_trainer, "prompt_gradient", no_number):
        seen["no-number"] = tuned(model, rows, out / "no-number")
    rows_run: list[int] = []
    with on(processes.rank, prompt_trainer, "prompt_gradient", noting_rows(rows_run)):
        seen["minutes"] = tuned(model, rows, out / "minutes", max_steps=None, max_minutes=0.03)
    seen["rows-run"] = rows_run
    seen["unlike"] = tuned(model, rows.pick(range(30 + processes.rank)), out / "unlike")
    for name, place, function, call in (
        ("cut-in-a-step", prompt_trainer, "prompt_gradient", 2),
        ("cut-in-an-evaluation", LabelScorer, "_run", 1),
        ("cut-before-a-step", prompt_trainer, "prompt_gradient", 0),
    ):
        with on(1, place, function, interrupted(call)):
            seen[name] = tuned(model, rows, out / name)
        seen[f"{name}, resumed"] = tuned(model, rows, out / name, resume=True)
    (folder / f"seen-by-{processes.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
