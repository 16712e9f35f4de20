"""Examples: token ids of an input and of the target to predict after it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from softprompt.data.rows import Row, Rows
from softprompt.data.templates import Format
from softprompt.errors import DataError, ModelError, SettingsError, nearest


class Example(NamedTuple):
    """Token ids, of which those from `start` on are the target.

    Where `among` is not empty, it holds for each target token those that some label goes on with there, itself too.
    """

    ids: tuple[int, ...]
    start: int
    among: tuple[tuple[int, ...], ...] = ()

    @property
    def targets(self) -> int:
        """How many tokens are predicted."""
        return len(self.ids) - self.start

    @property
    def predicted(self) -> Example:
        """Itself without a target that nothing predicts: a text's very first token, where no prompt stands before."""
        return self if self.start else self._replace(start=1, among=self.among[1:])


@dataclass(frozen=True)
class Choices:
    """The ways that a row of a classification task can go on.

    Attributes:
        stem: ids that all labels share, the input among them.
        tails: per label (in the order of the verbalizers), the ids that follow the stem.
    """

    stem: tuple[int, ...]
    tails: tuple[tuple[int, ...], ...]


@dataclass
class Encoder:
    """Turns rows into token ids, the same way in training, evaluation and generation.

    Order in a row: BOS (if the tokenizer adds one; a chat template brings its own), input, target. Input and target
    are tokenized together and split at the character where they meet; a token that straddles it counts as target.

    Attributes:
        tokenizer: a fast tokenizer.
        format: how rows become text.
        max_length: the most real tokens of an example; longer inputs are cut, targets never.
        truncated: how many rows were cut so far.
    """

    tokenizer: PreTrainedTokenizerBase
    format: Format
    max_length: int
    truncated: int = 0

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ModelError(
                "this model's tokenizer gives no character offsets (it is a slow one); use a fast tokenizer"
            )
        if self.format.chat_template and not self.tokenizer.chat_template:
            raise SettingsError("this model's tokenizer has no chat template; leave chat_template out")
        self.leading = () if self.format.chat_template else leading_tokens(self.tokenizer)
        self._among: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {}
        self.ends = self.format.task == "completion" or self._one_begins_another()
        if self.ends and not self.format.end and self.tokenizer.eos_token_id is None:
            raise ModelError(
                "this model's tokenizer has no end-of-text token, which this task's targets have to end with"
            )

    def _one_begins_another(self) -> bool:
        """Tell whether one label's tokens are how another's begin; then all labels end with the end-of-text token."""
        texts = self.format.verbalizers.values()
        for before in (" ", "\n"):  # behind a line break the tokens are others than behind a space
            encoded = [tuple(token_ids(self.tokenizer, f"{before}{text}")) for text in texts]
            if any(a != b and b[: len(a)] == a for a in encoded for b in encoded):
                return True
        return False

    def _input(self, row: Row) -> str:
        text = self.format.input(row)
        if not self.format.chat_template:
            return text
        chat = [{"role": "user", "content": text}]
        return str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    def examples(self, rows: Rows) -> list[Example]:
        """Return an example for each row.

        Raises:
            DataError: a label without a verbalizer, or a target that does not fit in `max_length`.
        """
        rows.require_inputs(self.format.columns)
        self._check_labels(rows)
        return [self.example(row, rows.where(i)) for i, row in enumerate(rows)]

    def example(self, row: Row, where: str) -> Example:
        """Return the example of one row, whose label has a verbalizer; errors name it by `where`."""
        if self.format.task == "text":
            return self._text(row, where)
        target = self.format.target(row)
        return self._fitted(row, lambda text: [self._joined(text, target)], where)[0]

    def among_labels(self, row: Row, example: Example) -> Example:
        """Return a row's example along with what labels go on with, which is the same behind all inputs.

        But for a token that straddles the border: of a target that is not known, no token is told from others.
        """
        target = example.ids[example.start :]
        if target not in self._among:
            text = self._input(row)
            variants = [self._joined(text, label) for label in self.format.verbalizers.values()]
            _, tails = _parted(variants)
            begun = defaultdict(set)
            for tail in tails:
                for place, token in enumerate(tail):
                    begun[tail[:place]].add(token)
            goes_on = {beginning: tuple(sorted(tokens)) for beginning, tokens in begun.items()}
            for variant, tail in zip(variants, tails, strict=True):
                places = range(len(tail) - variant.targets, len(tail))
                self._among[variant.ids[variant.start :]] = tuple(goes_on[tail[:place]] for place in places)
            self._among.setdefault(target, tuple((token,) for token in target))
        return example._replace(among=self._among[target])

    def choices(self, rows: Rows) -> list[Choices]:
        """Return, for each row, its input and the tokens of every label behind it."""
        rows.require_inputs(self.format.columns)
        self._check_labels(rows)
        made = []
        for i, row in enumerate(rows):
            stem, tails = _parted(self._variants(row, rows.where(i)))
            if not stem:
                raise DataError(f"{rows.where(i)}: the template leaves no text before the label")
            if len(set(tails)) < len(tails):
                raise SettingsError("two labels have the same tokens in this model; give them other verbalizers")
            made.append(Choices(stem, tails))
        return made

    def inputs(self, rows: Sequence[Row]) -> list[tuple[int, ...]]:
        """Return the ids of each row's input alone, as they stand before a target."""

        def alone(text: str) -> list[Example]:
            ids = (*self.leading, *token_ids(self.tokenizer, text))
            return [Example(ids, len(ids))]

        return [self._fitted(row, alone, f"text {n}")[0].ids for n, row in enumerate(rows, start=1)]

    def _check_labels(self, rows: Rows) -> None:
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
        ids, behind = self._split(self._input(row), len(self.format.demonstrated))
        start = len(self.leading)
        if self.format.demonstrations:
            # Without them, nothing predicts a text's first token if no other leads; with them, the same tokens count.
            start = behind if self.leading else behind + 1
            if start >= self.max_length:
                raise DataError(
                    f"{where}: the demonstrations alone have {start} tokens, but max_length is {self.max_length}; "
                    "raise max_length, or show fewer"
                )
        self.truncated += len(ids) > self.max_length
        return Example(ids[: self.max_length], start)

    def _variants(self, row: Row, where: str) -> list[Example]:
        """Return an example for every label, all behind the same input: the longest label says where it is cut."""
        targets = self.format.verbalizers.values()
        return self._fitted(row, lambda text: [self._joined(text, target) for target in targets], where)

    def _fitted(self, row: Row, encode: Callable[[str], list[Example]], where: str) -> list[Example]:
        """Encode a row's input in one way or several, and shorten its longest column until the longest of them fits.

        The demonstrations, the template's own words and the target stay whole.
        """
        examples = encode(self._input(row))
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
            offsets = self.tokenizer(short[longest], add_special_tokens=False, return_offsets_mapping=True)
            starts = [start for start, _ in offsets["offset_mapping"]]
            if not starts:
                ahead = ", behind the demonstrations," if self.format.demonstrations else ""
                raise DataError(f"{where}: the template's own text{ahead} does not fit in max_length {self.max_length}")
            cut = starts[max(len(starts) - excess, 0)]
            # At least one letter: some offsets leave out the space that a token begins with.
            short[longest] = short[longest][: min(cut, len(short[longest]) - 1)]
            examples = encode(self._input(short))
        return examples

    def _joined(self, text: str, target: str) -> Example:
        end = self.format.end if self.ends else ""
        ids, start = self._split(text + self.format.joined(text, target) + end, len(text))
        ending = [self.tokenizer.eos_token_id] if self.ends and not end else []
        return Example((*ids, *ending), start)

    def _split(self, whole: str, border: int) -> tuple[tuple[int, ...], int]:
        """Return a text's ids, and which is the first that reaches beyond a character."""
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        inside = sum(1 for _, end in encoded["offset_mapping"] if end <= border)
        return (*self.leading, *encoded["input_ids"]), len(self.leading) + inside


def _parted(variants: Sequence[Example]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Return what comes before all targets of one input, and what follows that in each variant."""
    stem = common_start([variant.ids[: variant.start] for variant in variants])
    return stem, tuple(variant.ids[len(stem) :] for variant in variants)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return a text's tokens, without those that the tokenizer puts around texts."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return what the tokenizer puts before every text: a BOS token mostly, or nothing."""
    plain = token_ids(tokenizer, "a")
    special: list[int] = tokenizer("a")["input_ids"]
    ahead = next((k for k in range(len(special)) if special[k : k + len(plain)] == plain), 0)
    return tuple(special[:ahead])


def common_start(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the longest run of ids that all sequences begin with."""
    if not sequences:
        return ()
    low, high = (
        min(map(tuple, sequences)),
        max(map(tuple, sequences)),
    )  # in dictionary order, only the outermost two can differ sooner
    length = 0
    while length < min(len(low), len(high)) and low[length] == high[length]:
        length += 1
    return low[:length]


def shared_text(examples: Sequence[Example]) -> tuple[int, ...]:
    """Return the ids that all examples begin with, up to their first targets: they can belong to the prefix."""
    return common_start([example.ids[: example.start] for example in examples])
