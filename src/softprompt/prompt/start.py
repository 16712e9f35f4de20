"""Where a prompt starts: what it is before the first step."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from softprompt.config import PROMPT, Method, TuneConfig
from softprompt.data.encoder import plain_ids, token_ids
from softprompt.data.rows import Rows
from softprompt.data.special_tokens import SpecialTokens
from softprompt.data.split import sample
from softprompt.data.templates import Format
from softprompt.errors import SettingsError
from softprompt.model.frozen import FrozenModel
from softprompt.model.prefix import is_prefix
from softprompt.prompt.initialization import (
    EXAMPLE_TOKENS,
    MANY_LABELS,
    USUAL_TOKENS,
    embedded,
    examples_text,
    labels_prompt,
    random_prompt,
    repeated,
    task_text,
    text_prompt,
    vocabulary_prompt,
)
from softprompt.prompt.soft_prompt import SoftPrompt, load_soft_prompt, require_fit

_SHOWN = 5000  # training rows that a prompt's examples are drawn from
_OF_MANY = 5  # rows that show what a task of many labels is; nine do for 77 (benchmarks/results/many_labels.jsonl)
_LONGEST_TEXT = 512  # tokens that a prompt is made as long as without being asked
Decide = Callable[[str, object, str], None]


def source_prompt(model: FrozenModel, config: TuneConfig) -> SoftPrompt | None:
    """Return the prompt that another goes on from (SPoT, Vu et al. 2022), where the settings name one."""
    if not config.init.startswith(PROMPT):
        return None
    source = load_soft_prompt(config.init.removeprefix(PROMPT))
    require_fit(source, model)
    return source


def first_prompt(
    model: FrozenModel, config: TuneConfig, source: SoftPrompt | None, form: Format, train: Rows, decide: Decide
) -> Tensor:
    """Return what is to be learned, before the first step: `[P, H]`, or of a deep prefix `[L, 2, K, P, D]`.

    Args:
        model: the frozen model.
        config: settings.
        source: the prompt to go on from, if any.
        form: how rows become text.
        train: training rows, some of which may stand in the prompt.
        decide: told of what the settings leave open: name, value and reason.

    Raises:
        SettingsError: settings that do not fit together.
    """
    length = config.num_virtual_tokens
    if config.init_text is not None and config.init not in ("auto", "text"):
        raise SettingsError(
            f"init_text is read with init=text only, not with init={config.init}; leave one of them out"
        )
    if source is not None:
        return _resized(_as(config.method, model, source.weights), length or source.num_virtual_tokens)
    return _as(config.method, model, _soft_start(model, config, form, train, decide))


def _as(method: Method, model: FrozenModel, weights: Tensor) -> Tensor:
    """Return a prompt as what is to be learned: a deep prefix starts as what the model makes of a soft prompt.

    Raises:
        SettingsError: it is a deep prefix, and a soft prompt is to be learned.
    """
    if is_prefix(weights) == (method == "prefix-tuning"):
        return weights
    if is_prefix(weights):
        raise SettingsError("init: a soft prompt cannot start from a deep prefix; give method=prefix-tuning")
    with torch.no_grad():
        return model.prefix(weights).stacked()


def _resized(weights: Tensor, length: int) -> Tensor:
    """Return a prompt with so many virtual tokens, beginning again where they run out."""
    return torch.stack(repeated(weights.unbind(-2), length), dim=-2)


def _at_most(model: FrozenModel, wanted: int) -> int:
    """Return how many tokens of a text a prompt starts from: half of the model's positions are for what follows it."""
    return min(wanted, (model.context_length or 2 * wanted) // 2)


def _fits(model: FrozenModel, text: str, most: int) -> bool:
    return len(token_ids(model.tokenizer, text)) <= most


def _shown_best(method: Method, form: Format) -> bool:
    """Tell whether a prompt learns more from examples than from a text; deep prefixes of labels do not."""
    return form.task == "completion" or (form.task == "classification" and method == "prompt-tuning")


def _needed(form: Format) -> int:
    """Return how many rows show what a task is: one of every label; of many labels a few."""
    labels = len(form.verbalizers)
    return labels if labels <= MANY_LABELS else _OF_MANY


def _shows_enough(model: FrozenModel, form: Format, text: str, rows: int, most: int) -> bool:
    """Tell whether a text of so many rows shows what a task is, and is short enough."""
    return rows >= _needed(form) and _fits(model, text, most)


def _examples(model: FrozenModel, form: Format, rows: Rows, seed: int, length: int | None) -> tuple[str, int]:
    """Return a text of rows, and how many: as many as fit in the usual length, or else as many as are needed."""
    text, shown = examples_text(model, form, rows, seed, _at_most(model, length or EXAMPLE_TOKENS))
    if length is None and shown < _needed(form):
        longest = _at_most(model, _LONGEST_TEXT)
        longer, more = examples_text(model, form, rows, seed, longest, _needed(form))
        if _shows_enough(model, form, longer, more, longest):
            return longer, more
    return text, shown


def _ids(model: FrozenModel, text: str, template: str = "") -> list[int]:
    """Return a text's tokens; those that it spells out are special where its template, not a row, may have them."""
    own = SpecialTokens.of(model.tokenizer).in_text(template)
    return embedded(model, (token_ids if own else plain_ids)(model.tokenizer, text))


def _soft_start(model: FrozenModel, config: TuneConfig, form: Format, train: Rows, decide: Decide) -> Tensor:
    length, init = config.num_virtual_tokens, config.init
    examples = cache(lambda: _examples(model, form, sample(train, _SHOWN, config.seed), config.seed, length))
    if init == "auto":
        init, why = "text", "a text that says what the task is"
        if config.init_text is None:
            longest = _at_most(model, length or _LONGEST_TEXT)
            if _shown_best(config.method, form) and _shows_enough(model, form, *examples(), longest):
                init, why = "examples", "rows and their targets show more than words"
            elif not _fits(model, task_text(form), _at_most(model, _LONGEST_TEXT)):
                init, why = "labels", "too many labels for a text"
        decide("init", init, why)
    if init == "text":
        text = config.init_text
        if text is None:
            text = task_text(form)
            decide("init_text", text, "written from the task")
            return text_prompt(model, length, text, _ids(model, text))
        return text_prompt(model, length, text)
    if init == "examples":
        text = examples()[0]
        return text_prompt(model, length, text, _ids(model, text, form.template))
    if init == "labels":
        return labels_prompt(model, length, form.verbalizers.values())
    if init == "vocabulary":
        texts = (plain_ids(model.tokenizer, form.input(row)) for row in train)
        return vocabulary_prompt(model, length or USUAL_TOKENS, texts)
    return random_prompt(model, length or USUAL_TOKENS, config.seed)
