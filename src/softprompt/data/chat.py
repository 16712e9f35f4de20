"""The model's chat template, with a fixed date."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from softprompt.data.templates import Format
from softprompt.errors import SettingsError

USUAL_DATE = "2024-07-26"  # the default of Llama 3.1's template; any fixed day would do
_CLOCK = "strftime_now"  # the function of transformers with which a chat template gets the date
_CODES = "aAbBcCdDeFgGhHIjmMnpRStTuUVwWxXyYzZf"


@dataclass(frozen=True)
class Chat:
    """The chat template of a tokenizer.

    Attributes:
        day: the date that the template prints, if it prints one; None for today.
    """

    tokenizer: PreTrainedTokenizerBase
    day: str | None

    def around(self, message: str) -> str:
        """Return a chat of one user message, up to the model's answer."""
        chat = [{"role": "user", "content": message}]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    chat, chat_template=self._dated, tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # a template can raise anything
            raise SettingsError(
                f"the chat template of this model's tokenizer fails on a user's message: {error}. Leave chat_template "
                "out, or give the tokenizer another (chat_template.jinja in the model's folder)"
            ) from error

    @cached_property
    def _dated(self) -> str | None:
        """The template with a fixed date; None to use it unchanged, because it prints no date or today's."""
        if self.day is None or not prints_date(self.tokenizer):
            return None
        return _clock(self.day) + self.tokenizer.get_chat_template()


def prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the chat template prints the date."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return isinstance(template, str) and _CLOCK in template


def dated(form: Format, tokenizer: PreTrainedTokenizerBase, asked: str | None) -> Format:
    """Fix the date that the chat template prints, if it prints one; warn if no date was given."""
    if not (form.chat_template and prints_date(tokenizer)):
        return form
    if asked is None:
        warnings.warn(
            f"the chat template prints the date: it is {USUAL_DATE} for every row, on every day, so that the same text "
            f"gives the same tokens; --set chat_date={date.today().isoformat()} gives another",
            stacklevel=3,
        )
    return replace(form, chat_date=asked or USUAL_DATE)


def _clock(day: str) -> str:
    """Return a Jinja macro that replaces the clock: it formats midnight of a day as `strftime` does."""
    midnight = datetime.combine(date.fromisoformat(day), datetime.min.time())
    values = {"%s": str(int(midnight.replace(tzinfo=UTC).timestamp()))}
    for code in _CODES:
        try:
            value = midnight.strftime(f"%{code}")
        except ValueError:  # not on this system
            continue
        shortened = value.lstrip("0 ") or "0" if value.strip().isdigit() else value
        values |= {f"%{code}": value, f"%-{code}": shortened, f"%#{code}": shortened}
    # The line break at the end is not printed, so the template after it is unchanged.
    return (
        rf"{{% macro {_CLOCK}(format) %}}{{% set kept = namespace(text=format.replace('%%', '\x00')) %}}"
        f"{{% for code, value in {list(values.items())} %}}{{% set kept.text = kept.text.replace(code, value) %}}"
        rf"{{% endfor %}}{{{{ kept.text.replace('\x00', '%') }}}}{{% endmacro %}}" + "\n"
    )
