"""Generation: answering texts with a prompt, or continuing them with the base model.

Prefixes come from `FrozenModel.shared_prefixes`, through `decoding.continue_ids` or the scorer of labels.
"""

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

_NEW_TOKENS = 64  # the default
_FOR_CHOOSING = {"batch_size"}  # all other settings are for writing


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
    """Answer texts: a prompt with labels chooses one of them, any other prompt writes a continuation.

    Args:
        texts: inputs for the prompt's template; dictionaries where it names several columns.
        prompt: None for the base model, which reads the texts as they are.
        config: decoding settings, for writing; greedy by default. A model's own sampling defaults are not used.
        mode: `choose` or `write`; None to choose with a prompt that has labels and to write with any other.
        raw: read the texts as they are, without the prompt's template, and write.
        virtual_tokens: False for the base model with the prompt's template; it chooses where the prompt does.

    Returns:
        The names of the labels that were chosen, or the continuations without the texts themselves.

    Raises:
        PromptError: the prompt was trained on another model.
        DataError: not a text, or one with an incomplete character.
        SettingsError: the texts do not fit the template or leave no room for new tokens, or decoding settings are given
            where labels are chosen.
    """
    mode = answer_mode(prompt, mode, config, raw=raw)
    config = config or GenerateConfig()
    _require_texts(texts)
    if mode == "write":
        return _write(model, texts, prompt, config, raw=raw, virtual_tokens=virtual_tokens)
    assert prompt is not None
    rows = _input_rows(prompt, texts)
    size = config.batch_size if "batch_size" in config.model_fields_set else max(1, len(rows))
    labels = list(prompt.record.verbalizers)
    chosen: list[str] = []
    for first in range(0, len(rows), size):
        scores = choose(model, prompt, rows[first : first + size], virtual_tokens=virtual_tokens)
        chosen += [labels[best] for best in scores.predicted]
    return chosen


def answer_mode(prompt: Prompt | None, mode: Mode | None, config: GenerateConfig | None, *, raw: bool = False) -> Mode:
    """Return whether a prompt chooses one of its labels or writes; the values of settings have no influence.

    Raises:
        SettingsError: there are no labels to choose from, or decoding settings are given where labels are chosen.
    """
    labelled = prompt is not None and prompt.record.task == "classification"
    if mode not in (None, "choose", "write"):
        raise SettingsError(f"mode {mode!r} is unknown; allowed are choose and write")
    if mode == "choose" and (raw or not labelled):
        why = "text that is read raw has no template that a label follows" if raw else "only a prompt with labels can"
        raise SettingsError(f"mode=choose: {why}; leave mode=choose out")
    if mode == "write" or raw or not labelled:
        return "write"
    given = sorted(config.model_fields_set - _FOR_CHOOSING) if config is not None else []
    if given:
        raise SettingsError(
            f"{', '.join(given)}: decoding settings are for writing, and a prompt with labels chooses one of them; "
            "leave them out, or write with mode=write (--mode write)"
        )
    return "choose"


def _require_texts(texts: Sequence[str | Mapping[str, object]]) -> None:
    """Make sure that texts are strings or dictionaries."""
    if isinstance(texts, (str, Mapping)):
        raise SettingsError("give a list of texts, not one text")
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, (str, Mapping)):
            raise DataError(f"text {number} is {text!r}; give a string, or a dictionary of the template's columns")
        require_characters({"text": text} if isinstance(text, str) else text, f"text {number}")


def _write(
    model: FrozenModel,
    texts: Sequence[str | Mapping[str, object]],
    prompt: Prompt | None,
    config: GenerateConfig,
    *,
    raw: bool,
    virtual_tokens: bool,
) -> list[str]:
    """Write continuations."""
    if prompt is not None:
        require_fit(prompt, model)
    used = prompt if prompt is not None and virtual_tokens else BasePrompt()
    positions = None if model.context_length is None else model.context_length - used.num_virtual_tokens
    most = config.max_new_tokens or (None if config.max_length else _NEW_TOKENS)
    if prompt is None or raw or (prompt.record.task, prompt.record.template) == ("text", DEFAULT_TEMPLATE["text"]):
        inputs = [_plain(model, text, f"text {number}") for number, text in enumerate(texts, start=1)]
    else:
        rows = _input_rows(prompt, texts)
        longest = prompt.record.max_length
        if positions is not None:  # a text is cut for 64 new tokens at most; more are written only if they fit
            longest = min(longest, positions - min(most or 1, _NEW_TOKENS))
        if longest < 2:
            raise SettingsError(
                f"{used.num_virtual_tokens} virtual tokens leave no room for text: the model has "
                f"{model.context_length} positions"
            )
        encoder = Encoder(model.tokenizer, prompt.format, longest, model.vocabulary_size)
        inputs = [list(ids) for ids in encoder.inputs(rows)]
        if encoder.truncated:
            warnings.warn(f"{encoder.truncated} of {len(rows)} texts were cut to {longest} tokens", stacklevel=3)
    room = [_room(ids, most, config.max_length, positions) for ids in inputs]
    return continue_ids(model, used, inputs, room, config)


def _plain(model: FrozenModel, text: str | Mapping[str, object], where: str) -> list[int]:
    if not isinstance(text, str):
        raise SettingsError("without a template, texts must be strings, not dictionaries of columns")
    ids = [*bos_token_ids(model.tokenizer), *plain_ids(model.tokenizer, text)]
    require_embeddings(model.tokenizer, ids, model.vocabulary_size, where)
    return ids


def _input_rows(prompt: Prompt, texts: Sequence[str | Mapping[str, object]]) -> list[Row]:
    """Return texts as rows of a prompt's columns."""
    columns, rows = prompt.format.columns, list[Row]()
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            rows.append(input_row(prompt, text, f"text {number}"))
        elif len(columns) == 1:
            rows.append({columns[0]: text})
        else:
            raise SettingsError(
                f"the prompt's template {prompt.record.template!r} names the columns {', '.join(columns)}; "
                "give dictionaries of them from Python, or the whole text with --raw"
            )
    return rows


def input_columns(prompt: Prompt | None) -> list[str]:
    """Return the columns of a prompt's input; the base model reads `text`."""
    return prompt.format.columns if prompt is not None else ["text"]


def require_columns(prompt: Prompt | None, map: Mapping[str, str]) -> None:
    """Make sure that a prompt reads the columns that are mapped."""
    columns = input_columns(prompt)
    unknown = next((column for column in map if column not in columns), None)
    if unknown is not None:
        raise SettingsError(
            f"--map {unknown}={map[unknown]}: the prompt reads {', '.join(columns)}{nearest(unknown, columns)}"
        )


def input_row(
    prompt: Prompt | None, record: Mapping[str, object], where: str, map: Mapping[str, str] | None = None
) -> Row:
    """Return the columns of a record that a prompt's template names, as texts.

    Args:
        prompt: None for the base model.
        record: a row as it was read. Some of several columns may be empty, and the `input` beside an `instruction` may
            be missing.
        where: the row, for messages.
        map: the template's column names to the record's.

    Raises:
        DataError: a column is missing, holds no text, or all are empty.
    """
    columns = input_columns(prompt)
    sources = {column: (map or {}).get(column, column) for column in columns}
    if len(columns) == len(record) == 1 and sources[columns[0]] not in record and not map:
        sources = {columns[0]: next(iter(record))}
    if set(INSTRUCTED) <= sources.keys():
        record = {sources[INSTRUCTED[1]]: None, **record}
    for column, source in sources.items():
        if source not in record:
            raise DataError(
                f"{where}: it has no column {source!r}{nearest(source, record)}, which the prompt's template names; it "
                f"has {', '.join(record)}. Say which one it is, with --map {column}=…"
            )
    may_be_empty = len(columns) > 1  # as long as another column is not
    row = {
        column: "" if may_be_empty and _is_nothing(record[source]) else scalar_text(record[source], source, where)
        for column, source in sources.items()
    }
    if all(is_blank(text) for text in row.values()):
        which = ", ".join(repr(source) for source in sources.values())
        raise DataError(f"{where}: the column{f's {which} are' if len(sources) > 1 else f' {which} is'} empty")
    require_characters(row, where)
    return row


def _is_nothing(value: object) -> bool:
    return value is None or value == ""


def _room(ids: Sequence[int], most: int | None, max_length: int | None, positions: int | None) -> int:
    """Return how many tokens can follow a text; `positions` are those that the model has left, None for no limit."""
    if max_length is not None and len(ids) >= max_length:
        raise SettingsError(f"max_length {max_length} counts the text's own {len(ids)} tokens too; give more")
    if positions is not None and len(ids) >= positions:
        raise SettingsError(f"the text has {len(ids)} tokens, and the model has positions for {positions}; shorten it")
    limits = [limit - len(ids) for limit in (max_length, positions) if limit is not None]
    return min([*limits, most] if most is not None else limits)
