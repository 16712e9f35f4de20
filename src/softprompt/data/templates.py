"""Templates and verbalizers: how a row becomes text, and a label becomes text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from softprompt.data.columns import INSTRUCTED
from softprompt.data.labels import clean_label
from softprompt.data.rows import INPUT_COLUMN, Row, Rows, Task
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
# Sandboxed, because a template also arrives inside prompt folders that other people made.
_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


@dataclass(frozen=True)
class Format:
    """How the rows of a task become text.

    Attributes:
        task: what is learned.
        template: a Jinja template of the input; it names columns, `{{ text }}`.
        verbalizers: label to the text that stands for it; empty unless this is classification.
        chat_template: whether the model's chat template is put around the input, as a user's message.
        demonstrations: rows that stand with their targets before every row's own input (few-shot), in a chat inside
            the same message.
    """

    task: Task
    template: str
    verbalizers: Mapping[str, str]
    chat_template: bool = False
    demonstrations: tuple[Row, ...] = ()

    @cached_property
    def _compiled(self) -> Template:
        try:
            return _ENVIRONMENT.from_string(self.template)
        except TemplateSyntaxError as error:
            raise SettingsError(f"the template {self.template!r} cannot be read: {error.message}") from error

    @cached_property
    def columns(self) -> list[str]:
        """The columns that the template names, sorted."""
        _ = self._compiled
        return sorted(meta.find_undeclared_variables(_ENVIRONMENT.parse(self.template)))

    @cached_property
    def demonstrated(self) -> str:
        """The text of all demonstrations, which every input begins with."""
        return "".join(self.demonstration(row) for row in self.demonstrations)

    def demonstration(self, row: Row) -> str:
        """Return a row's input and target, and the blank line behind them."""
        text = self._own(row)
        return (text if self.task == "text" else text + _behind(text, self.target(row))).rstrip() + _BLANK_LINE

    @property
    def end(self) -> str:
        """What ends a target as demonstrations show it; "" where the end-of-text token does, as in a chat's answer."""
        return _BLANK_LINE if self.demonstrations and not self.chat_template else ""

    def input(self, row: Row) -> str:
        """Return the demonstrations and a row's input.

        Spaces at its end are dropped, since they belong to the target's first token.
        """
        return self.demonstrated + self._own(row)

    def _own(self, row: Row) -> str:
        try:
            text = self._compiled.render(row)
        except Exception as error:  # a template can fail in any way that Python can
            missing = [column for column in self.columns if column not in row]
            if isinstance(error, UndefinedError) and missing:
                raise SettingsError(
                    f"the template {self.template!r} names the column {missing[0]!r}{nearest(missing[0], row)}; "
                    f"the rows have {', '.join(row)}"
                ) from error
            raise SettingsError(f"the template {self.template!r} fails on a row: {error}") from error
        return text if self.task == "text" else text.rstrip(" ")

    def target(self, row: Row) -> str:
        """Return a row's target as it follows the input, without the space between them."""
        if self.task == "classification":
            return self.verbalizers[row["label"]]
        return row["target"].strip()

    def joined(self, text: str, target: str) -> str:
        """Return the target with what separates it from its input: a space, or nothing after a line break or a chat."""
        return target if self.chat_template else _behind(text, target)


def _behind(text: str, target: str) -> str:
    return target if not text or text[-1].isspace() else f" {target}"


def default_template(rows: Rows) -> str:
    """Return the template that rows get where none is given."""
    return INSTRUCTION_TEMPLATE if rows.inputs == INSTRUCTED else DEFAULT_TEMPLATE[rows.task]


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
        SettingsError: the template names no column or cannot be read, or verbalizers do not fit the labels.
    """
    made = Format(task, (default or DEFAULT_TEMPLATE[task]) if template is None else template, {})
    if not made.columns:
        raise SettingsError(
            f"the template {made.template!r} names no column; "
            f"write one in double braces, {{{{ {INPUT_COLUMN[task]} }}}}"
        )
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
    by_text: dict[str, str] = {}
    for label, text in texts.items():
        other = by_text.setdefault(text, label)
        if other != label:
            raise SettingsError(f"the labels {other!r} and {label!r} have the same verbalizer {text!r}; each needs one")
    return Format(task, made.template, texts, chat_template)


def _as_words(labels: Sequence[str]) -> dict[str, str]:
    """Return each label with spaces for its underscores: names such as `card_arrival` are words to a model that way."""
    words = {label: label.replace("_", " ") for label in labels}
    return words if len(set(words.values())) == len(words) else dict(zip(labels, labels, strict=True))
