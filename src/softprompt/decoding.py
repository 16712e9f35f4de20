"""Decoding: continuing token ids after a prefix that is computed once (`FrozenModel.shared_prefixes`)."""

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

_MIN_TEMPERATURE = 1e-30  # lower ones are 0 in float32, and sample the same token


@dataclass
class _Sequence:
    """A text that is continued.

    Attributes:
        ids: its real tokens, given and new: all that repetition penalties see.
    """

    ids: list[int]
    given: int
    room: int
    generator: torch.Generator


@torch.no_grad()
def continue_ids(
    model: FrozenModel, prompt: AnyPrompt, inputs: Sequence[Sequence[int]], room: Sequence[int], config: GenerateConfig
) -> list[str]:
    """Continue token ids after a prompt, or with the base model, and return the new text of each.

    Args:
        prompt: of an ensemble, the members' probabilities of the next token are averaged.
        inputs: token ids of each text; empty only after a soft prompt.
        room: for each text, the most new tokens.

    Raises:
        SettingsError: an empty text, and no soft prompt before it.
        RunError: logits that are not finite.
    """
    prefixes = model.shared_prefixes([member.weights for member in prompt.members], inputs)
    if not all(inputs) and any(prefix.last is None for prefix in prefixes):
        why = "after a learned prefix" if prompt.num_virtual_tokens else "without a prompt"
        raise SettingsError(f"the text is empty: {why} there is nothing to continue; give some text")
    decoder = _Decoder(model, config)
    sequences = []
    for i, ids in enumerate(inputs):
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + i) % 2**63)
        sequences.append(_Sequence(list(ids), len(ids), room[i], generator))
    by_length = sorted(sequences, key=lambda sequence: sequence.given)
    for begin in range(0, len(sequences), config.batch_size):
        batch = by_length[begin : begin + config.batch_size]
        if config.num_beams == 1:
            decoder.decode(prefixes, batch)
        else:  # a text's beams are the batch
            for sequence in batch:
                decoder.beam_search(prefixes, sequence)
    return [decoder.new_text(sequence) for sequence in sequences]


class _Decoder:
    """Decodes with one configuration."""

    def __init__(self, model: FrozenModel, config: GenerateConfig) -> None:
        self.model, self.config = model, config
        self.processors, self.eos_ids = _logits_processors(config), _eos_ids(model)

    def decode(self, prefixes: Sequence[Prefix], sequences: list[_Sequence]) -> None:
        """Add the most probable or sampled tokens to each sequence, until it ends or has no room left."""
        logits, extended = _prefill(self.model, prefixes, sequences)
        batch, running = None, list(sequences)
        while True:
            self._require_finite(logits)
            alive = []
            for i, (sequence, row) in enumerate(zip(running, logits.float().cpu(), strict=True)):
                token = self._choose(sequence, row)
                if token not in self.eos_ids:
                    sequence.ids.append(token)
                    full = len(sequence.ids) - sequence.given >= sequence.room
                    if not full and not self._stops(sequence.ids, sequence.given):
                        alive.append(i)
            if not alive:
                return
            if batch is None:  # only now: texts that end with their first token need no cache
                batch = _MembersBatch(self.model, [extended[i] for i in alive])
            elif len(alive) < len(running):
                batch.select(alive)
            running = [running[i] for i in alive]
            logits = batch.step([sequence.ids[-1] for sequence in running])

    def beam_search(self, prefixes: Sequence[Prefix], sequence: _Sequence) -> None:
        """Find a likely continuation by beam search, scored as transformers scores it.

        A continuation's score is its summed log-probability over its length (its end counted) to the power of
        `length_penalty`. The search ends when no running beam can become better than the worst of `num_beams`
        finished ones.
        """
        beams, penalty = self.config.num_beams, self.config.length_penalty
        logits, extended = _prefill(self.model, prefixes, [sequence])
        batch = _MembersBatch(self.model, extended)
        running = [(0.0, sequence.ids)]
        finished: list[tuple[float, list[int]]] = []
        for length in range(1, sequence.room + 1):
            self._require_finite(logits)
            scores = self._process([ids for _, ids in running], logits.float().cpu().log_softmax(dim=-1))
            total = scores + torch.tensor([score for score, _ in running])[:, None]
            best = total.flatten().topk(min(2 * beams, total.numel()))
            going: list[tuple[float, list[int], int]] = []
            for rank, (score, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
                row, token = divmod(place, total.shape[1])
                ids = [*running[row][1], token]
                if token in self.eos_ids or self._stops(ids, sequence.given):
                    if rank < beams:
                        finished.append((score / length**penalty, ids[:-1] if token in self.eos_ids else ids))
                elif len(going) < beams:
                    going.append((score, ids, row))
            finished = sorted(finished, key=lambda f: -f[0])[:beams]
            if not going or (len(finished) == beams and finished[-1][0] >= going[0][0] / length**penalty):
                break
            if length == sequence.room:
                finished += [(score / length**penalty, ids) for score, ids, _ in going]
                break
            running = [(score, ids) for score, ids, _ in going]
            batch.select([row for _, _, row in going])
            logits = batch.step([ids[-1] for _, ids in running])
        sequence.ids = max(finished, key=lambda f: f[0])[1]

    def new_text(self, sequence: _Sequence) -> str:
        """Return the new text, without the stop string that ended it."""
        text = self._text(sequence.ids, sequence.given)
        found = [text.index(stop) for stop in self.config.stop if stop in text]
        return text[: min(found)] if found else text

    def _text(self, ids: list[int], given: int) -> str:
        """Decode new tokens after the given ones: some tokenizers drop the space that a text begins with."""

        def decode(ids: list[int]) -> str:
            tokenizer = self.model.tokenizer
            return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

        return decode(ids)[len(decode(ids[:given])) :]

    def _stops(self, ids: list[int], given: int) -> bool:
        if not self.config.stop:
            return False
        text = self._text(ids, given)
        return any(stop in text for stop in self.config.stop)

    def _process(self, ids: list[list[int]], scores: Tensor) -> Tensor:
        """Apply the logits processors to scores `[rows, V]` of the token after ids of one length."""
        return self.processors(torch.LongTensor(ids), scores) if self.processors else scores

    def _require_finite(self, logits: Tensor) -> None:
        """Refuse logits `[rows, V]` with NaN or an infinite maximum.

        Those of single tokens may be minus infinity: some models exclude tokens so.
        """
        if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
            raise RunError(f"the model's logits are not finite: {describe_non_finite(self.model.hf_model)}")

    def _choose(self, sequence: _Sequence, logits: Tensor) -> int:
        scores = self._process([sequence.ids], logits.unsqueeze(0))[0]
        if not self.config.do_sample:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=sequence.generator))


class _MembersBatch:
    """A `DecodeBatch` with a row for every sequence and member of an ensemble.

    Args:
        prefixes: for each sequence, each member's prefix with the sequence's tokens in it.
    """

    def __init__(self, model: FrozenModel, prefixes: Sequence[Sequence[Prefix]]) -> None:
        self.members = len(prefixes[0])
        self.rows = model.backend.decode([prefix for each in prefixes for prefix in each])

    def select(self, sequences: list[int]) -> None:
        """Reduce the batch to some sequences, in this order; one may occur several times."""
        self.rows.select([i * self.members + member for i in sequences for member in range(self.members)])

    def step(self, tokens: list[int]) -> Tensor:
        """Add a token to every sequence and return the logits after it, `[sequences, V]`."""
        logits = self.rows.step([token for token in tokens for _ in range(self.members)])
        return _average(logits.unflatten(0, (-1, self.members)))


def _average(logits: Tensor) -> Tensor:
    """Return the logits of the members' mean probabilities, `[sequences, V]`, from `[sequences, members, V]`."""
    if logits.shape[1] == 1:
        return logits.squeeze(1)
    return logits.float().log_softmax(dim=-1).logsumexp(dim=1)


def _prefill(
    model: FrozenModel, prefixes: Sequence[Prefix], sequences: list[_Sequence]
) -> tuple[Tensor, list[list[Prefix]]]:
    """Run the given texts after each member's prefix.

    Returns:
        The logits after each sequence, `[sequences, V]`, and for each sequence the members' extended prefixes.
    """
    by_member = [_prefill_member(model, prefix, sequences) for prefix in prefixes]
    extended = [list(each) for each in zip(*(prefixes for _, prefixes in by_member), strict=True)]
    return _average(torch.stack([logits for logits, _ in by_member], dim=1)), extended


def _prefill_member(model: FrozenModel, prefix: Prefix, sequences: list[_Sequence]) -> tuple[Tensor, list[Prefix]]:
    shared_text_len = len(prefix.shared_text_ids)
    if all(len(sequence.ids) > shared_text_len for sequence in sequences):
        return model.backend.prefill(prefix, [sequence.ids[shared_text_len:] for sequence in sequences])
    # Some texts are empty, so none are shared: the prompt's last position predicts the first token of those.
    assert prefix.last is not None
    first = model.backend.lm_head.logits(prefix.last)
    done = [model.backend.prefill(prefix, [each.ids]) if each.ids else (first, [prefix]) for each in sequences]
    return torch.cat([logits for logits, _ in done]), [extended for _, (extended,) in done]


def _logits_processors(config: GenerateConfig) -> LogitsProcessorList:
    """Return transformers' logits processors, in its order."""
    processors = LogitsProcessorList()
    if config.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.do_sample:
        if config.temperature != 1.0:
            processors.append(_SubtractMaximum())
            processors.append(TemperatureLogitsWarper(max(config.temperature, _MIN_TEMPERATURE)))
        if config.top_k is not None:
            processors.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1.0:
            processors.append(TopPLogitsWarper(config.top_p))
    return processors


class _SubtractMaximum(LogitsProcessor):
    """Makes the largest score 0, so that a low temperature cannot overflow; the distribution stays the same."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores - scores.amax(dim=-1, keepdim=True)  # type: ignore[return-value]


def _eos_ids(model: FrozenModel) -> set[int]:
    """Return the ids that end a text: the tokenizer's and those of the model's generation config."""
    configured = getattr(model.hf_model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return {int(i) for i in [*ids, model.tokenizer.eos_token_id] if i is not None}
