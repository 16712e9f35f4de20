"""Generation: continuing texts behind a prefix that is computed once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from softprompt.config import GenerateConfig
from softprompt.data.examples import Encoder, common_start, leading_tokens
from softprompt.data.templates import DEFAULT_TEMPLATE
from softprompt.errors import SettingsError
from softprompt.model.cached import positions
from softprompt.model.frozen import FrozenModel
from softprompt.model.prefix import Prefix
from softprompt.prompt.soft_prompt import SoftPrompt, require_fit

_ROWS_AT_ONCE = 16


def generate(
    model: FrozenModel,
    texts: Sequence[str | Mapping[str, str]],
    prompt: SoftPrompt | None = None,
    config: GenerateConfig | None = None,
    *,
    raw: bool = False,
    virtual_tokens: bool = True,
) -> list[str]:
    """Continue texts.

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
        SettingsError: the texts do not fit the template, or leave no room for new tokens.
    """
    config = config or GenerateConfig()
    if prompt is not None:
        require_fit(prompt, model)
    embeddings = prompt.embeddings if prompt is not None and virtual_tokens else None
    virtual = 0 if embeddings is None else len(embeddings)
    room_for = None if model.context_length is None else model.context_length - virtual
    most = config.max_new_tokens or (None if config.max_length else _usual_length(model, prompt))
    labels = prompt.record.verbalizers.values() if prompt is not None and not raw else ()
    if prompt is None or raw or (prompt.record.task, prompt.record.template) == ("text", DEFAULT_TEMPLATE["text"]):
        inputs = [_plain(model, text) for text in texts]
    else:
        rows = [_row(prompt, text) for text in texts]
        longest = (
            prompt.record.max_length if room_for is None else min(prompt.record.max_length, room_for - (most or 1))
        )
        inputs = [list(ids) for ids in Encoder(model.tokenizer, prompt.format, longest).inputs(rows)]
    room = [_room(ids, most, config.max_length, room_for) for ids in inputs]
    return [_label(text, labels) for text in continue_ids(model, embeddings, inputs, room, config)]


def _label(text: str, labels: Collection[str]) -> str:
    """Return the label that a text begins with, without what follows it: labels have no end of their own."""
    begun = [label for label in labels if text.strip().startswith(label)]
    return max(begun, key=len) if begun else text


def _plain(model: FrozenModel, text: str | Mapping[str, str]) -> list[int]:
    if not isinstance(text, str):
        raise SettingsError("without a template, texts must be strings, not dictionaries of columns")
    ids: list[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*leading_tokens(model.tokenizer), *ids]


def _row(prompt: SoftPrompt, text: str | Mapping[str, str]) -> dict[str, str]:
    if not isinstance(text, str):
        return dict(text)
    columns = prompt.format.columns
    if len(columns) > 1:
        raise SettingsError(
            f"the prompt's template {prompt.record.template!r} names the columns {', '.join(columns)}; "
            "give dictionaries of them from Python, or the whole text with --raw"
        )
    return {columns[0]: text}


def _usual_length(model: FrozenModel, prompt: SoftPrompt | None) -> int:
    """Return how many new tokens to make where nothing says it: a label needs no more than the longest of them."""
    if prompt is None or prompt.record.task != "classification":
        return 64
    before = "" if prompt.record.chat_template else " "
    labels = [f"{before}{text}" for text in prompt.record.verbalizers.values()]
    return max(len(ids) for ids in model.tokenizer(labels, add_special_tokens=False)["input_ids"])


def _room(ids: Sequence[int], most: int | None, max_length: int | None, positions: int | None) -> int:
    """Return how many tokens can follow a text; the model has `positions` for it, None for no limit."""
    if max_length is not None and len(ids) >= max_length:
        raise SettingsError(f"max_length {max_length} counts the text's own {len(ids)} tokens too; give more")
    if positions is not None and len(ids) >= positions:
        raise SettingsError(f"the text has {len(ids)} tokens, and the model has positions for {positions}; shorten it")
    limits = [limit - len(ids) for limit in (max_length, positions) if limit is not None]
    return min([*limits, most] if most is not None else limits)


@dataclass
class _Line:
    """One text on its way: its real ids so far, which are all that repetition penalties see."""

    index: int
    ids: list[int]
    given: int
    room: int
    generator: torch.Generator


@torch.no_grad()
def continue_ids(
    model: FrozenModel,
    prompt: Tensor | None,
    inputs: Sequence[Sequence[int]],
    room: Sequence[int],
    config: GenerateConfig,
) -> list[str]:
    """Continue token ids behind a soft prompt `[P, H]`, or behind none.

    Args:
        model: the frozen model.
        prompt: virtual tokens.
        inputs: ids of each text; empty only where there is a prompt.
        room: per text, the most new tokens.
        config: decoding rules.
    """
    if prompt is None and not all(inputs):
        raise SettingsError("the text is empty: without a prompt there is nothing to continue; give some text")
    rules = _rules(config)
    out = [""] * len(inputs)
    shortest = min((len(ids) for ids in inputs), default=0)
    prefix = model.prefix(prompt, common_start(inputs)[: max(shortest - 1, 0)])
    order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
    for begin in range(0, len(order), _ROWS_AT_ONCE):
        lines = []
        for i in order[begin : begin + _ROWS_AT_ONCE]:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + i)
            lines.append(_Line(i, list(inputs[i]), len(inputs[i]), room[i], generator))
        _decode(model, prefix, lines, rules, config.do_sample)
        for line in lines:
            out[line.index] = _text(model, line)
    return out


def _text(model: FrozenModel, line: _Line) -> str:
    """Decode the new tokens behind the old ones: alone, some tokenizers drop the space they begin with."""

    def decode(ids: list[int]) -> str:
        return str(model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return decode(line.ids)[len(decode(line.ids[: line.given])) :]


def _decode(model: FrozenModel, prefix: Prefix, lines: list[_Line], rules: LogitsProcessorList, sample: bool) -> None:
    """Add tokens to each line until it ends or its room is used up."""
    stops = _stop_ids(model)
    logits, prefixes = _read(model, prefix, lines)
    cache, mask = _left_padded(prefixes, model)
    at = torch.tensor([p.length for p in prefixes], device=model.device)
    going = list(lines)
    while True:
        chosen = [_choose(line, row, rules, sample) for line, row in zip(going, logits.float().cpu(), strict=True)]
        alive = []
        for place, (line, token) in enumerate(zip(going, chosen, strict=True)):
            if token not in stops:
                line.ids.append(token)
                if len(line.ids) - line.given < line.room:
                    alive.append(place)
        if not alive:
            return
        if len(alive) < len(going):
            kept = torch.tensor(alive, device=model.device)
            cache.batch_select_indices(kept)
            mask, at, going = mask[kept], at[kept], [going[i] for i in alive]
        mask = torch.cat([mask, mask.new_ones(len(going), 1)], dim=1)
        with model.way.lock:
            logits = model.hf_model(
                input_ids=torch.tensor([[line.ids[-1]] for line in going], device=model.device),
                past_key_values=cache,
                use_cache=True,
                attention_mask=mask,
                **positions(model.hf_model, at.unsqueeze(1)),
            ).logits[:, -1]
        at = at + 1


def _read(model: FrozenModel, prefix: Prefix, lines: list[_Line]) -> tuple[Tensor, list[Prefix]]:
    """Run the given texts; return the logits after each, `[lines, V]`, and the prefixes that end with them."""
    held = len(prefix.text)
    if all(len(line.ids) > held for line in lines):
        done = model.read(prefix, [line.ids[held:] for line in lines], extend=True)
        return done.logits, done.extended
    # Only empty texts end here: the prompt itself predicts their first token, and a stand-in is read for nothing.
    ahead = model.way.text_pass(prefix, [torch.tensor([0])], [torch.tensor([-1])]).logits
    logits, prefixes = [], []
    for line in lines:
        if line.ids:
            done = model.read(prefix, [line.ids], extend=True)
            logits.append(done.logits)
            prefixes.append(done.extended[0])
        else:
            logits.append(ahead)
            prefixes.append(prefix)
    return torch.cat(logits), prefixes


def _left_padded(prefixes: Sequence[Prefix], model: FrozenModel) -> tuple[DynamicCache, Tensor]:
    """Return one cache for all lines, `padding · prefix · text`, and its mask: what is real stays contiguous."""
    longest = max(prefix.length for prefix in prefixes)

    def stacked(which: str, layer: int) -> Tensor:
        tensors = [getattr(prefix, which)[layer] for prefix in prefixes]
        return torch.cat([torch.nn.functional.pad(t, (0, 0, longest - t.shape[2], 0)) for t in tensors])

    cache = DynamicCache()
    for layer in range(len(prefixes[0].keys)):
        cache.update(stacked("keys", layer), stacked("values", layer), layer)
    slots = torch.arange(longest, device=model.device)[None, :]
    begins = torch.tensor([longest - prefix.length for prefix in prefixes], device=model.device)[:, None]
    return cache, (slots >= begins).long()


def _choose(line: _Line, logits: Tensor, rules: LogitsProcessorList, sample: bool) -> int:
    scores = rules(torch.LongTensor([line.ids]), logits.unsqueeze(0))[0] if rules else logits
    if not sample:
        return int(scores.argmax())
    return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=line.generator))


def _rules(config: GenerateConfig) -> LogitsProcessorList:
    """Return transformers' own processors, in its order."""
    rules = LogitsProcessorList()
    if config.repetition_penalty != 1.0:
        rules.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        rules.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.do_sample:
        if config.temperature != 1.0:
            rules.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k is not None:
            rules.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1.0:
            rules.append(TopPLogitsWarper(config.top_p))
    return rules


def _stop_ids(model: FrozenModel) -> set[int]:
    """Return the ids that end a text: the tokenizer's and those of the model's generation settings."""
    configured = getattr(model.hf_model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return {int(i) for i in [*ids, model.tokenizer.eos_token_id] if i is not None}
