"""Templates and verbalizers: how a row becomes text, and a label becomes text."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from softprompt.data.columns import INSTRUCTED
from softprompt.data.labels import clean_label
from softprompt.data.rendering import Piece
from softprompt.data.rows import INPUT_COLUMN, TARGET_COLUMN, Row, Rows, Task
from softprompt.data.template_language import ParsedTemplate, parse_template, shown
from softprompt.data.values import SURROGATE
from softprompt.errors import SettingsError, nearest

DEFAULT_TEMPLATE: dict[Task, str] = {
    "classification": "{{ text }}\nLabel:",
    "completion": "{{ input }}\n",
    "text": "{{ text }}",
}
INSTRUCTION_TEMPLATE = (
    "{{ instruction }}\n{% if input|default('')|trim %}{{ input }}\n{% endif %}"  # of Alpaca's columns
)
_BLANK_LINE = "\n\n"  # behind each demonstration


@dataclass(frozen=True)
class Format:
    """How the rows of a task become text.

    Attributes:
        task: what is learned.
        template: a template of the input, in a part of Jinja (`template_language`); it names columns, `{{ text }}`.
        verbalizers: label to the text that stands for it; empty unless this is classification.
        chat_template: whether the model's chat template is put around the input, as a user's message.
        demonstrations: rows that stand with their targets before every row's own input (few-shot), in a chat inside
            the same message.
        chat_date: the day, `2024-07-26`, that a chat template prints which prints one; None for the day on which it
            is asked.
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
        """The columns that the template names, sorted."""
        return list(self._parsed.columns)

    @cached_property
    def demonstrated(self) -> str:
        """The text of all demonstrations, which every input begins with."""
        return _joined(self.demonstrated_pieces)

    @cached_property
    def demonstrated_pieces(self) -> tuple[Piece, ...]:
        """The same in pieces, some of them the template's own."""
        return tuple(piece for row in self.demonstrations for piece in self._demonstration(row))

    def demonstration(self, row: Row) -> str:
        """Return a row's input and target, and the blank line behind them."""
        return _joined(self._demonstration(row))

    def _demonstration(self, row: Row) -> list[Piece]:
        pieces = self._own(row)
        if self.task != "text":
            pieces.append(Piece(_behind(_joined(pieces), self.target(row)), own=False))
        return [*_stripped(pieces), Piece(_BLANK_LINE, own=True)]

    @property
    def end(self) -> str:
        """What ends a target as demonstrations show it; "" where the end-of-text token does, as in a chat's answer."""
        return _BLANK_LINE if self.demonstrations and not self.chat_template else ""

    def input(self, row: Row) -> str:
        """Return the demonstrations and a row's input.

        Spaces at its end are dropped, since they belong to the target's first token.

        Raises:
            SettingsError: the row lacks a column, or gives more text than is allowed.
        """
        return self.demonstrated + _joined(self._own(row))

    def pieces(self, row: Row) -> list[Piece]:
        """Return what `input` does in pieces, some of them the template's own."""
        return [*self.demonstrated_pieces, *self._own(row)]

    def _own(self, row: Row) -> list[Piece]:
        pieces = self._parsed.render(row)
        return pieces if self.task == "text" else _stripped(pieces, " ")

    def target(self, row: Row) -> str:
        """Return a row's target, without what separates it from the input.

        A completion is as the row gives it: an indentation belongs to it. Behind demonstrations, which show none of the
        white space at its end, it has none there either.
        """
        if self.task == "classification":
            return self.verbalizers[row["label"]]
        return row["target"].rstrip() if self.end else row["target"]

    def joined(self, text: str, target: str) -> str:
        """Return the target as it follows its input: behind a line break and in a chat as it is, else after a space.

        A target that begins on a line of its own is kept as it is everywhere.
        """
        return target if self.chat_template else _behind(text, target)

    def answer(self, text: str, target: str) -> str:
        """Return what a completion is compared with: the target as it is learned, without a space before it."""
        learned = self.joined(text, target)
        return learned.removeprefix(" ") if _on_the_same_line(text) and not self.chat_template else learned


def _behind(text: str, target: str) -> str:
    begun = target.lstrip()
    if not _on_the_same_line(text) or "\n" in target[: len(target) - len(begun)]:
        return target
    return f" {begun}"


def _on_the_same_line(text: str) -> bool:
    return bool(text) and not text[-1].isspace()


def _joined(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _stripped(pieces: Sequence[Piece], chars: str | None = None) -> list[Piece]:
    """Return pieces without the white space at their end."""
    left = list(pieces)
    while left:
        last = left.pop()
        if text := last.text.rstrip(chars):
            return [*left, Piece(text, last.own)]
    return left


def default_template(rows: Rows) -> str:
    """Return the template that rows get where none is given."""
    return INSTRUCTION_TEMPLATE if rows.input_columns == INSTRUCTED else DEFAULT_TEMPLATE[rows.task]


def make_format(
    task: Task,
    labels: Sequence[str],
    template: str | None = None,
    verbalizers: Mapping[str, str] | None = None,
    chat_template: bool = False,
    default: str | None = None,
) -> Format:
    """Fill in the defaults of a format and check it.

    Args:
        task: what is learned.
        labels: all labels of the training rows.
        template: None for the default.
        verbalizers: texts of some or all labels; a label without one stands for itself, with spaces for underscores.
        chat_template: whether the model's chat template is put around the input.
        default: the template where none is given; None for the task's.

    Raises:
        SettingsError: the template names no column, shows the answer or cannot be read, or verbalizers do not fit the
            labels.
    """
    made = Format(task, (default or DEFAULT_TEMPLATE[task]) if template is None else template, {})
    require_template(made)
    if chat_template and task == "text":
        raise SettingsError("plain text has no input for a chat; leave chat_template out, or map input and target")
    labels = list(dict.fromkeys(map(clean_label, labels)))  # as rows have them
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
    """Make sure that a format's template can be read, names a column, and does not name the answer's.

    Raises:
        SettingsError: one of these is not so.
    """
    if not form.columns:
        raise SettingsError(
            f"the template {shown(form.template)} names no column; "
            f"write one in double braces, {{{{ {INPUT_COLUMN[form.task]} }}}}"
        )
    if (answer := TARGET_COLUMN[form.task]) in form.columns:
        raise _shows(form, answer, f"the column {answer!r} is what is to be predicted")


def require_unseen_answer(form: Format, rows: Rows) -> None:
    """Make sure that the template names no column that says in every row what the answer's says.

    `--map label=stars` makes such a column of `stars`. Rows with one answer alone do not tell.

    Raises:
        SettingsError: it names one.
    """
    answer, asked = TARGET_COLUMN[form.task], INPUT_COLUMN[form.task]
    if answer is None:
        return
    for column in form.columns:
        if column != asked and column in rows[0] and _says_the_same(rows, column, answer, asked):
            raise _shows(form, column, f"in {rows.name} the column {column!r} is the {answer} in every row")


def _says_the_same(rows: Rows, column: str, answer: str, asked: str) -> bool:
    """Tell whether two columns say the same in every row; what the input says too is no answer that it gives away."""
    answers, beyond = set[str](), False
    for row in rows:
        said = _spoken(row[answer])
        if _spoken(row.get(column, "")) != said:
            return False
        if len(answers) < 2:
            answers.add(said)
        beyond = beyond or _spoken(row[asked]) != said
    return len(answers) > 1 and beyond


def _spoken(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _shows(form: Format, column: str | None, why: str) -> SettingsError:
    written = f"{{{{ {column} }}}}" if (column or "").isidentifier() else f'{{{{ row["{column}"] }}}}'
    return SettingsError(
        f"the template {shown(form.template)} shows the answer: {why}. What is measured with it would mean nothing; "
        f"take {written} out of it"
    )


def _as_words(labels: Sequence[str]) -> dict[str, str]:
    """Return each label with spaces for its underscores: names such as `card_arrival` are words to a model that way."""
    words = {label: label.replace("_", " ") for label in labels}
    return words if len(set(words.values())) == len(words) else dict(zip(labels, labels, strict=True))
