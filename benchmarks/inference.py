"""Evaluation and generation, next to PEFT and to the base model alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import softprompt as sp
from sides import load, peft_model, ratio
from softprompt.data.encoder import Encoder
from softprompt.data.templates import make_format
from softprompt.evaluation.label_scorer import LabelScorer
from softprompt.prompt.initialization import task_text, text_prompt
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import SoftPrompt

LIKELIHOODS_AGREE = 1e-3  # nats
PARTS = 3  # that a long evaluation is cut into, so that both sides take turns
LABELS_TIMED = 6  # of 77, by PEFT: each takes about five seconds
BATCH = 32


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    """Append the seconds that the block takes."""
    began = time.perf_counter()
    yield
    into.append(time.perf_counter() - began)


def sst2(data: Path, _repeats: int) -> dict[str, Any]:
    """Score the validation rows' two labels of a token each."""
    return evaluation(sp.load_data(data / "sst2/validation.jsonl"), None)


def banking77(data: Path, _repeats: int) -> dict[str, Any]:
    """Score the 77 labels, of several tokens each, of 32 rows."""
    return evaluation(sp.load_data(data / "banking77/test.jsonl"), 32)


def evaluation(rows: sp.Rows, first: int | None) -> dict[str, Any]:
    """Score every label of every row behind 20 virtual tokens.

    PEFT reads each row's input once where all labels have one token, and else once a label, 32 rows at a time; of many
    labels some are timed, and all counted.

    Args:
        rows: the labels are those of all rows.
        first: how many rows are scored; None for all.
    """
    model = load("smollm2")
    form = make_format("classification", rows.labels)
    prompt = text_prompt(model, 20, task_text(form))
    learned = SoftPrompt(prompt, Record.of(model, form, 512))
    wrapped = peft_model(model.hf_model, prompt).eval()
    rows = rows.pick(range(first or len(rows)))
    scorer = LabelScorer(Encoder(model.tokenizer, form, 512), rows)
    texts = [(c.input_ids, tail) for c in scorer.choices for tail in c.tails]
    single = all(len(tail) == 1 for _, tail in texts)
    seconds: dict[str, list[float]] = {"softprompt": [], "peft": []}
    apart = 0.0
    count = len(form.verbalizers)
    timed_labels = np.linspace(0, count - 1, min(count, LABELS_TIMED)).astype(int)
    for part in np.array_split(np.arange(len(rows)) if single else timed_labels, PARTS):
        mine = scorer if not single else LabelScorer(Encoder(model.tokenizer, form, 512), rows.pick(part.tolist()))
        with timed(seconds["softprompt"]):
            found = mine.score(model, learned).log_likelihoods  # type: ignore[attr-defined]
        with timed(seconds["peft"]):
            if single:
                expected = peft_single(wrapped, mine)
            else:
                expected = np.stack([peft_label(wrapped, mine, label) for label in part.tolist()], axis=1)
        apart = max(apart, float(np.abs(expected - (found if single else found[:, part])).max()))
    if apart > LIKELIHOODS_AGREE:
        raise SystemExit(f"log-likelihoods differ by {apart:.1e}")
    if not single:  # ours scores all labels in each turn
        seconds["peft"] = [s * count / (len(timed_labels) / PARTS) for s in seconds["peft"]]
    return {
        "settings": {"rows": len(rows), "labels": count, "num_virtual_tokens": 20},
        "seconds": {side: [round(s, 3) for s in each] for side, each in seconds.items()},
        "faster": ratio(seconds["peft"], seconds["softprompt"]),
        "log_likelihoods_differ": apart,
    }


@torch.no_grad()
def peft_single(wrapped: Any, scorer: LabelScorer) -> np.ndarray:
    """Return the log-probabilities of labels of one token each, `[rows, labels]`."""
    found = []
    for begin in range(0, len(scorer.choices), BATCH):
        batch = scorer.choices[begin : begin + BATCH]
        logs = padded_pass(wrapped, [choice.input_ids for choice in batch])
        for row, choice in zip(logs, batch, strict=True):
            found.append([float(row[len(choice.input_ids) - 1, tail[0]]) for tail in choice.tails])
    return np.array(found)


@torch.no_grad()
def peft_label(wrapped: Any, scorer: LabelScorer, label: int) -> np.ndarray:
    """Return the log-likelihood of one label for every row, `[rows]`."""
    found = []
    for begin in range(0, len(scorer.choices), BATCH):
        batch = scorer.choices[begin : begin + BATCH]
        logs = padded_pass(wrapped, [(*choice.input_ids, *choice.tails[label]) for choice in batch])
        for row, choice in zip(logs, batch, strict=True):
            tail, start = choice.tails[label], len(choice.input_ids)
            found.append(sum(float(row[start + i - 1, token]) for i, token in enumerate(tail)))
    return np.array(found)


def padded_pass(wrapped: Any, texts: Sequence[tuple[int, ...]]) -> Tensor:
    """Return the log-probabilities behind every token, `[rows, T, V]`."""
    ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    mask = pad_sequence([torch.ones(len(text), dtype=torch.long) for text in texts], batch_first=True)
    logits: Tensor = wrapped(input_ids=ids, attention_mask=mask).logits
    return logits[:, logits.shape[1] - ids.shape[1] :].log_softmax(dim=-1)


def generation(data: Path, repeats: int) -> dict[str, Any]:
    """Continue 16 texts of 16 tokens each by 64 tokens behind 100 virtual tokens, greedily.

    The texts are equally long, because PEFT gets padded ones wrong. The base model's time to the first token is that of
    `generate` of transformers, and of ours without a prompt, whichever is shorter.
    """
    model = load("smollm2")
    rows = sp.load_data(f"{data}/awesome-chatgpt-prompts/prompts.csv[:16]", {"text": "prompt"})
    ids = torch.tensor([model.tokenizer(row["text"])["input_ids"][:16] for row in rows])
    texts = model.tokenizer.batch_decode(ids)
    prompt = sp.SoftPrompt(text_prompt(model, 100, "Continue the text in the same manner:\n"), record_of(model))
    wrapped = peft_model(model.hf_model, prompt.weights).eval()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seconds: dict[str, list[float]] = {name: [] for name in ("softprompt", "peft", "first", "base", "plain")}

    def theirs(hf_model: Any, count: int) -> Tensor:
        hf_model.generation_config.pad_token_id = model.tokenizer.eos_token_id
        made: Tensor = hf_model.generate(**given, max_new_tokens=count, do_sample=False)
        return made[:, -count:] if made.shape[1] > count else made

    for _ in range(1 + repeats):
        with timed(seconds["softprompt"]):
            ours = sp.generate(model, texts, prompt, sp.GenerateConfig(max_new_tokens=64), raw=True)
        with timed(seconds["peft"]):
            peft = theirs(wrapped, 64)
        with timed(seconds["first"]):
            sp.generate(model, texts, prompt, sp.GenerateConfig(max_new_tokens=1), raw=True)
        with timed(seconds["base"]):
            theirs(model.hf_model, 1)
        with timed(seconds["plain"]):
            sp.generate(model, texts, None, sp.GenerateConfig(max_new_tokens=1), raw=True)
    expected = model.tokenizer.batch_decode(peft, skip_special_tokens=True)
    same = sum(a == b for a, b in zip(ours, expected, strict=True))
    timings = {name: each[1:] for name, each in seconds.items()}
    base = [min(pair) for pair in zip(timings["base"], timings["plain"], strict=True)]
    return {
        "settings": {"rows": 16, "new_tokens": 64, "num_virtual_tokens": 100},
        "seconds": {name: [round(s, 3) for s in each] for name, each in timings.items()},
        "faster": ratio(timings["peft"], timings["softprompt"]),
        "first_token_over_base": ratio(timings["first"], base),
        "same_texts": same,
    }


def record_of(model: sp.FrozenModel) -> Any:
    """Return what a prompt for plain text says of itself."""
    from softprompt.prompt.base_model import base_model_record

    return Record(base_model=base_model_record(model))
