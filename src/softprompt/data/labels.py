"""Labels: those that look the same are made equal; a warning names those that look nearly the same."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection

from softprompt.errors import warn

# Invisible characters, without joiners: see `_keep_joiner`.
_INVISIBLE = (
    "\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e001f"
)
_BLANK = "\u2800\u3164\uffa0"  # looks like a space, but is not white space in Unicode
_TAGS = "\U000e0020-\U000e007f"  # spell the name of a region after a black flag; invisible anywhere else
_JOINERS = "\u200c\u200d"
_UNSEEN = re.compile(f"[{_INVISIBLE}]|(?<![\U0001f3f4{_TAGS}])[{_TAGS}]+")
_JOINED = re.compile(f"[{_JOINERS}]+")
_SEEN = re.compile(rf"[^\s{_INVISIBLE}{_BLANK}{_TAGS}{_JOINERS}]")
# Letters without case, and marks on them; symbols, emoji included.
_JOINABLE = {"Lo", "Lm", "Mn", "Mc", "So", "Sk"}
# Cyrillic and Greek letters that look like Latin ones.
_LOOK_ALIKES = str.maketrans("авеікмнорѕстухјԁαικνορυ", "abeikmhopsctyxjdaikvopu")
_NUMBER = re.compile(r"[-+]?[0-9]{1,8}(\.[0-9]{0,6})?")
_DASHES = re.compile(r"(?<=\w)[-_‐‑–— ]+(?=\w)")
_ENDS = " .,;:!?'\"`´‘’“”„«»…"
_MAX_SHOWN = 5
_MIN_ROWS = 5  # of fewer rows, each may well have its own label


def is_blank(text: str) -> bool:
    """Tell whether a text has no visible characters."""
    return _SEEN.search(text) is None


def clean_label(text: str) -> str:
    """Normalize a label, so that labels that look the same are equal.

    It is composed (NFC), white space becomes one space, and invisible characters are removed; joiners stay where they
    matter: in Persian, in Indian scripts, in emoji.
    """
    if not text.isascii() or not text.isprintable():
        text = _UNSEEN.sub("", text.translate(dict.fromkeys(map(ord, _BLANK), " ")))
        text = unicodedata.normalize("NFC", _JOINED.sub(_keep_joiner, text))
    return " ".join(text.split())


def _keep_joiner(match: re.Match[str]) -> str:
    """Keep a joiner if the characters on both sides can be joined."""
    around = match.string[match.start() - 1 : match.start()], match.string[match.end() : match.end() + 1]
    return match[0][0] if all(c and unicodedata.category(c) in _JOINABLE for c in around) else ""


def warn_about_labels(counts: Counter[str], rows: int, name: str) -> None:
    """Warn about labels that look alike, and if every row has a label of its own."""
    groups = _look_alikes(counts)
    if groups:
        shown = "; ".join(", ".join(f"{label!r} ({counts[label]:,} rows)" for label in g) for g in groups[:_MAX_SHOWN])
        more = f"; and {len(groups) - _MAX_SHOWN} more such" if len(groups) > _MAX_SHOWN else ""
        warn(
            f"{name}: labels that look alike are labels of their own: {shown}{more}. Write them in one way if they "
            "mean the same"
        )
    if rows >= _MIN_ROWS and len(counts) == rows:
        warn(
            f"{name}: each of the {rows:,} rows has a label of its own, so none can be learned from several rows; if "
            "they are texts, map them as a completion: --map input=… --map target=…"
        )


def _look_alikes(labels: Collection[str]) -> list[list[str]]:
    """Return groups of labels that differ only in case, composition, dashes, or punctuation at their ends."""
    alike = defaultdict(list)
    for label in labels:
        alike[_normalize(label)].append(label)
    return [sorted(group) for group in alike.values() if len(group) > 1]


def _normalize(label: str) -> str:
    text = (
        unicodedata.normalize("NFKC", re.sub(f"[{_JOINERS}\ufe0e\ufe0f]", "", label)).casefold().translate(_LOOK_ALIKES)
    )
    if _NUMBER.fullmatch(text):
        return repr(float(text))  # 1 and 1.0 as texts
    return _DASHES.sub(" ", text).strip(_ENDS) or text
