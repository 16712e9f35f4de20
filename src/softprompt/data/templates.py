"""Templates and verbalizers: the text of a row, and of a label."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from softprompt.data.columns import INPUT_COLUMN, INSTRUCTED, TARGET_COLUMN
from softprompt.data.labels import clean_label
from softprompt.data.rendering import Piece
from softprompt.data.rows import Row, Rows, Task
from softprompt.data.template_language import ParsedTemplate, parse_template, quote_template
from softprompt.data.values import SURROGATE
from softprompt.errors import SettingsError, nearest

DEFAULT_TEMPLATE: dict[Task, str] = {
    "classification": "{{ text }}\nLabel:",
    "completion": "{{ input }}\n",
    "text": "{{ text }}",
}
INSTRUCTION_TEMPLATE = (
    "{{ instruction }}\n{% if input|default('')|trim %}{{ input }}\n{% endif %}"  # for Alpaca's columns
)
_BLANK_LINE = "\n\n"  # after each demonstration


@dataclass(frozen=True)
class Format:
    """How the rows of a task become text.

    Attributes:
        template: of the input, in a part of Jinja (`template_language`) with columns: `{{ text }}`.
        verbalizers: the text of each label; empty unless the task is classification.
        chat_template: whether the input is a user's message in the model's chat template.
        demonstrations: rows that precede every input, with their targets (few-shot); in a chat, in the same message.
        chat_date: the day that the chat template prints, `2024-07-26`; None for today.
    """

    task: Task
    template: str
    verbalizers: Mapping[str, str]
    chat_template: bool = False
    demonstrations: tuple[Row, ...] = ()
    chat_date: str | None = None

    @cached_property
    def _parsed(self) -> ParsedTemplate:
        return parse_template(self.template)

    @cached_property
    def columns(self) -> list[str]:
        """The columns that the template uses, sorted."""
        return list(self._parsed.columns)

    @cached_property
    def demonstrated(self) -> str:
        """The text of all demonstrations, with which every input begins."""
        return _join(self.demonstrated_pieces)

    @cached_property
    def demonstrated_pieces(self) -> tuple[Piece, ...]:
        """The same in pieces."""
        return tuple(piece for row in self.demonstrations for piece in self._demonstration(row))

    def demonstration(self, row: Row) -> str:
        """Return a row's input and target, and the blank line after them."""
        return _join(self._demonstration(row))

    def _demonstration(self, row: Row) -> list[Piece]:
        pieces = self._own(row)
        if self.task != "text":
            pieces.append(Piece(_follow(_join(pieces), self.target(row)), own=False))
        return [*_strip_end(pieces), Piece(_BLANK_LINE, own=True)]

    @property
    def end(self) -> str:
        """The end of a target in demonstrations; empty if the end-of-text token ends it, as in a chat."""
        return _BLANK_LINE if self.demonstrations and not self.chat_template else ""

    def input(self, row: Row) -> str:
        """Return the demonstrations and a row's input, without spaces at its end: they belong to the target."""
        return self.demonstrated + _join(self._own(row))

    def pieces(self, row: Row) -> list[Piece]:
        """Return `input` in pieces."""
        return [*self.demonstrated_pieces, *self._own(row)]

    def _own(self, row: Row) -> list[Piece]:
        pieces = self._parsed.render(row)
        return pieces if self.task == "text" else _strip_end(pieces, " ")

    def target(self, row: Row) -> str:
        """Return a row's target, without what separates it from the input.

        A completion is unchanged, with its indentation. After demonstrations, white space at its end is removed, as in
        the demonstrations.
        """
        if self.task == "classification":
            return self.verbalizers[row["label"]]
        return row["target"].rstrip() if self.end else row["target"]

    def join_target(self, text: str, target: str) -> str:
        """Return the target as it follows the input: after a space, unless the input ends with white space.

        In a chat, and if it begins with a line break, it is unchanged.
        """
        return target if self.chat_template else _follow(text, target)

    def answer(self, text: str, target: str) -> str:
        """Return the text to compare a completion with: the target as it is learned, without the space before it."""
        learned = self.join_target(text, target)
        return learned.removeprefix(" ") if _continues_line(text) and not self.chat_template else learned


def _follow(text: str, target: str) -> str:
    stripped = target.lstrip()
    if not _continues_line(text) or "\n" in target[: len(target) - len(stripped)]:
        return target
    return f" {stripped}"


def _continues_line(text: str) -> bool:
    return bool(text) and not text[-1].isspace()


def _join(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _strip_end(pieces: Sequence[Piece], chars: str | None = None) -> list[Piece]:
    """Return pieces without the white space at their end."""
    left = list(pieces)
    while left:
        last = left.pop()
        if text := last.text.rstrip(chars):
            return [*left, Piece(text, last.own)]
    return left


def default_template(rows: Rows) -> str:
    """Return the template that is used if none is given."""
    return INSTRUCTION_TEMPLATE if rows.input_columns == INSTRUCTED else DEFAULT_TEMPLATE[rows.task]


def make_format(
    task: Task,
    labels: Sequence[str],
    template: str | None = None,
    verbalizers: Mapping[str, str] | None = None,
    chat_template: bool = False,
    default: str | None = None,
) -> Format:
    """Make a format, with defaults, and check it.

    Args:
        labels: all labels of the training rows.
        template: None for the default.
        verbalizers: texts of some or all labels; the default is the label itself, with spaces for underscores.
        chat_template: whether the model's chat template is used.
        default: the template if `template` is None; None for the task's.

    Raises:
        SettingsError: the template has no column, contains the answer or a syntax error, or verbalizers do not fit
            the labels.
    """
    made = Format(task, (default or DEFAULT_TEMPLATE[task]) if template is None else template, {})
    require_template(made)
    if chat_template and task == "text":
        raise SettingsError("plain text has no input for a chat; leave chat_template out, or map input and target")
    labels = list(dict.fromkeys(map(clean_label, labels)))  # as in rows
    given = {clean_label(label): text for label, text in (verbalizers or {}).items()}
    for label in given:
        if label not in labels:
            raise SettingsError(f"verbalizers name the label {label!r}{nearest(label, labels)}, which no row has")
    texts = {label: given.get(label, words).strip() for label, words in _as_words(labels).items()}
    for label, text in texts.items():
        if not text:
            raise SettingsError(f"the verbalizer of the label {label!r} is empty")
        if SURROGATE.search(text):
            raise SettingsError(f"the verbalizer {text!a} of the label {label!a} has half of a character")
    by_text: dict[str, str] = {}
    for label, text in texts.items():
        other = by_text.setdefault(text, label)
        if other != label:
            raise SettingsError(f"the labels {other!r} and {label!r} have the same verbalizer {text!r}; each needs one")
    return Format(task, made.template, texts, chat_template)


def require_template(form: Format) -> None:
    """Make sure that a template has no syntax error, uses a column, and does not use the target's."""
    if not form.columns:
        raise SettingsError(
            f"the template {quote_template(form.template)} names no column; "
            f"write one in double braces, {{{{ {INPUT_COLUMN[form.task]} }}}}"
        )
    if (answer := TARGET_COLUMN[form.task]) in form.columns:
        raise _reveals_answer(form, answer, f"the column {answer!r} is what is to be predicted")


def require_unseen_answer(form: Format, rows: Rows) -> None:
    """Make sure that the template uses no column that equals the target in every row.

    `--map label=stars` makes such a column of `stars`. If all rows have the same target, nothing is checked.
    """
    answer, asked = TARGET_COLUMN[form.task], INPUT_COLUMN[form.task]
    if answer is None:
        return
    for column in form.columns:
        if column != asked and column in rows[0] and _are_equal(rows, column, answer, asked):
            raise _reveals_answer(form, column, f"in {rows.name} the column {column!r} is the {answer} in every row")


def _are_equal(rows: Rows, column: str, answer: str, asked: str) -> bool:
    """Tell whether two columns are equal in every row, and not only because both equal the input."""
    answers, beyond = set[str](), False
    for row in rows:
        said = _normalize(row[answer])
        if _normalize(row.get(column, "")) != said:
            return False
        if len(answers) < 2:
            answers.add(said)
        beyond = beyond or _normalize(row[asked]) != said
    return len(answers) > 1 and beyond


def _normalize(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _reveals_answer(form: Format, column: str | None, why: str) -> SettingsError:
    written = f"{{{{ {column} }}}}" if (column or "").isidentifier() else f'{{{{ row["{column}"] }}}}'
    return SettingsError(
        f"the template {quote_template(form.template)} shows the answer: {why}. What is measured "
        f"with it would mean nothing; take {written} out of it"
    )


def _as_words(labels: Sequence[str]) -> dict[str, str]:
    """Return each label with spaces for underscores, so that `card_arrival` consists of words."""
    words = {label: label.replace("_", " ") for label in labels}
    return words if len(set(words.values())) == len(words) else dict(zip(labels, labels, strict=True))
