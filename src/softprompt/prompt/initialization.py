"""Initialization: the value of a soft prompt or prefix before the first step.

Never drawn from N(0, 1): input embeddings have a standard deviation of 0.02 to 0.15, and a prompt far from them learns
slowly or not at all (Lester et al. 2021, section 3.2). PEFT's default is N(0, 1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from softprompt.config import MANY_LABELS, MAX_VIRTUAL_TOKENS, MIN_VIRTUAL_TOKENS, PROMPT, Method, TuneConfig
from softprompt.data.encoder import plain_ids, require_embeddings, token_ids
from softprompt.data.rows import Row, Rows
from softprompt.data.special_tokens import SpecialTokens
from softprompt.data.split import interleave_labels, sample
from softprompt.data.templates import Format
from softprompt.errors import SettingsError
from softprompt.model.frozen import FrozenModel
from softprompt.model.prefix import is_prefix
from softprompt.prompt.loading import load_soft_prompt, require_fit
from softprompt.prompt.soft_prompt import SoftPrompt

T = TypeVar("T")
MAX_EXAMPLES_TOKENS = 200  # of the examples that a prompt starts from
MAX_TEXT_TOKENS = 512  # of a text, where num_virtual_tokens is not given
MAX_CANDIDATE_ROWS = 5000  # training rows that examples are drawn from
_EXAMPLES_OF_MANY_LABELS = 5  # as good as nine for 77 labels (benchmarks/results/many_labels.jsonl)
_MAX_LABEL_TOKENS = 100  # of init=labels, where num_virtual_tokens is not given
_CLASSIFY = "Classify the text:\n"


@dataclass(frozen=True)
class Start:
    """A prompt before the first step.

    Attributes:
        weights: a soft prompt `[P, H]`, or a prefix `[L, 2, K, P, D]`; float32.
        resolved: value and reason of `init` and `init_text`, where they were unset.
    """

    weights: Tensor
    resolved: dict[str, tuple[str, str]]

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        return self.weights.shape[-2]


def load_source(model: FrozenModel, init: str) -> SoftPrompt | None:
    """Load the prompt that `init` names to start from (SPoT, Vu et al. 2022); None where it names none."""
    if not init.startswith(PROMPT):
        return None
    source = load_soft_prompt(init.removeprefix(PROMPT))
    require_fit(source, model)
    return source


def initialize(model: FrozenModel, config: TuneConfig, source: SoftPrompt | None, form: Format, train: Rows) -> Start:
    """Return the prompt before the first step.

    Args:
        train: the training rows of the run's steps; some may become part of the prompt.
    """
    if config.init_text is not None and config.init not in ("auto", "text"):
        raise SettingsError(
            f"init_text is read with init=text only, not with init={config.init}; leave one of them out"
        )
    if source is None:
        weights, resolved = _Initializer(model, config, form, train).run()
        return Start(_convert(config.method, model, weights), resolved)
    weights = _convert(config.method, model, source.weights)
    length = config.num_virtual_tokens or weights.shape[-2]
    return Start(torch.stack(cycle_to(weights.unbind(-2), length), dim=-2), {})


def _convert(method: Method, model: FrozenModel, weights: Tensor) -> Tensor:
    """Return weights of the method's kind: a soft prompt becomes the prefix that the model computes from it."""
    if is_prefix(weights) == (method == "prefix-tuning"):
        return weights
    if is_prefix(weights):
        raise SettingsError("init: a soft prompt cannot start from a prefix; give method=prefix-tuning")
    with torch.no_grad():
        return model.prefix(weights).stacked()


class _Initializer:
    """Chooses what a soft prompt starts from, and computes it."""

    def __init__(self, model: FrozenModel, config: TuneConfig, form: Format, train: Rows) -> None:
        self.model, self.config, self.form, self.train = model, config, form, train
        self.length = config.num_virtual_tokens

    def run(self) -> tuple[Tensor, dict[str, tuple[str, str]]]:
        """Return a soft prompt `[P, H]`, and what was resolved with its reason."""
        model, form, config, length = self.model, self.form, self.config, self.length
        resolved = {"init": self._choose()} if config.init == "auto" else {}
        init = resolved["init"][0] if resolved else config.init
        if init == "text":
            if config.init_text is not None:
                return text_prompt(model, length, config.init_text), resolved
            text = task_text(form)
            resolved["init_text"] = text, "written from the task"
            return text_prompt(model, length, text, self._ids(text)), resolved
        if init == "examples":
            text = self._examples[0]
            return text_prompt(model, length, text, self._ids(text, form.template)), resolved
        if init == "labels":
            return labels_prompt(model, length, form.verbalizers.values()), resolved
        if init == "vocabulary":
            texts = (plain_ids(model.tokenizer, form.input(row)) for row in self.train)
            return vocabulary_prompt(model, length or MIN_VIRTUAL_TOKENS, texts), resolved
        return random_prompt(model, length or MIN_VIRTUAL_TOKENS, config.seed), resolved

    def _choose(self) -> tuple[str, str]:
        """Return what init=auto means here, and why."""
        if self.config.init_text is None:
            # Prompts learn more from examples than from a text; prefixes for classification do not.
            task, method = self.form.task, self.config.method
            better = task == "completion" or (task == "classification" and method == "prompt-tuning")
            if better and self._show_enough(*self._examples, self._limit(self.length or MAX_TEXT_TOKENS)):
                return "examples", "rows and their targets show more than words"
            if not self._fits(task_text(self.form), self._limit(MAX_TEXT_TOKENS)):
                return "labels", "too many labels for a text"
        return "text", "a text that says what the task is"

    @cached_property
    def _examples(self) -> tuple[str, int]:
        """A text of rows and their number: as many as fit in the usual length, or else as many as are needed."""
        rows, seed = sample(self.train, MAX_CANDIDATE_ROWS, self.config.seed), self.config.seed
        limit = self._limit(self.length or MAX_EXAMPLES_TOKENS)
        text, shown = examples_text(self.model, self.form, rows, seed, limit)
        if self.length is None and shown < self._needed:
            limit = self._limit(MAX_TEXT_TOKENS)
            longer, more = examples_text(self.model, self.form, rows, seed, limit, self._needed)
            if self._show_enough(longer, more, limit):
                return longer, more
        return text, shown

    @property
    def _needed(self) -> int:
        """How many rows show what a task is: one a label, or a few of many labels."""
        labels = len(self.form.verbalizers)
        return labels if labels <= MANY_LABELS else _EXAMPLES_OF_MANY_LABELS

    def _show_enough(self, text: str, rows: int, limit: int) -> bool:
        return rows >= self._needed and self._fits(text, limit)

    def _fits(self, text: str, limit: int) -> bool:
        return len(token_ids(self.model.tokenizer, text)) <= limit

    def _limit(self, tokens: int) -> int:
        """Return how many tokens a text may have: half of the model's positions are for what follows it."""
        return min(tokens, (self.model.context_length or 2 * tokens) // 2)

    def _ids(self, text: str, template: str = "") -> list[int]:
        """Return a text's tokens; special tokens are read as such only where the template itself contains some."""
        encode = token_ids if SpecialTokens.of(self.model.tokenizer).in_text(template) else plain_ids
        return with_embeddings(self.model, encode(self.model.tokenizer, text))


def random_prompt(model: FrozenModel, length: int, seed: int) -> Tensor:
    """Draw `[P, H]` from a normal distribution with the mean and standard deviation of the model's embeddings."""
    generator = torch.Generator().manual_seed(seed)
    sample = model.embed(torch.randint(model.vocabulary_size, (2048,), generator=generator).tolist()).float().cpu()
    noise = torch.randn(length, sample.shape[1], generator=generator)
    return sample.mean(dim=0) + noise * sample.std(dim=0)


def vocabulary_prompt(model: FrozenModel, length: int, texts: Iterable[Sequence[int]]) -> Tensor:
    """Start from the embeddings of the most frequent tokens in the training texts (Lester et al. 2021)."""
    counts = Counter(token for ids in texts for token in ids)
    special = set(model.tokenizer.all_special_ids)
    frequent = with_embeddings(model, [token for token, _ in counts.most_common() if token not in special])
    return model.embed(cycle_to(frequent, length)).float().cpu()


def with_embeddings(model: FrozenModel, ids: Iterable[int]) -> list[int]:
    """Leave out tokens without an embedding; a row that contains one is reported when it is encoded."""
    return [i for i in ids if i < model.vocabulary_size]


def text_prompt(model: FrozenModel, length: int | None, text: str, ids: Sequence[int] | None = None) -> Tensor:
    """Start from the embeddings of a text's tokens: the first P, repeated where the text is shorter.

    Args:
        length: P; None for the text's length, at least 20: ten tokens learn better when they are repeated.
        ids: its tokens, if they are not those of `token_ids`.
    """
    if ids is None:
        ids = token_ids(model.tokenizer, text)
        require_embeddings(model.tokenizer, ids, model.vocabulary_size, "init_text")
    if not ids:
        raise SettingsError(f"init_text {text!r} has no tokens; describe the task in a few words")
    if length is None and len(ids) > MAX_VIRTUAL_TOKENS:
        raise SettingsError(
            f"init_text has {len(ids)} tokens, and a prompt {MAX_VIRTUAL_TOKENS} at most; shorten it, or take its "
            f"first ones with num_virtual_tokens={MAX_VIRTUAL_TOKENS}"
        )
    return model.embed(cycle_to(ids, length or max(len(ids), MIN_VIRTUAL_TOKENS))).float().cpu()


def labels_prompt(model: FrozenModel, length: int | None, verbalizers: Iterable[str]) -> Tensor:
    """Start from one embedding a label: the mean over its tokens (Lester et al. 2021, class-label initialization)."""
    means = []
    for text in verbalizers:
        ids = plain_ids(model.tokenizer, f" {text}")
        require_embeddings(model.tokenizer, ids, model.vocabulary_size, f"the label {text!r}")
        means.append(model.embed(ids).float().cpu().mean(dim=0))
    if not means:
        raise SettingsError("init=labels needs a classification task; use init=text")
    return torch.stack(cycle_to(means, length or max(MIN_VIRTUAL_TOKENS, min(len(means), _MAX_LABEL_TOKENS))))


def task_text(format: Format) -> str:
    """Describe a task, with all its labels.

    With 77 labels, the loss of a soft prompt is half, and of a prefix a third, of what it is from the labels' mean
    embeddings (benchmarks/results/choices.md).
    """
    if format.task == "classification":
        names = list(format.verbalizers.values())
        return f"Classify the text as {', '.join(names[:-1])} or {names[-1]}:\n" if names[1:] else _CLASSIFY
    if format.task == "completion":
        return "Read the input and write the output that belongs to it, in the same way every time:\n"
    return "The following is a text of the same kind as the others, written in the same style:\n"


def examples_text(
    model: FrozenModel, format: Format, rows: Sequence[Row], seed: int, max_tokens: int, max_rows: int | None = None
) -> tuple[str, int]:
    """Describe a task and show rows with their targets: a few-shot prompt.

    Labels take turns. Many labels are not listed in the description.

    Args:
        max_tokens: of the text; one row is shown in any case.
        max_rows: the most rows; None for as many as fit.

    Returns:
        The text, and how many rows it shows.
    """
    text, shown = _CLASSIFY if len(format.verbalizers) > MANY_LABELS else task_text(format), 0
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    for i in interleave_labels(rows, order) if format.task == "classification" else order:
        longer = text + format.demonstration(rows[i])
        if shown == max_rows or (shown and len(token_ids(model.tokenizer, longer)) > max_tokens):
            break
        text, shown = longer, shown + 1
    return text, shown


def cycle_to(items: Sequence[T], length: int) -> list[T]:
    """Return `length` items, starting again at the first where they run out."""
    return [items[i % len(items)] for i in range(length)]
