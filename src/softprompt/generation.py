"""Generation: answering texts with a prompt, or continuing them with none."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from softprompt.config import GenerateConfig, Mode
from softprompt.data.columns import INSTRUCTED
from softprompt.data.encoder import Encoder, bos_token_ids, plain_ids, require_embeddings
from softprompt.data.labels import is_blank
from softprompt.data.rows import Row
from softprompt.data.templates import DEFAULT_TEMPLATE
from softprompt.data.values import require_characters, scalar_text
from softprompt.decoding import continue_ids
from softprompt.errors import DataError, SettingsError, nearest
from softprompt.evaluation.label_scorer import choose
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.ensemble import Prompt
from softprompt.prompt.loading import require_fit
from softprompt.prompt.soft_prompt import BasePrompt

_NEW_TOKENS = 64  # where nothing says how many
_WITH_CHOOSING = {"batch_size"}  # the only setting that is no rule of writing


def generate(
    model: FrozenModel,
    texts: Sequence[str | Mapping[str, object]],
    prompt: Prompt | None = None,
    config: GenerateConfig | None = None,
    *,
    mode: Mode | None = None,
    raw: bool = False,
    virtual_tokens: bool = True,
) -> list[str]:
    """Answer texts: a prompt of labels chooses one of them, anything else writes a continuation.

    Args:
        model: the frozen model.
        texts: inputs; they go through the prompt's template. One whose template names several columns takes
            dictionaries of them.
        prompt: None for the base model, which reads the texts as they are.
        config: decoding rules, where it writes; greedy by default. A model's own sampling defaults are not used.
        mode: `choose` or `write`; None to choose with a prompt of labels and to write with any other.
        raw: read the texts as they are, without the prompt's template, and write.
        virtual_tokens: False to leave the virtual tokens out and keep the template: the base to compare with. It
            chooses where the prompt does.

    Returns:
        The names of the labels that were chosen, or the continuations without the texts themselves.

    Raises:
        PromptError: the prompt was trained on another model.
        DataError: a text is none, or has a character that is not whole.
        SettingsError: the texts do not fit the template or leave no room for new tokens, or decoding rules are given
            where labels are chosen.
    """
    mode = answer_mode(prompt, mode, config, raw=raw)
    config = config or GenerateConfig()
    _require_texts(texts)
    if mode == "write":
        return _written(model, texts, prompt, config, raw=raw, virtual_tokens=virtual_tokens)
    assert prompt is not None
    rows = input_rows(prompt, texts)
    size = config.batch_size if "batch_size" in config.model_fields_set else max(1, len(rows))
    labels = list(prompt.record.verbalizers)
    chosen: list[str] = []
    for first in range(0, len(rows), size):
        scores = choose(model, prompt, rows[first : first + size], virtual_tokens=virtual_tokens)
        chosen += [labels[best] for best in scores.predicted]
    return chosen


def answer_mode(prompt: Prompt | None, mode: Mode | None, config: GenerateConfig | None, *, raw: bool = False) -> Mode:
    """Return whether a prompt chooses among its labels or writes; nothing is inferred from the values of settings.

    Raises:
        SettingsError: there are no labels to choose among, or decoding rules are given where labels are chosen.
    """
    labelled = prompt is not None and prompt.record.task == "classification"
    if mode not in (None, "choose", "write"):
        raise SettingsError(f"mode {mode!r} is unknown; allowed are choose and write")
    if mode == "choose" and (raw or not labelled):
        why = "text that is read raw has no template that a label follows" if raw else "only a prompt of labels can"
        raise SettingsError(f"mode=choose: {why}; leave mode=choose out")
    if mode == "write" or raw or not labelled:
        return "write"
    rules = sorted(config.model_fields_set - _WITH_CHOOSING) if config is not None else []
    if rules:
        raise SettingsError(
            f"{', '.join(rules)}: decoding rules are for writing, and a prompt of labels chooses one of them; leave "
            "the rules out, or write with mode=write (--mode write)"
        )
    return "choose"


def _require_texts(texts: Sequence[str | Mapping[str, object]]) -> None:
    """Make sure that what is given are texts, or rows of texts."""
    if isinstance(texts, (str, Mapping)):
        raise SettingsError("give a list of texts, not one text")
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, (str, Mapping)):
            raise DataError(f"text {number} is {text!r}; give a string, or a dictionary of the template's columns")
        require_characters({"text": text} if isinstance(text, str) else text, f"text {number}")


def _written(
    model: FrozenModel,
    texts: Sequence[str | Mapping[str, object]],
    prompt: Prompt | None,
    config: GenerateConfig,
    *,
    raw: bool,
    virtual_tokens: bool,
) -> list[str]:
    """Continue texts freely."""
    if prompt is not None:
        require_fit(prompt, model)
    before = prompt if prompt is not None and virtual_tokens else BasePrompt()
    room_for = None if model.context_length is None else model.context_length - before.num_virtual_tokens
    most = config.max_new_tokens or (None if config.max_length else _NEW_TOKENS)
    if prompt is None or raw or (prompt.record.task, prompt.record.template) == ("text", DEFAULT_TEMPLATE["text"]):
        inputs = [_plain(model, text, f"text {number}") for number, text in enumerate(texts, start=1)]
    else:
        rows = input_rows(prompt, texts)
        longest = prompt.record.max_length
        if room_for is not None:  # of more new tokens than usual, as many are made as fit behind the text
            longest = min(longest, room_for - min(most or 1, _NEW_TOKENS))
        if longest < 2:
            raise SettingsError(
                f"{before.num_virtual_tokens} virtual tokens leave no room for text: the model has "
                f"{model.context_length} positions"
            )
        encoder = Encoder(model.tokenizer, prompt.format, longest, model.vocabulary_size)
        inputs = [list(ids) for ids in encoder.inputs(rows)]
        if encoder.truncated:
            warnings.warn(f"{encoder.truncated} of {len(rows)} texts were cut to {longest} tokens", stacklevel=3)
    room = [_room(ids, most, config.max_length, room_for) for ids in inputs]
    return continue_ids(model, before, inputs, room, config)


def _plain(model: FrozenModel, text: str | Mapping[str, object], where: str) -> list[int]:
    if not isinstance(text, str):
        raise SettingsError("without a template, texts must be strings, not dictionaries of columns")
    ids = [*bos_token_ids(model.tokenizer), *plain_ids(model.tokenizer, text)]
    require_embeddings(model.tokenizer, ids, model.vocabulary_size, where)
    return ids


def input_rows(prompt: Prompt, texts: Sequence[str | Mapping[str, object]]) -> list[Row]:
    """Return texts as rows of a prompt's columns.

    Raises:
        DataError: a column holds no text.
        SettingsError: a text alone, and the template names several columns.
    """
    return [_row(prompt, text, f"text {number}") for number, text in enumerate(texts, start=1)]


def _row(prompt: Prompt, text: str | Mapping[str, object], where: str) -> Row:
    if not isinstance(text, str):
        return input_row(prompt, text, where)
    columns = prompt.format.columns
    if len(columns) > 1:
        raise SettingsError(
            f"the prompt's template {prompt.record.template!r} names the columns {', '.join(columns)}; "
            "give dictionaries of them from Python, or the whole text with --raw"
        )
    return {columns[0]: text}


def input_columns(prompt: Prompt | None) -> list[str]:
    """Return the columns that make up a prompt's input; the base model reads `text`."""
    return prompt.format.columns if prompt is not None else ["text"]


def require_columns(prompt: Prompt | None, map: Mapping[str, str]) -> None:
    """Make sure that what is mapped are columns that a prompt reads.

    Raises:
        SettingsError: one is none.
    """
    columns = input_columns(prompt)
    unknown = next((column for column in map if column not in columns), None)
    if unknown is not None:
        raise SettingsError(
            f"--map {unknown}={map[unknown]}: the prompt reads {', '.join(columns)}{nearest(unknown, columns)}"
        )


def input_row(
    prompt: Prompt | None, record: Mapping[str, object], where: str, map: Mapping[str, str] | None = None
) -> Row:
    """Return what a prompt's template names of a record, as texts.

    Args:
        prompt: None for the base model.
        record: a row as it was read. Of several columns some may be empty, and the `input` beside an `instruction`
            missing.
        where: its place, for messages.
        map: the template's column names to the columns that hold them.

    Raises:
        DataError: a column is missing, holds no text, or all are empty.
    """
    columns = input_columns(prompt)
    held = {column: (map or {}).get(column, column) for column in columns}
    if len(columns) == len(record) == 1 and held[columns[0]] not in record and not map:
        held = {columns[0]: next(iter(record))}
    if set(INSTRUCTED) <= held.keys():
        record = {held[INSTRUCTED[1]]: None, **record}
    for column, source in held.items():
        if source not in record:
            raise DataError(
                f"{where}: it has no column {source!r}{nearest(source, record)}, which the prompt's template names; it "
                f"has {', '.join(record)}. Say which one it is, with --map {column}=…"
            )
    empty = len(columns) > 1  # where other columns are not
    row = {
        column: "" if empty and _is_nothing(record[source]) else scalar_text(record[source], source, where)
        for column, source in held.items()
    }
    if all(is_blank(text) for text in row.values()):
        which = ", ".join(repr(source) for source in held.values())
        raise DataError(f"{where}: the column{f's {which} are' if len(held) > 1 else f' {which} is'} empty")
    require_characters(row, where)
    return row


def _is_nothing(value: object) -> bool:
    return value is None or value == ""


def _room(ids: Sequence[int], most: int | None, max_length: int | None, positions: int | None) -> int:
    """Return how many tokens can follow a text; the model has `positions` for it, None for no limit."""
    if max_length is not None and len(ids) >= max_length:
        raise SettingsError(f"max_length {max_length} counts the text's own {len(ids)} tokens too; give more")
    if positions is not None and len(ids) >= positions:
        raise SettingsError(f"the text has {len(ids)} tokens, and the model has positions for {positions}; shorten it")
    limits = [limit - len(ids) for limit in (max_length, positions) if limit is not None]
    return min([*limits, most] if most is not None else limits)
