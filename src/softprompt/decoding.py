"""Decoding: continuing token ids behind a prefix that is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from softprompt.config import GenerateConfig
from softprompt.errors import RunError, SettingsError
from softprompt.model.finite import describe_non_finite
from softprompt.model.frozen import FrozenModel
from softprompt.model.prefix import Prefix
from softprompt.prompt.ensemble import AnyPrompt

_COLDEST = 1e-30  # a temperature: lower ones are 0 in float32, and draw the same token


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
    prompt: AnyPrompt,
    inputs: Sequence[Sequence[int]],
    room: Sequence[int],
    config: GenerateConfig,
) -> list[str]:
    """Continue token ids after a prompt, or with the base model.

    Args:
        model: the frozen model.
        prompt: of an ensemble, the members' probabilities of the next token are averaged.
        inputs: token ids of each text; empty only after a soft prompt.
        room: per text, the most new tokens.
        config: decoding rules.
    """
    prefixes = model.shared_prefixes([member.weights for member in prompt.members], inputs)
    if not all(inputs) and any(prefix.last is None for prefix in prefixes):
        behind = "behind a deep prefix" if prompt.num_virtual_tokens else "without a prompt"
        raise SettingsError(f"the text is empty: {behind} there is nothing to continue; give some text")
    decoder = _Decoder(model, config)
    lines = []
    for i, ids in enumerate(inputs):
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + i) % 2**63)
        lines.append(_Line(i, list(ids), len(ids), room[i], generator))
    lines.sort(key=lambda line: line.given)
    for begin in range(0, len(lines), config.batch_size):
        batch = lines[begin : begin + config.batch_size]
        if config.num_beams == 1:
            decoder.decode(prefixes, batch)
        else:  # a text's beams are the batch
            for line in batch:
                decoder.search(prefixes, line)
    lines.sort(key=lambda line: line.index)
    return [decoder.finished_text(line) for line in lines]


class _Decoder:
    """Decodes by one set of rules."""

    def __init__(self, model: FrozenModel, config: GenerateConfig) -> None:
        self.model, self.config = model, config
        self.rules, self.ends = _rules(config), _end_ids(model)

    def decode(self, prefixes: Sequence[Prefix], lines: list[_Line]) -> None:
        """Add tokens to each line, the most probable or drawn ones, until it ends or its room is used up."""
        logits, ends = _read(self.model, prefixes, lines)
        rows, going = None, list(lines)
        while True:
            self._require_finite(logits)
            alive = []
            for place, (line, row) in enumerate(zip(going, logits.float().cpu(), strict=True)):
                token = self._choose(line, row)
                if token not in self.ends:
                    line.ids.append(token)
                    if len(line.ids) - line.given < line.room and not self._stops(line.ids, line.given):
                        alive.append(place)
            if not alive:
                return
            if rows is None:  # only now: no row is built for texts that end with their first token
                rows = _Continued(self.model, [ends[i] for i in alive])
            elif len(alive) < len(going):
                rows.select(alive)
            going = [going[i] for i in alive]
            logits = rows.read([line.ids[-1] for line in going])

    def search(self, prefixes: Sequence[Prefix], line: _Line) -> None:
        """Find a likely continuation by beam search, scored as transformers scores it.

        A continuation's score is its summed log-probability over its length (its end counted) to the power of
        `length_penalty`. The search ends when no running beam can become better than the worst of `num_beams`
        finished ones.
        """
        beams, penalty = self.config.num_beams, self.config.length_penalty
        logits, ends = _read(self.model, prefixes, [line])
        rows = _Continued(self.model, ends)
        running = [(0.0, line.ids)]
        finished: list[tuple[float, list[int]]] = []
        for length in range(1, line.room + 1):
            self._require_finite(logits)
            scores = self._ruled([ids for _, ids in running], logits.float().cpu().log_softmax(dim=-1))
            total = scores + torch.tensor([score for score, _ in running])[:, None]
            best = total.flatten().topk(min(2 * beams, total.numel()))
            going: list[tuple[float, list[int], int]] = []
            for rank, (score, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
                row, token = divmod(place, total.shape[1])
                ids = [*running[row][1], token]
                if token in self.ends or self._stops(ids, line.given):
                    if rank < beams:
                        finished.append((score / length**penalty, ids[:-1] if token in self.ends else ids))
                elif len(going) < beams:
                    going.append((score, ids, row))
            finished = sorted(finished, key=lambda f: -f[0])[:beams]
            if not going or (len(finished) == beams and finished[-1][0] >= going[0][0] / length**penalty):
                break
            if length == line.room:
                finished += [(score / length**penalty, ids) for score, ids, _ in going]
                break
            running = [(score, ids) for score, ids, _ in going]
            rows.select([row for _, _, row in going])
            logits = rows.read([ids[-1] for _, ids in running])
        line.ids = max(finished, key=lambda f: f[0])[1]

    def finished_text(self, line: _Line) -> str:
        """Return the new text, without the stop string that ended it."""
        text = self._text(line.ids, line.given)
        found = [text.index(stop) for stop in self.config.stop if stop in text]
        return text[: min(found)] if found else text

    def _text(self, ids: list[int], given: int) -> str:
        """Decode the new tokens behind the old ones: alone, some tokenizers drop the space they begin with."""

        def decode(ids: list[int]) -> str:
            tokenizer = self.model.tokenizer
            return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

        return decode(ids)[len(decode(ids[:given])) :]

    def _stops(self, ids: list[int], given: int) -> bool:
        if not self.config.stop:
            return False
        text = self._text(ids, given)
        return any(stop in text for stop in self.config.stop)

    def _ruled(self, ids: list[list[int]], scores: Tensor) -> Tensor:
        """Apply the rules to scores `[rows, V]` of what follows ids of one length."""
        return self.rules(torch.LongTensor(ids), scores) if self.rules else scores

    def _require_finite(self, logits: Tensor) -> None:
        """Refuse logits `[rows, V]` that say nothing: NaN among them, or an infinite largest one.

        That of single tokens may be minus infinity: some models rule tokens out so.
        """
        if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
            raise RunError(f"the model's logits are not finite: {describe_non_finite(self.model.hf_model)}")

    def _choose(self, line: _Line, logits: Tensor) -> int:
        scores = self._ruled([line.ids], logits.unsqueeze(0))[0]
        if not self.config.do_sample:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=line.generator))


class _Continued:
    """Lines that are continued a token at a time, by one model or by an ensemble's members.

    Args:
        model: the frozen model.
        ends: for each line, the prefixes that end with its text; a row each.
    """

    def __init__(self, model: FrozenModel, ends: Sequence[Sequence[Prefix]]) -> None:
        self.members = len(ends[0])
        self.rows = model.decode([prefix for each in ends for prefix in each])

    def select(self, lines: list[int]) -> None:
        """Keep some lines, in this order; one may be taken several times."""
        self.rows.select([line * self.members + member for line in lines for member in range(self.members)])

    def read(self, tokens: list[int]) -> Tensor:
        """Add a token to every line and return the logits after it, `[lines, V]`."""
        logits = self.rows.step([token for token in tokens for _ in range(self.members)])
        return _mixed(logits.unflatten(0, (-1, self.members)))


def _mixed(logits: Tensor) -> Tensor:
    """Return logits `[lines, V]` for those of an ensemble's members, `[lines, members, V]`: the mean probabilities'."""
    if logits.shape[1] == 1:
        return logits.squeeze(1)
    return logits.float().log_softmax(dim=-1).logsumexp(dim=1)


def _read(model: FrozenModel, prefixes: Sequence[Prefix], lines: list[_Line]) -> tuple[Tensor, list[list[Prefix]]]:
    """Run the given texts; return the logits after each, `[lines, V]`, and for each the prefixes that end with it."""
    read = [_read_behind(model, prefix, lines) for prefix in prefixes]
    ends = [list(each) for each in zip(*(ended for _, ended in read), strict=True)]
    return _mixed(torch.stack([logits for logits, _ in read], dim=1)), ends


def _read_behind(model: FrozenModel, prefix: Prefix, lines: list[_Line]) -> tuple[Tensor, list[Prefix]]:
    """Run the given texts behind one prefix."""
    shared_text_len = len(prefix.shared_text_ids)
    if all(len(line.ids) > shared_text_len for line in lines):
        return model.prefill(prefix, [line.ids[shared_text_len:] for line in lines])
    # Only empty texts end here: the prompt itself predicts their first token.
    assert prefix.last is not None
    ahead = model.backend.lm_head.logits(prefix.last)
    logits, prefixes = [], []
    for line in lines:
        after, extended = model.prefill(prefix, [line.ids]) if line.ids else (ahead, [prefix])
        logits.append(after)
        prefixes.extend(extended)
    return torch.cat(logits), prefixes


def _rules(config: GenerateConfig) -> LogitsProcessorList:
    """Return transformers' own processors, in its order."""
    rules = LogitsProcessorList()
    if config.repetition_penalty != 1.0:
        rules.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        rules.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.do_sample:
        if config.temperature != 1.0:
            rules.append(_FromTheTop())
            rules.append(TemperatureLogitsWarper(max(config.temperature, _COLDEST)))
        if config.top_k is not None:
            rules.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1.0:
            rules.append(TopPLogitsWarper(config.top_p))
    return rules


class _FromTheTop(LogitsProcessor):
    """Makes the largest score 0: what is drawn stays the same, and no low temperature takes scores beyond floats."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores - scores.amax(dim=-1, keepdim=True)  # type: ignore[return-value]


def _end_ids(model: FrozenModel) -> set[int]:
    """Return the ids that end a text: the tokenizer's and those of the model's generation settings."""
    configured = getattr(model.hf_model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return {int(i) for i in [*ids, model.tokenizer.eos_token_id] if i is not None}
