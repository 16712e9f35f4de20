"""A dry run: what a plan would learn from, and what it would cost."""

from __future__ import annotations

import time

from pydantic import BaseModel

from softprompt.config import TuneConfig
from softprompt.data.batching import batch_indices, micro_batches
from softprompt.model.frozen import FrozenModel
from softprompt.model.gradient import prompt_gradient
from softprompt.model.memory import available_memory
from softprompt.training.prepare import PreparedRun, most_steps
from softprompt.training.search import search_cost, why_not_search
from softprompt.training.trainer import Throughput

_SHOWN = 3
_BACKWARD = 3.0  # a training step costs about three times the forward pass that scoring a row is


class RenderedRow(BaseModel):
    """A row as the model sees it.

    Attributes:
        input, target: the text, split where the target's tokens begin.
        tokens, targets: how many there are in all, and how many are learned.
    """

    input: str
    target: str
    tokens: int
    targets: int


class RunEstimate(BaseModel):
    """What a run would do; `step_seconds` is measured on one step, what follows extrapolates from it."""

    backend: str
    virtual_tokens: int
    parameters: int
    mean_tokens: float
    longest: int
    truncated: int
    rendered: list[RenderedRow]
    step_gigabytes: float
    free_gigabytes: float
    step_seconds: float
    steps: int
    eval_every: int
    eval_rows: int
    search_minutes: float
    minutes: float


def estimate_run(model: FrozenModel, prepared: PreparedRun, given: TuneConfig) -> RunEstimate:
    """Run one step of a plan, keep nothing of it, and say what the whole run would take.

    Args:
        model: the frozen model.
        prepared: what `given` settings came to.
        given: settings; with `max_minutes`, a run's steps are not the plan's but those that fit.
    """
    config, examples, length_stats = prepared.config, prepared.examples, prepared.length_stats
    assert config.batch_size and config.micro_batch_tokens and config.max_steps and config.eval_every
    batch = [examples[i] for i in batch_indices(len(examples), config.batch_size, 0, config.seed)]
    cut = micro_batches(batch, config.micro_batch_tokens, len(prepared.shared_text_ids), model.backend.pads)
    began = time.monotonic()
    parts, activation_checkpointing = [[batch[i] for i in part] for part in cut], bool(config.gradient_checkpointing)
    prompt_gradient(model, prepared.start, prepared.shared_text_ids, parts, activation_checkpointing)
    a_step = time.monotonic() - began

    mean = length_stats.tokens / length_stats.rows
    per_token = a_step / sum(len(e.ids) for e in batch)
    scored = len(prepared.validation) if prepared.validation is not None else 0
    last = prepared.label_scorer()
    tree_tokens = sum(len(choice.ids) for choice in last.choices) if last else 0
    throughput = Throughput(a_step, scored * mean / _BACKWARD * per_token, tree_tokens / _BACKWARD * per_token, scored)
    length = {"max_steps": config.max_steps, "eval_every": config.eval_every, "eval_rows": config.eval_rows}
    seconds, most = 60 * (given.max_minutes or 0), most_steps(prepared, given)
    if seconds:
        length |= throughput.fit_to_budget(seconds, most, given.eval_every)
    searching = given.budget == "thorough" and why_not_search(given, prepared.train.task, throughput.evaluation) is None
    share, times = search_cost(given, prepared.train.task) if searching else (0.0, 0)
    searched = share * length["max_steps"] * throughput.step + times * throughput.evaluation
    if seconds and searched:
        length |= throughput.fit_to_budget(seconds - searched, most, given.eval_every)
    evaluations = length["max_steps"] // length["eval_every"] + 1
    if length["eval_rows"] < scored:
        throughput = throughput.of(length["eval_rows"])
    needed = max(prepared.step_bytes(part) for part in parts)
    return RunEstimate(
        backend=model.backend.name,
        virtual_tokens=prepared.start.shape[-2],
        parameters=prepared.start.numel(),
        mean_tokens=mean,
        longest=length_stats.longest,
        truncated=prepared.encoder.truncated,
        rendered=[rendered_row(prepared, i) for i in range(min(_SHOWN, len(examples)))],
        step_gigabytes=needed / 1e9,
        free_gigabytes=available_memory(model.device) / 1e9,
        step_seconds=a_step,
        steps=length["max_steps"],
        eval_every=length["eval_every"],
        eval_rows=length["eval_rows"],
        search_minutes=searched / 60,
        minutes=(
            searched + length["max_steps"] * throughput.step + evaluations * throughput.evaluation + throughput.last
        )
        / 60,
    )


def rendered_row(prepared: PreparedRun, index: int) -> RenderedRow:
    """Return a training row as the model reads it."""
    example = prepared.examples[index]
    decode = prepared.encoder.tokenizer.decode
    return RenderedRow(
        input=str(decode(list(example.ids[: example.start]))),
        target=str(decode(list(example.ids[example.start :]))),
        tokens=len(example.ids),
        targets=example.targets,
    )
