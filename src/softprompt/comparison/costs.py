"""The costs of a method, measured: time, memory, disk space, and what it does to the base model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from softprompt.data.encoder import Encoder
from softprompt.data.rows import load_data
from softprompt.data.templates import make_format
from softprompt.evaluation.scores import perplexity
from softprompt.evaluation.token_scorer import TokenScorer
from softprompt.model.free_memory import trim_allocator
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.soft_prompt import BasePrompt

_MAX_LENGTH = 512  # tokens of a paragraph


@dataclass
class Effort:
    """What a block took: wall time, processor time of all threads, and the most memory above that at its beginning."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0


@contextmanager
def measure(device: torch.device) -> Iterator[Effort]:
    """Measure a block; the figures are complete when it ends."""
    effort = Effort()
    trim_allocator()
    before = _memory(device, begin=True)
    began, cpu = time.monotonic(), time.process_time()
    try:
        yield effort
    finally:
        effort.seconds, effort.cpu_seconds = time.monotonic() - began, time.process_time() - cpu
        effort.peak_bytes = max(0, _memory(device) - before)


def _memory(device: torch.device, begin: bool = False) -> int:
    """Return the peak of the memory in use since a measurement began; at its beginning, the memory in use now.

    On Linux the process's own peak can be reset (proc(5), clear_refs). Elsewhere it cannot: a peak that is no higher
    than an earlier one is not seen there.
    """
    if device.type == "cuda":
        if begin:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if begin:
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return int(psutil.Process().memory_info().rss)
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        info = psutil.Process().memory_info()
        return int(getattr(info, "peak_wset", info.rss))


@torch.no_grad()
def weights_hash(hf_model: PreTrainedModel) -> str:
    """Return a hash of every bit of the weights."""
    digest = sha256()
    for name, tensor in sorted(hf_model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def general_perplexity(model: FrozenModel) -> float:
    """Return the perplexity of a text on everyday subjects that is unrelated to any task."""
    text = files("softprompt.comparison").joinpath("general.txt").read_text(encoding="utf-8")
    rows = load_data([{"text": paragraph} for paragraph in text.split("\n\n")])
    max_length = min(_MAX_LENGTH, model.context_length or _MAX_LENGTH)
    scorer = TokenScorer(Encoder(model.tokenizer, make_format("text", []), max_length, model.vocabulary_size), rows)
    return perplexity(scorer.score(model, BasePrompt()).loss())


@dataclass(frozen=True)
class BaseMeasurements:
    """What is measured of the base model before any method changes weights."""

    weights_hash: str
    perplexity: float

    @classmethod
    def of(cls, model: FrozenModel) -> BaseMeasurements:
        """Measure a base model."""
        return cls(weights_hash(model.hf_model), general_perplexity(model))
