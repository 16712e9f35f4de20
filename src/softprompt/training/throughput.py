"""A dry run: what a plan would learn from, and what it would cost."""

from __future__ import annotations

import time

from pydantic import BaseModel

from softprompt.config import TuneConfig
from softprompt.data.batching import draw, micro_batches
from softprompt.model.frozen import FrozenModel
from softprompt.model.gradient import prompt_gradient
from softprompt.model.memory import available_memory
from softprompt.training.prepare import Plan, most_steps
from softprompt.training.search import effort, hindrance
from softprompt.training.trainer import Pace

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


class Forecast(BaseModel):
    """What a run would do; `step_seconds` is measured on one step, what follows extrapolates from it."""

    way: str
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


def make_forecast(model: FrozenModel, plan: Plan, given: TuneConfig) -> Forecast:
    """Run one step of a plan, keep nothing of it, and say what the whole run would take.

    Args:
        model: the frozen model.
        plan: what `given` settings came to.
        given: settings; with `max_minutes`, a run's steps are not the plan's but those that fit.
    """
    config, examples, extent = plan.config, plan.examples, plan.extent
    assert config.batch_size and config.micro_batch_tokens and config.max_steps and config.eval_every
    batch = [examples[i] for i in draw(len(examples), config.batch_size, 0, config.seed)]
    cut = micro_batches(batch, config.micro_batch_tokens, len(plan.text), model.way.pads)
    began = time.monotonic()
    parts, recompute = [[batch[i] for i in part] for part in cut], bool(config.gradient_checkpointing)
    prompt_gradient(model, plan.start, plan.text, parts, recompute)
    a_step = time.monotonic() - began

    mean = extent.tokens / extent.rows
    per_token = a_step / sum(len(e.ids) for e in batch)
    scored = len(plan.validation) if plan.validation is not None else 0
    last = plan.label_scorer()
    tree_tokens = sum(len(tree.ids) for tree in last.trees) if last else 0
    pace = Pace(a_step, scored * mean / _BACKWARD * per_token, tree_tokens / _BACKWARD * per_token, scored)
    length = {"max_steps": config.max_steps, "eval_every": config.eval_every, "eval_rows": config.eval_rows}
    seconds, most = 60 * (given.max_minutes or 0), most_steps(plan, given)
    if seconds:
        length |= pace.fitting(seconds, most, given.eval_every)
    searching = given.budget == "thorough" and hindrance(given, plan.train.task, pace.evaluation) is None
    share, times = effort(given, plan.train.task) if searching else (0.0, 0)
    searched = share * length["max_steps"] * pace.step + times * pace.evaluation
    if seconds and searched:
        length |= pace.fitting(seconds - searched, most, given.eval_every)
    evaluations = length["max_steps"] // length["eval_every"] + 1
    if length["eval_rows"] < scored:
        pace = pace.of(length["eval_rows"])
    needed = max(plan.step_bytes(part) for part in parts)
    return Forecast(
        way=model.way.name,
        virtual_tokens=plan.start.shape[-2],
        parameters=plan.start.numel(),
        mean_tokens=mean,
        longest=extent.longest,
        truncated=plan.encoder.truncated,
        rendered=[rendered_row(plan, i) for i in range(min(_SHOWN, len(examples)))],
        step_gigabytes=needed / 1e9,
        free_gigabytes=available_memory(model.device) / 1e9,
        step_seconds=a_step,
        steps=length["max_steps"],
        eval_every=length["eval_every"],
        eval_rows=length["eval_rows"],
        search_minutes=searched / 60,
        minutes=(searched + length["max_steps"] * pace.step + evaluations * pace.evaluation + pace.last) / 60,
    )


def rendered_row(plan: Plan, index: int) -> RenderedRow:
    """Return a training row as the model reads it."""
    example = plan.examples[index]
    decode = plan.encoder.tokenizer.decode
    return RenderedRow(
        input=str(decode(list(example.ids[: example.start]))),
        target=str(decode(list(example.ids[example.start :]))),
        tokens=len(example.ids),
        targets=example.targets,
    )
