"""Generation: continuing texts with a prompt, or with none."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from softprompt.config import GenerateConfig
from softprompt.data.examples import Encoder, leading_tokens, token_ids
from softprompt.data.rows import Row, Rows, require_characters
from softprompt.data.templates import DEFAULT_TEMPLATE
from softprompt.decoding import continue_ids
from softprompt.errors import SettingsError
from softprompt.evaluation.ensemble import scored
from softprompt.evaluation.scoring import LabelScorer, LabelScores, tokens_at_once
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.ensemble import Prompt, require_all_fit


def generate(
    model: FrozenModel,
    texts: Sequence[str | Mapping[str, str]],
    prompt: Prompt | None = None,
    config: GenerateConfig | None = None,
    *,
    raw: bool = False,
    virtual_tokens: bool = True,
) -> list[str]:
    """Continue texts.

    A prompt of labels chooses among them by their likelihoods, as `evaluate` does, unless decoding rules are given.

    Args:
        model: the frozen model.
        texts: inputs; they go through the prompt's template. One whose template names several columns takes
            dictionaries of them.
        prompt: None for the untouched model, which reads the texts as they are.
        config: decoding rules; greedy by default. A model's own sampling defaults are not used.
        raw: read the texts as they are, without the prompt's template.
        virtual_tokens: False to leave the virtual tokens out and keep the template: the base to compare with.

    Returns:
        The continuations, without the texts themselves.

    Raises:
        PromptError: the prompt was trained on another model.
        DataError: a text has a character that is not whole.
        SettingsError: the texts do not fit the template, or leave no room for new tokens.
    """
    config = config or GenerateConfig()
    if isinstance(texts, str):
        raise SettingsError("give a list of texts, not one text")
    for number, text in enumerate(texts, start=1):
        require_characters({"text": text} if isinstance(text, str) else text, f"text {number}")
    if prompt is not None:
        require_all_fit(prompt, model)
    prompts: Sequence[Tensor | None] = prompt.members if prompt is not None and virtual_tokens else (None,)
    virtual = prompt.num_virtual_tokens if prompt is not None and virtual_tokens else 0
    room_for = None if model.context_length is None else model.context_length - virtual
    usual = _usual_length(model, prompt)
    most = config.max_new_tokens or (None if config.max_length else usual)
    labels = prompt.record.verbalizers.values() if prompt is not None and not raw else ()
    if prompt is None or raw or (prompt.record.task, prompt.record.template) == ("text", DEFAULT_TEMPLATE["text"]):
        inputs = [_plain(model, text) for text in texts]
    else:
        rows = [_row(prompt, text) for text in texts]
        longest = prompt.record.max_length
        if room_for is not None:  # of more new tokens than usual, as many are made as fit behind the text
            longest = min(longest, room_for - min(most or 1, usual))
        if longest < 2:
            raise SettingsError(
                f"{virtual} virtual tokens leave no room for text: the model has {model.context_length} positions"
            )
        encoder = Encoder(model.tokenizer, prompt.format, longest)
        inputs = [list(ids) for ids in encoder.inputs(rows)]
        if encoder.truncated:
            warnings.warn(f"{encoder.truncated} of {len(rows)} texts were cut to {longest} tokens", stacklevel=2)
        labelled, free = prompt.record.task == "classification", GenerateConfig(batch_size=config.batch_size)
        if labelled and virtual_tokens and config == free:
            return _chosen(model, prompt, encoder, rows)
    room = [_room(ids, most, config.max_length, room_for) for ids in inputs]
    return [_label(text, labels) for text in continue_ids(model, prompts, inputs, room, config)]


def _chosen(model: FrozenModel, prompt: Prompt, encoder: Encoder, rows: Sequence[Row]) -> list[str]:
    """Return the most probable label of each row."""
    verbalizers = prompt.record.verbalizers
    some = next(iter(verbalizers))  # every row has one; it is not read
    asked = Rows([{**row, "label": some} for row in rows], "classification", "texts")
    at_once = tokens_at_once(model, asked, prompt.num_virtual_tokens, encoder.max_length, len(prompt.members))
    scores = scored(LabelScorer(encoder, asked, at_once), model, prompt.members, prompt.biases)
    assert isinstance(scores, LabelScores)
    return [verbalizers[scores.labels[best]] for best in scores.predicted]


def _label(text: str, labels: Collection[str]) -> str:
    """Return the label that a text begins with, without what follows it: labels have no end of their own.

    A longer word that begins like a label is none.
    """
    begun = [label for label in labels if re.match(rf"\s*{re.escape(label)}(?!\w)", text)]
    return max(begun, key=len) if begun else text


def _plain(model: FrozenModel, text: str | Mapping[str, str]) -> list[int]:
    if not isinstance(text, str):
        raise SettingsError("without a template, texts must be strings, not dictionaries of columns")
    return [*leading_tokens(model.tokenizer), *token_ids(model.tokenizer, text)]


def _row(prompt: Prompt, text: str | Mapping[str, str]) -> dict[str, str]:
    if not isinstance(text, str):
        return {column: str(value) for column, value in text.items()}
    columns = prompt.format.columns
    if len(columns) > 1:
        raise SettingsError(
            f"the prompt's template {prompt.record.template!r} names the columns {', '.join(columns)}; "
            "give dictionaries of them from Python, or the whole text with --raw"
        )
    return {columns[0]: text}


def _usual_length(model: FrozenModel, prompt: Prompt | None) -> int:
    """Return how many new tokens to make where nothing says it: a label needs no more than the longest of them."""
    if prompt is None or prompt.record.task != "classification":
        return 64
    labels = [prompt.format.joined(prompt.record.template, text) for text in prompt.record.verbalizers.values()]
    return max(len(ids) for ids in model.tokenizer(labels, add_special_tokens=False)["input_ids"])


def _room(ids: Sequence[int], most: int | None, max_length: int | None, positions: int | None) -> int:
    """Return how many tokens can follow a text; the model has `positions` for it, None for no limit."""
    if max_length is not None and len(ids) >= max_length:
        raise SettingsError(f"max_length {max_length} counts the text's own {len(ids)} tokens too; give more")
    if positions is not None and len(ids) >= positions:
        raise SettingsError(f"the text has {len(ids)} tokens, and the model has positions for {positions}; shorten it")
    limits = [limit - len(ids) for limit in (max_length, positions) if limit is not None]
    return min([*limits, most] if most is not None else limits)
