"""Special tokens: `<|endoftext|>` in a column of data is these characters, not the special token."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from softprompt.data.rendering import Piece

_FRAME = "\U0010fffd"  # a private-use character: no tokenizer has it, or merges it with its neighbours


@dataclass(frozen=True)
class MarkedText:
    """A text in which real special tokens are marked.

    Attributes:
        text: as people read it.
        with_placeholders: the same with a placeholder for each real special token.
        special: the number of real special tokens.
    """

    text: str
    with_placeholders: str
    special: int = 0

    @classmethod
    def plain(cls, text: str) -> MarkedText:
        """Return a text without real special tokens."""
        return cls(text, text)

    def __add__(self, text: str) -> MarkedText:
        return MarkedText(self.text + text, self.with_placeholders + text, self.special)


class Encoded(NamedTuple):
    """Token ids and the characters of each: positions in `with_placeholders` if `uses_placeholders`, else in `text`."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    uses_placeholders: bool

    def inside(self, beginning: MarkedText) -> int:
        """Return how many tokens end within `beginning`."""
        border = len(beginning.with_placeholders if self.uses_placeholders else beginning.text)
        return sum(1 for _, end in self.offsets if end <= border)


class SpecialTokens:
    """Distinguishes the special tokens of a tokenizer from text that looks like them.

    A tokenizer finds special tokens wherever their text occurs. So the real ones are replaced by random placeholders,
    and a copy of the tokenizer, the placeholder tokenizer, knows the special tokens by these. It is used only if the
    tokenizer finds another number of special tokens than there are: for nearly all texts one call is enough.
    """

    _known: ClassVar[WeakKeyDictionary[PreTrainedTokenizerBase, SpecialTokens]] = WeakKeyDictionary()

    def __init__(self, tokenizer: PreTrainedTokenizerBase, contents: dict[int, str]) -> None:
        self.contents = contents
        nonce = secrets.token_hex(8)
        self._placeholders = {content: f"{_FRAME}{nonce}{number}{_FRAME}" for number, content in contents.items()}
        self._literal_placeholders = {
            content: f"{_FRAME}-{nonce}{number}{_FRAME}" for number, content in contents.items()
        }
        self._originals = {
            placeholder: content
            for content, placeholder in (*self._placeholders.items(), *self._literal_placeholders.items())
        }
        longest_first = sorted(contents.values(), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._placeholder_pattern = re.compile(f"{_FRAME}{nonce}[0-9]+{_FRAME}")
        self._literal_pattern = re.compile(f"{_FRAME}-{nonce}[0-9]+{_FRAME}")
        self._backend: Tokenizer = tokenizer.backend_tokenizer

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
        """Return those of a fast tokenizer, cached: the placeholder tokenizer of a large one takes a second to make."""
        contents = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        known = cls._known.get(tokenizer)
        if known is None or known.contents != contents:
            known = cls._known[tokenizer] = cls(tokenizer, contents)
        return known

    def in_text(self, text: str) -> bool:
        """Tell whether a text contains the text of one."""
        return self._pattern.search(text) is not None

    def mark(self, pieces: Iterable[Piece]) -> MarkedText:
        """Join pieces. Special tokens are real in the template's own text, and characters elsewhere."""
        texts, with_placeholders, special = list[str](), list[str](), 0
        for own, group in groupby(pieces, key=lambda piece: piece.own):
            text = "".join(piece.text for piece in group)
            texts.append(text)
            meant, found = self._insert_placeholders(text) if own else (text, 0)
            with_placeholders.append(meant)
            special += found
        return MarkedText("".join(texts), "".join(with_placeholders), special)

    def in_chat(self, content: MarkedText, chat: Callable[[str], str]) -> MarkedText:
        """Put a message into a chat, whose own special tokens are all real."""
        if not self.in_text(content.with_placeholders):
            text = chat(content.text)
            return MarkedText(text, *self._insert_placeholders(text))
        around = chat(self._pattern.sub(lambda match: self._literal_placeholders[match[0]], content.with_placeholders))
        with_placeholders = self._literal_pattern.sub(self._original, self._insert_placeholders(around)[0])
        text, special = self._placeholder_pattern.subn(self._original, with_placeholders)
        return MarkedText(text, with_placeholders, special)

    def encode(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[MarkedText]) -> list[Encoded]:
        """Tokenize texts, without BOS and EOS."""
        found = tokenizer([each.text for each in texts], add_special_tokens=False, return_offsets_mapping=True)
        encoded = []
        for text, ids, offsets in zip(texts, found["input_ids"], found["offset_mapping"], strict=True):
            if sum(1 for i in ids if i in self.contents) == text.special:
                encoded.append(Encoded(ids, offsets, uses_placeholders=False))
            else:
                encoding = self._placeholder_tokenizer.encode(text.with_placeholders, add_special_tokens=False)
                encoded.append(Encoded(encoding.ids, encoding.offsets, uses_placeholders=True))
        return encoded

    def _insert_placeholders(self, text: str) -> tuple[str, int]:
        return self._pattern.subn(lambda match: self._placeholders[match[0]], text)

    def _original(self, match: re.Match[str]) -> str:
        return self._originals[match[0]]

    @cached_property
    def _placeholder_tokenizer(self) -> Tokenizer:
        described = json.loads(self._backend.to_str())
        model, special = described["model"], set(self._placeholders)
        for token in described["added_tokens"]:
            if token["special"]:
                token["content"] = self._placeholders.get(token["content"], token["content"])
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._placeholders.get(piece, piece): number for piece, number in model["vocab"].items()}
        else:  # of a unigram model, which would find `</s>` among its pieces
            model["vocab"] = [[self._placeholders.get(piece, piece), score] for piece, score in model["vocab"]]
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if not special.intersection(_parts(merge))]
        if model.get("unk_token") in special:
            model["unk_token"] = self._placeholders[model["unk_token"]]
        tokenizer = Tokenizer.from_str(json.dumps(described))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer


def _parts(merge: Any) -> tuple[str, str, str]:
    """Return the two parts of a merge, and its result."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second, first + second
