"""The encoder: rows become token ids."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from softprompt.data.chat import Chat, prints_date
from softprompt.data.example import Choices, Example, common_start
from softprompt.data.label_tree import label_tree
from softprompt.data.rows import Row, Rows
from softprompt.data.special_tokens import Encoded, MarkedText, SpecialTokens
from softprompt.data.templates import Format
from softprompt.errors import DataError, ModelError, SettingsError, nearest


@dataclass
class Encoder:
    """Turns rows into token ids, the same way in training, evaluation and generation.

    Order in a row: BOS (if the tokenizer adds one; a chat template brings its own), input, target. Input and target
    are tokenized together and split at the character where they meet; a token across it belongs to the target.
    `<|endoftext|>` in a row is text; in the template and in the chat template it is the special token.

    Attributes:
        tokenizer: a fast tokenizer.
        format: how rows become text.
        max_length: the most text tokens of an example; longer inputs are truncated, targets never.
        vocabulary: how many tokens the model has embeddings of; None if unknown.
        truncated: how many rows have been truncated so far.
    """

    tokenizer: PreTrainedTokenizerBase
    format: Format
    max_length: int
    vocabulary: int | None = None
    truncated: int = 0

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ModelError(
                "this model's tokenizer gives no character offsets (it is a slow one); use a fast tokenizer"
            )
        self._special = SpecialTokens.of(self.tokenizer)
        self._chat = Chat(self.tokenizer, self.format.chat_date)
        if self.format.chat_template:
            self._require_chat()
        self._demonstrated = self._special.mark(self.format.demonstrated_pieces)
        self.bos_ids = () if self.format.chat_template else bos_token_ids(self.tokenizer)
        self._candidate_ids: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {}
        self.ends = self.format.task == "completion" or self._one_begins_another()
        if self.ends and not self.format.end and self.tokenizer.eos_token_id is None:
            raise ModelError(
                "this model's tokenizer has no end-of-text token, which this task's targets have to end with"
            )

    def _require_chat(self) -> None:
        """Check the chat template before any row is read."""
        if not self.tokenizer.chat_template:
            raise SettingsError("this model's tokenizer has no chat template; leave chat_template out")
        self._chat.around("a")
        if self.format.chat_date is None and prints_date(self.tokenizer):
            warnings.warn(
                "the chat template prints the date, and this prompt was tuned before dates were recorded: it reads "
                "today's, and the same text gives other tokens on another day. Tune it again",
                stacklevel=4,
            )

    def _one_begins_another(self) -> bool:
        """Tell whether one label is a token prefix of another; then all labels end with the end-of-text token."""
        texts = self.format.verbalizers.values()
        # After a line break the tokens differ from those after a space.
        both = [MarkedText.plain(f"{before}{text}") for before in (" ", "\n") for text in texts]
        encoded = [tuple(each.ids) for each in self._encode(both)]
        spaced, broken = encoded[: len(texts)], encoded[len(texts) :]
        return any(a != b and b[: len(a)] == a for each in (spaced, broken) for a in each for b in each)

    def _encode(self, texts: Sequence[MarkedText]) -> list[Encoded]:
        return self._special.encode(self.tokenizer, texts) if texts else []

    def _input(self, row: Row, where: str) -> MarkedText:
        try:
            marked = self._special.mark(self.format.pieces(row))
        except SettingsError as error:
            raise SettingsError(f"{where}: {error}") from error
        return self._special.in_chat(marked, self._chat.around) if self.format.chat_template else marked

    def examples(self, rows: Rows) -> list[Example]:
        """Return an example for each row.

        Raises:
            DataError: a label without a verbalizer, or a target that does not fit in `max_length`.
        """
        self._check(rows)
        return [self.example(row, rows.where(i)) for i, row in enumerate(rows)]

    def example(self, row: Row, where: str) -> Example:
        """Return the example of one row, which errors call `where`; its label must have a verbalizer."""
        if self.format.task == "text":
            return self._text(row, where)
        target = self.format.target(row)
        return self._encode_to_fit(row, lambda text: self._with_targets(text, [target]), where)[0]

    def with_candidates(self, row: Row, example: Example) -> Example:
        """Return the example of a row with its candidate tokens, which are the same after all inputs.

        A target that is not known, because of a token across the border, has its own tokens as only candidates.
        """
        target = example.ids[example.start :]
        if target not in self._candidate_ids:
            variants = self._with_targets(self._input(row, "a row"), self.format.verbalizers.values())
            _, tails = _split_common(variants)
            for variant, candidates in zip(variants, label_tree(tails).candidate_ids(), strict=True):
                self._candidate_ids[variant.ids[variant.start :]] = candidates[len(candidates) - variant.targets :]
            self._candidate_ids.setdefault(target, tuple((token,) for token in target))
        return example._replace(candidate_ids=self._candidate_ids[target])

    def choices(self, rows: Rows) -> list[Choices]:
        """Return, for each row, its input and the tokens of every label after it."""
        self._check(rows)
        made = []
        labels = self.format.verbalizers.values()
        for i, row in enumerate(rows):  # truncated for the longest label
            variants = self._encode_to_fit(row, lambda text: self._with_targets(text, labels), rows.where(i))
            input_ids, tails = _split_common(variants)
            if not input_ids:
                raise DataError(f"{rows.where(i)}: the template leaves no text before the label")
            self._require_different(tails)
            made.append(Choices(input_ids, tails))
        return made

    def inputs(self, rows: Sequence[Row]) -> list[tuple[int, ...]]:
        """Return the ids of each row's input, as they precede a target."""

        def alone(text: MarkedText) -> list[Example]:
            ids = (*self.bos_ids, *self._encode([text])[0].ids)
            return [Example(ids, len(ids))]

        return [self._encode_to_fit(row, alone, f"text {n}")[0].ids for n, row in enumerate(rows, start=1)]

    def _require_different(self, tails: Sequence[tuple[int, ...]]) -> None:
        """Make sure that labels differ in their tokens."""
        by_tokens: dict[tuple[int, ...], str] = {}
        for (label, text), tail in zip(self.format.verbalizers.items(), tails, strict=True):
            other = by_tokens.setdefault(tail, label)
            if other != label:
                raise SettingsError(
                    f"the labels {other!r} and {label!r} have the same tokens in this model (their verbalizers are "
                    f"{self.format.verbalizers[other]!r} and {text!r}); give one of them another verbalizer"
                )

    def _check(self, rows: Rows) -> None:
        rows.require_inputs(self.format.columns)
        if self.format.task != "classification":
            return
        known = self.format.verbalizers
        for i, row in enumerate(rows):
            if row["label"] not in known:
                raise DataError(
                    f"{rows.where(i)}: the label {row['label']!r} is not one that was learned: "
                    f"{', '.join(known)}{nearest(row['label'], known)}"
                )

    def _text(self, row: Row, where: str) -> Example:
        (encoded,) = self._encode([self._input(row, where)])
        ids, start = (*self.bos_ids, *encoded.ids), len(self.bos_ids)
        after = start + encoded.inside(self._demonstrated)
        if self.format.demonstrations:
            # Without BOS, nothing predicts the first token of a text; the targets are the same with demonstrations.
            start = after if self.bos_ids else after + 1
            if start >= self.max_length:
                raise DataError(
                    f"{where}: the demonstrations alone have {start} tokens, but max_length is {self.max_length}; "
                    "raise max_length, or show fewer"
                )
        self.truncated += len(ids) > self.max_length
        ids = ids[: self.max_length]
        require_embeddings(self.tokenizer, ids, self.vocabulary, where)
        return Example(ids, start)

    def _encode_to_fit(self, row: Row, encode: Callable[[MarkedText], list[Example]], where: str) -> list[Example]:
        """Encode a row's input with one target or several, shortening its longest column until all fit.

        The demonstrations, the template's own text and the target stay whole.
        """
        examples = encode(self._input(row, where))
        for example in examples:
            if example.targets >= self.max_length:
                raise DataError(
                    f"{where}: the target alone has {example.targets} tokens, but max_length is {self.max_length}; "
                    "raise max_length, or shorten the target"
                )
        self.truncated += max(len(example.ids) for example in examples) > self.max_length
        short = dict(row)
        while (excess := max(len(example.ids) for example in examples) - self.max_length) > 0:
            longest = max((c for c in self.format.columns if c in short), key=lambda column: len(short[column]))
            starts = [start for start, _ in self._encode([MarkedText.plain(short[longest])])[0].offsets]
            if not starts:
                note = ", after the demonstrations," if self.format.demonstrations else ""
                raise DataError(f"{where}: the template's own text{note} does not fit in max_length {self.max_length}")
            cut = starts[max(len(starts) - excess, 0)]
            # At least one character: some offsets leave out the space that a token begins with.
            short[longest] = short[longest][: min(cut, len(short[longest]) - 1)]
            examples = encode(self._input(short, where))
        for example in examples:
            require_embeddings(self.tokenizer, example.ids, self.vocabulary, where)
        return examples

    def _with_targets(self, text: MarkedText, targets: Iterable[str]) -> list[Example]:
        """Return an example for each of several targets after one input; all are tokenized in one call."""
        end = self.format.end if self.ends else ""
        ending = [self.tokenizer.eos_token_id] if self.ends and not end else []
        encoded = self._encode([text + (self.format.join_target(text.text, target) + end) for target in targets])
        first = len(self.bos_ids)
        return [Example((*self.bos_ids, *each.ids, *ending), first + each.inside(text)) for each in encoded]


def _split_common(variants: Sequence[Example]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Return the ids that all variants share before their targets, and the rest of each."""
    input_ids = common_start([variant.ids[: variant.start] for variant in variants])
    return input_ids, tuple(variant.ids[len(input_ids) :] for variant in variants)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return a text's tokens, without BOS and EOS."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return a text's tokens, none of them special: the text of a special token is characters."""
    return SpecialTokens.of(tokenizer).encode(tokenizer, [MarkedText.plain(text)])[0].ids


def require_embeddings(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], vocabulary: int | None, where: str
) -> None:
    """Make sure that the model has an embedding of each token. It has `vocabulary` embeddings; None if unknown."""
    if vocabulary is None or max(ids, default=0) < vocabulary:
        return
    token = next(i for i in ids if i >= vocabulary)
    raise DataError(
        f"{where}: the token {tokenizer.convert_ids_to_tokens(token)!r} has the id {token}, and the model has "
        f"embeddings of {vocabulary} tokens only: it was added to the tokenizer alone. Give the model "
        f"embeddings of {len(tokenizer)} (resize_token_embeddings, then train them), or take it out of the tokenizer"
    )


def bos_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that the tokenizer puts before every text: usually a BOS token, or nothing."""
    plain = token_ids(tokenizer, "a")
    special: list[int] = tokenizer("a")["input_ids"]
    length = next((k for k in range(len(special)) if special[k : k + len(plain)] == plain), 0)
    return tuple(special[:length])
