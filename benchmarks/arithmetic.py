"""The floating-point operations of a step, and the time of its matrix products alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch.nn.functional import linear

import softprompt as sp
from softprompt.data.batching import micro_batches
from softprompt.data.example import Example
from softprompt.model.backends.onednn import faster_matmuls
from softprompt.training.prepare import PreparedRun

_MULTIPLY_ADD = 2
_PASSES = 2  # forward, and backward to the inputs: frozen weights take no gradient
_LAYERS_TIMED = 4


def linears(model: sp.FrozenModel) -> list[torch.Tensor]:
    """Return the weights `[out, in]` of all layers' matrix products, without the output head."""
    head = model.hf_model.get_output_embeddings()
    return [m.weight for m in model.hf_model.modules() if isinstance(m, torch.nn.Linear) and m is not head]


def body(model: sp.FrozenModel, tokens: float, pairs: float) -> float:
    """Return the operations of the layers, forward and backward.

    Args:
        model: the base model.
        tokens: positions that are run.
        pairs: how many pairs of a position and one that it looks at there are.
    """
    config = model.hf_model.config.get_text_config()
    weights = sum(weight.numel() for weight in linears(model))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Scores and weighted values; the backward pass goes to both of each product's inputs.
    attention = config.num_hidden_layers * 2 * config.num_attention_heads * width * 3
    return float(_MULTIPLY_ADD * (_PASSES * weights * tokens + attention * pairs))


def head(model: sp.FrozenModel, rows: float) -> float:
    """Return the operations of some rows of logits, forward and backward."""
    return float(_MULTIPLY_ADD * _PASSES * model.hf_model.get_output_embeddings().weight.numel() * rows)


def text_tokens(prepared: PreparedRun, batch: Sequence[Example]) -> list[int]:
    """Return the number of tokens of each text behind the prefix; its last one is not run."""
    return [max(len(e.ids) - len(prepared.shared_text_ids) - 1, 1) for e in batch]


def needed(model: sp.FrozenModel, prepared: PreparedRun, batch: Sequence[Example]) -> tuple[float, float, float]:
    """Return the operations of a step: one pass of the prompt, the text without padding, and the target logits."""
    prefix_len = len(prepared.start) + len(prepared.shared_text_ids)
    prompt = body(model, prefix_len, prefix_len * (prefix_len + 1) / 2)
    text = sum(body(model, t, t * prefix_len + t * (t + 1) / 2) for t in text_tokens(prepared, batch))
    return prompt, text, head(model, sum(e.targets for e in batch))


def bound(model: sp.FrozenModel, prepared: PreparedRun, batch: Sequence[Example]) -> float:
    """Return PEFT's operations (prompt and padding in every row, all logits) divided by ours."""
    length = len(prepared.start) + max(len(e.ids) for e in batch)
    everything = body(model, len(batch) * length, len(batch) * length**2) + head(model, len(batch) * length)
    return everything / sum(needed(model, prepared, batch))


def needed_seconds(model: sp.FrozenModel, prepared: PreparedRun, batch: Sequence[Example]) -> float:
    """Return the time of the operations at the measured rate of their matrix products."""
    prompt, text, logits = needed(model, prepared, batch)
    assert prepared.config.micro_batch_tokens
    parts = micro_batches(batch, prepared.config.micro_batch_tokens, len(prepared.shared_text_ids), model.backend.pads)
    at_once = sum(text_tokens(prepared, batch)) // len(parts)
    layers = linears(model)[: _LAYERS_TIMED * len(linears(model)) // model.hf_model.config.num_hidden_layers]
    table = [model.hf_model.get_output_embeddings().weight]
    return (
        prompt / rate(layers, len(prepared.start) + len(prepared.shared_text_ids))
        + text / rate(layers, at_once)
        + logits / rate(table, sum(e.targets for e in batch) // len(parts))
    )


@torch.no_grad()
def rate(weights: Sequence[torch.Tensor], rows: int) -> float:
    """Return operations per second of products with weights `[out, in]`, forward and backward, for a number of rows."""
    rows = max(1, rows)
    inputs = {n: torch.randn(rows, n).to(weights[0]) for n in Counter(n for w in weights for n in w.shape)}
    best = float("inf")
    with faster_matmuls():  # in the faster library, as in our side
        for _ in range(2):
            began = time.perf_counter()
            for weight in weights:
                linear(inputs[weight.shape[1]], weight)
                linear(inputs[weight.shape[0]], weight.t())
            best = min(best, time.perf_counter() - began)
    return _MULTIPLY_ADD * _PASSES * rows * sum(weight.numel() for weight in weights) / best
