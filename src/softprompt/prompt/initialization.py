"""Initializations: small functions that return where the virtual tokens start, `[P, H]`.

Never from N(0, 1): real embeddings have a standard deviation of 0.02 to 0.15, and a prompt that starts far from
them learns slowly or not at all (Lester et al. 2021, section 3.2; PEFT's default does it all the same).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from softprompt.config import MOST_TOKENS
from softprompt.data.encoder import plain_ids, require_embeddings, token_ids
from softprompt.data.rows import Row
from softprompt.data.split import labels_in_turn
from softprompt.data.templates import Format
from softprompt.errors import SettingsError
from softprompt.model.frozen import FrozenModel

T = TypeVar("T")
MANY_LABELS = 10
USUAL_TOKENS = 20
EXAMPLE_TOKENS = 200
_MOST_LABELS = 100
_CLASSIFY = "Classify the text:\n"


def random_prompt(model: FrozenModel, length: int, seed: int) -> Tensor:
    """Draw `[P, H]` from a normal distribution with the mean and standard deviation of the model's embeddings."""
    generator = torch.Generator().manual_seed(seed)
    sample = model.embed(torch.randint(model.vocabulary_size, (2048,), generator=generator).tolist()).float().cpu()
    drawn = torch.randn(length, sample.shape[1], generator=generator)
    return sample.mean(dim=0) + drawn * sample.std(dim=0)


def vocabulary_prompt(model: FrozenModel, length: int, texts: Iterable[Sequence[int]]) -> Tensor:
    """Start from the embeddings of the tokens that are most frequent in the training texts (Lester et al. 2021)."""
    counts = Counter(token for ids in texts for token in ids)
    special = set(model.tokenizer.all_special_ids)
    frequent = embedded(model, [token for token, _ in counts.most_common() if token not in special])
    return model.embed(repeated(frequent, length)).float().cpu()


def embedded(model: FrozenModel, ids: Iterable[int]) -> list[int]:
    """Leave out tokens that the model has no embeddings of; what the row says that has one is told when it is read."""
    return [i for i in ids if i < model.vocabulary_size]


def text_prompt(model: FrozenModel, length: int | None, text: str, ids: Sequence[int] | None = None) -> Tensor:
    """Start from the embeddings of a text's tokens, all of them or the first P; a shorter text is repeated.

    Where P is open, it is the text's length, and 20 at least: repeated, ten tokens of text learn better as twenty.
    `ids` are its tokens where it is made from rows, whose special tokens are none.
    """
    if ids is None:
        ids = token_ids(model.tokenizer, text)
        require_embeddings(model.tokenizer, ids, model.vocabulary_size, "init_text")
    if not ids:
        raise SettingsError(f"init_text {text!r} has no tokens; describe the task in a few words")
    if length is None and len(ids) > MOST_TOKENS:
        raise SettingsError(
            f"init_text has {len(ids)} tokens, and a prompt {MOST_TOKENS} at most; shorten it, or take its first ones "
            f"with num_virtual_tokens={MOST_TOKENS}"
        )
    return model.embed(repeated(ids, length or max(len(ids), USUAL_TOKENS))).float().cpu()


def labels_prompt(model: FrozenModel, length: int | None, verbalizers: Iterable[str]) -> Tensor:
    """Start from one embedding a label: the mean of its tokens' (Lester et al. 2021, class-label initialization)."""
    means = []
    for text in verbalizers:
        ids = plain_ids(model.tokenizer, f" {text}")
        require_embeddings(model.tokenizer, ids, model.vocabulary_size, f"the label {text!r}")
        means.append(model.embed(ids).float().cpu().mean(dim=0))
    if not means:
        raise SettingsError("init=labels needs a classification task; use init=text")
    return torch.stack(repeated(means, length or max(USUAL_TOKENS, min(len(means), _MOST_LABELS))))


def task_text(format: Format) -> str:
    """Say what a task is about, with all its labels, as a start for its prompt.

    The list of 77 labels brought a soft prompt's loss to half of what it was from the labels' mean embeddings, and a
    deep prefix's to a third (benchmarks/results/choices.md).
    """
    if format.task == "classification":
        names = list(format.verbalizers.values())
        return f"Classify the text as {', '.join(names[:-1])} or {names[-1]}:\n" if names[1:] else _CLASSIFY
    if format.task == "completion":
        return "Read the input and write the output that belongs to it, in the same way every time:\n"
    return "The following is a text of the same kind as the others, written in the same style:\n"


def examples_text(
    model: FrozenModel, format: Format, rows: Sequence[Row], seed: int, most: int, most_rows: int | None = None
) -> tuple[str, int]:
    """Say what a task is about and show rows with their targets, every label in turn, in `most` tokens or little more.

    That is a few-shot prompt; what is learned begins with what it can do. Many labels are not listed besides.

    Args:
        model: its tokenizer counts.
        format: how rows are shown.
        rows: to draw from.
        seed: of the draw.
        most: tokens; one row is shown in any case.
        most_rows: rows, where fewer are wanted than fit.

    Returns:
        The text, and how many rows it shows.
    """
    text, shown = _CLASSIFY if len(format.verbalizers) > MANY_LABELS else task_text(format), 0
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    for i in labels_in_turn(rows, order) if format.task == "classification" else order:
        more = text + format.demonstration(rows[i])
        if shown == most_rows or (shown and len(token_ids(model.tokenizer, more)) > most):
            break
        text, shown = more, shown + 1
    return text, shown


def repeated(items: Sequence[T], length: int) -> list[T]:
    """Return `length` items, beginning again where they run out."""
    return [items[i % len(items)] for i in range(length)]
