"""Words of completions; in scripts that are written without spaces, every character is one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

# Chinese and Japanese with their punctuation, Yi; Thai, Lao, Tibetan, Burmese, Khmer, Tai scripts, Balinese, Javanese.
NO_SPACES = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u1b00-\u1b7f\u2e80-\u2fdf\u3001-\u312f"
    "\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\ua980-\ua9ff\uaa60-\uaadf\uf900-\ufaff\uff01-\uff9f"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)
_TOKENIZER = Tokenizer13a()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Words:
    """How texts become words: the same for all outputs and right answers of a task.

    Attributes:
        right: the right answers. If one of them has a character of a script without spaces, each such character is a
            word in every text. Otherwise texts are split as sacrebleu and ROUGE split them.
    """

    right: Sequence[str]

    @cached_property
    def _characters(self) -> bool:
        return any(NO_SPACES.search(text) for text in self.right)

    def plain(self, text: str) -> list[str]:
        """Split a text at its spaces."""
        return (NO_SPACES.sub(r" \g<0> ", text) if self._characters else text).split()

    def tokens(self, text: str) -> list[str]:
        """Split a text into the tokens of BLEU: sacrebleu's tokenizer 13a also separates punctuation.

        The tokenizer drops some markup. A text of markup alone is split at its spaces.
        """
        apart = NO_SPACES.sub(r" \g<0> ", text) if self._characters else text
        return _TOKENIZER(apart.rstrip()).split() or text.split()
