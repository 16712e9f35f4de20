"""The model's chat template around a message, on a day that does not move on."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from softprompt.data.templates import Format
from softprompt.errors import SettingsError

USUAL_DATE = "2024-07-26"  # the day that Llama 3.1's template falls back to; any will do that stays the same
_CLOCK = "strftime_now"  # transformers' function, by which a chat template asks for the day
_CODES = "aAbBcCdDeFgGhHIjmMnpRStTuUVwWxXyYzZf"


@dataclass(frozen=True)
class Chat:
    """A message in the tokenizer's chat template, as transformers renders it.

    Attributes:
        tokenizer: the one with the template.
        day: what the template prints if it prints the day, None for today.
    """

    tokenizer: PreTrainedTokenizerBase
    day: str | None

    def around(self, message: str) -> str:
        """Return a chat of one message, up to where the model answers.

        Raises:
            SettingsError: the chat template cannot be read, or refuses such a chat.
        """
        chat = [{"role": "user", "content": message}]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    chat, chat_template=self._dated, tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # a template can fail in any way that Python can
            raise SettingsError(
                f"the chat template of this model's tokenizer fails on a user's message: {error}. Leave chat_template "
                "out, or give the tokenizer another (chat_template.jinja in the model's folder)"
            ) from error

    @cached_property
    def _dated(self) -> str | None:
        """The template with a clock that stands still; None where it asks for no time, and is taken as it is."""
        if self.day is None or not prints_date(self.tokenizer):
            return None
        return _clock(self.day) + self.tokenizer.get_chat_template()


def prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the chat template asks for the day."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return isinstance(template, str) and _CLOCK in template


def dated(form: Format, tokenizer: PreTrainedTokenizerBase, asked: str | None) -> Format:
    """Fix the day that the chat template prints, and say so where none was asked for; nothing where it prints none."""
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
    """Return a Jinja macro in the place of the clock: it formats a day, at midnight, as `strftime` does."""
    midnight = datetime.combine(date.fromisoformat(day), datetime.min.time())
    values = {"%s": str(int(midnight.replace(tzinfo=UTC).timestamp()))}
    for code in _CODES:
        try:
            value = midnight.strftime(f"%{code}")
        except ValueError:  # not on this system
            continue
        shortened = value.lstrip("0 ") or "0" if value.strip().isdigit() else value
        values |= {f"%{code}": value, f"%-{code}": shortened, f"%#{code}": shortened}
    # The line break at its end is not printed, and what the template behind it begins with stays as it is.
    return (
        rf"{{% macro {_CLOCK}(format) %}}{{% set kept = namespace(text=format.replace('%%', '\x00')) %}}"
        f"{{% for code, value in {list(values.items())} %}}{{% set kept.text = kept.text.replace(code, value) %}}"
        rf"{{% endfor %}}{{{{ kept.text.replace('\x00', '%') }}}}{{% endmacro %}}" + "\n"
    )
