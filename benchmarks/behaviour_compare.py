"""How two sides are compared: what must differ is taken out, what may is renamed, and all else has to be the same."""

from __future__ import annotations

import difflib
import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

# Numbers and texts under these keys are measured, or say when and by what: whether they are there is compared.
MEASURED = (
    *("seconds", "step_seconds", "train_seconds", "train_cpu_seconds", "prediction_seconds", "switch_seconds"),
    *("minutes", "search_minutes", "peak_bytes", "free_gigabytes", "memory_free", "disk_free", "date", "softprompt"),
)
PROSE = ("problems", "optional")  # lists of sentences: how many there are is compared
_TIMES = (
    (re.compile(r"\b\d+:\d\d(:\d\d)?\b"), "#:##"),
    (re.compile(r"\b[\d.,]*\d (ms|s|min|minutes?|hours?|seconds?|[kMG]B)\b"), r"# \1"),
)
_DATE = (re.compile(r"\b20\d\d-\d\d-\d\d\b"), "DATE")
_FIGURE = re.compile(r"\d+\.\d+|\d{1,3}(?:,\d{3})+|\d{3,}")
_NUMBER = re.compile(r"\d[\d.,]*")
_YEAR = re.compile(r"(19|20)\d\d")
_OPTION = re.compile(r"^  ((?:-\w, )?--[\w-]+(?: \[[^\]]*\])?)", re.MULTILINE)
_COMMAND = re.compile(r"^  ([a-z]+)  ", re.MULTILINE)
_SHOWN = 30  # lines of a difference
_SIZE = 256  # bytes by which a stored folder may grow or shrink with the names in it


@dataclass(frozen=True)
class Rename:
    """A change that NEW is allowed to show; it is applied to OLD where NEW has nothing of the old form.

    Attributes:
        kind: a word in texts, keys and file names; a key; a value under some keys; a key that is gone; or a size in
            bytes, that follows from the length of names.
        old, new: what changes into what.
        keys: of a value, where it stands.
    """

    kind: Literal["word", "key", "value", "gone", "size"]
    old: str
    new: str = ""
    keys: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What is said of it."""
        return f"{self.kind} {self.old}" + (f" → {self.new}" if self.new else "")


_BACKEND = ("way", "backend")
INTENDED = (
    Rename("word", "soft-prompt", "prompt-tuning"),
    Rename("word", "deep-prefix", "prefix-tuning"),
    Rename("key", "way", "backend"),
    Rename("key", "kept", "registered"),
    Rename("value", "cached", "padded", _BACKEND),
    Rename("value", "concatenated", "reference", _BACKEND),
    Rename("gone", "parameterization"),
    Rename("size", "stored_bytes"),
)
Seen = Counter[str]


@dataclass(frozen=True)
class Pair:
    """One output of both sides, as lines.

    Attributes:
        name: what gave it.
        old, new: what has to be the same.
        old_wording, new_wording: prose, which may be written anew.
    """

    name: str
    old: list[str]
    new: list[str]
    old_wording: list[str]
    new_wording: list[str]

    def difference(self) -> list[str]:
        """Return a unified diff of what has to be the same."""
        return _diff(self.old, self.new)

    def wording(self) -> list[str]:
        """Return a unified diff of the prose."""
        return _diff(self.old_wording, self.new_wording)


def compare_part(old: Path, new: Path, part: str, seen: Seen) -> Iterator[Pair]:
    """Compare the calls and the files of a part.

    Args:
        old, new: the folders of both sides.
        part: its name.
        seen: counts the intended renames.
    """
    yield from _compare_calls(_calls(old / f"{part}.json"), _calls(new / f"{part}.json"), part == "help", seen)
    yield from _compare_files(old / part, new / part, seen)


def _calls(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    return {call["name"]: call for call in json.loads(path.read_text(encoding="utf-8"))}


def _compare_calls(
    old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]], options: bool, seen: Seen
) -> Iterator[Pair]:
    nothing = {"arguments": [], "code": "not run", "out": "", "err": ""}
    for name in dict.fromkeys((*old, *new)):
        before, after = old.get(name, nothing), new.get(name, nothing)
        yield Pair(f"{name}: exit code", [f"exit code {before['code']}"], [f"exit code {after['code']}"], [], [])
        yield _stdout_pair(f"{name}: stdout", before, after, options, seen)
        yield _text_pair(f"{name}: stderr", before["err"], after["err"], _no_figures, seen)


def _stdout_pair(name: str, old: dict[str, Any], new: dict[str, Any], options: bool, seen: Seen) -> Pair:
    """Compare results: records are the same, and so are rows; of texts for people, the figures are."""
    before, after = _as_json(old["out"]), _as_json(new["out"])
    if before is not None and after is not None:
        return _json_pair(name, before, after, seen)
    if options:
        return _text_pair(name, old["out"], new["out"], _options, seen)
    rows = old["arguments"][:1] == ["predict"] and "--out" not in old["arguments"]
    if rows or before is not None or after is not None:
        return Pair(name, old["out"].splitlines(), new["out"].splitlines(), [], [])
    return _text_pair(name, old["out"], new["out"], _timed_figures, seen)


def _as_json(text: str) -> Any:
    """Return what is printed as JSON, one object or lines of them; None where it is something else."""
    try:
        records = [json.loads(line) for line in text.splitlines()]
    except ValueError:
        return None
    return records if records and all(isinstance(record, dict) for record in records) else None


def _compare_files(old: Path, new: Path, seen: Seen) -> Iterator[Pair]:
    before, after = _files(old), _files(new)
    renamed: dict[str, str] = {}
    for path in before:
        there = path
        for rule in INTENDED:
            if there not in after and rule.kind == "word" and rule.old in there:
                there = there.replace(rule.old, rule.new)
                seen[rule.title + " (in file names)"] += there in after
        renamed[path] = there
    names = sorted(renamed.values()), sorted(after)
    yield Pair("names of files", *names, [], [])
    for path, there in renamed.items():
        if there in after:
            yield _file_pair(there, before[path], after[there], seen)


def _files(folder: Path) -> dict[str, Path]:
    """Return all files but locks, and what is only linked to; by their names in the folder."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(folder).as_posix(): path for path in found}


def _file_pair(name: str, old: Path, new: Path, seen: Seen) -> Pair:
    if old.suffix == ".safetensors":
        return Pair(name, _tensors(old), _tensors(new), [], [])
    if old.suffix == ".parquet":
        return Pair(name, [_digest(old.read_bytes())], [_digest(new.read_bytes())], [], [])
    if old.suffix == ".png":
        return Pair(name, [], [], [_digest(old.read_bytes())], [_digest(new.read_bytes())])
    before, after = old.read_text(encoding="utf-8"), new.read_text(encoding="utf-8")
    if old.suffix in _READERS:
        return _json_pair(name, _READERS[old.suffix](before), _READERS[old.suffix](after), seen)
    if old.suffix in (".md", ".html"):
        return _text_pair(name, _prose(before), _prose(after), _page_figures, seen)
    return Pair(name, before.splitlines(), after.splitlines(), [], [])


_READERS: dict[str, Callable[[str], Any]] = {
    ".json": json.loads,
    ".jsonl": lambda text: [json.loads(line) for line in text.splitlines()],
    ".yaml": yaml.safe_load,
}


def _tensors(path: Path) -> list[str]:
    """Return a line for each tensor of a file, with the hash of its bytes."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    lines = [f"metadata {header.pop('__metadata__', None)}"]
    for name, tensor in sorted(header.items()):
        first, last = tensor["data_offsets"]
        digest = _digest(content[begin + first : begin + last])
        lines.append(f"{name} {tensor['dtype']} {tensor['shape']} {digest}")
    return lines


def _digest(content: bytes) -> str:
    return f"sha256 {hashlib.sha256(content).hexdigest()}"


def _json_pair(name: str, old: Any, new: Any, seen: Seen) -> Pair:
    old, new = _without_measurements(old), _without_measurements(new)
    old = _same_size(_renamed(old, new, seen), new, seen)
    before, after = (json.dumps(value, indent=1, ensure_ascii=False).splitlines() for value in (old, new))
    return Pair(name, before, after, [], [])


def _without_measurements(value: Any) -> Any:
    """Replace what is measured by what it is, and sentences by their number."""
    if isinstance(value, dict):
        return {key: _without_measurement(key, item) for key, item in value.items()}
    return [_without_measurements(item) for item in value] if isinstance(value, list) else value


def _without_measurement(key: str, value: Any) -> Any:
    if key in MEASURED and isinstance(value, str | int | float):
        return f"<{key}>"
    if key in PROSE and isinstance(value, list):
        return f"<{len(value)} {key}>"
    return _without_measurements(value)


def _renamed(old: Any, new: Any, seen: Seen) -> Any:
    """Apply each intended rename to OLD, if NEW has nothing of the old form."""
    for rule in INTENDED:
        count: Seen = Counter()
        change = _changes(rule, count)
        if rule.kind != "size" and not _uses(new, rule):
            old = _walk(old, None, change)
            seen[rule.title] += count[rule.title]
    return old


def _uses(value: Any, rule: Rename) -> bool:
    """Tell whether the old form occurs anywhere."""
    count: Seen = Counter()
    _walk(value, None, _changes(rule, count))
    return count[rule.title] > 0


Change = Callable[[str | None, Any], tuple[str | None, Any] | None]


def _changes(rule: Rename, count: Seen) -> Change:
    """Return what a rename makes of a key and its value, and counts; None where both are dropped."""
    word = re.compile(rf"(?<![\w-]){re.escape(rule.old)}(?!\w)")

    def rewritten(text: Any) -> Any:
        if not isinstance(text, str):
            return text
        made, times = word.subn(rule.new, text)
        count[rule.title] += times
        return made

    def change(key: str | None, value: Any) -> tuple[str | None, Any] | None:
        if rule.kind == "word":
            return rewritten(key), rewritten(value)
        applies = value == rule.old and key in rule.keys if rule.kind == "value" else key == rule.old
        count[rule.title] += applies
        if not applies:
            return key, value
        if rule.kind == "gone":
            return None
        return (key, rule.new) if rule.kind == "value" else (rule.new, value)

    return change


def _walk(value: Any, key: str | None, change: Change) -> Any:
    """Change every key and every leaf."""
    if isinstance(value, dict):
        made = {}
        for name, item in value.items():
            leaf = None if isinstance(item, dict | list) else item
            changed = change(name, leaf)
            if changed is not None:
                made[changed[0]] = _walk(item, name, change) if isinstance(item, dict | list) else changed[1]
        return made
    if isinstance(value, list):
        return [_walk(item, key, change) for item in value]
    changed = change(None, value)
    return value if changed is None else changed[1]


def _same_size(old: Any, new: Any, seen: Seen) -> Any:
    """Take NEW's sizes where they differ by no more than names do."""
    sizes = {rule.old: rule.title for rule in INTENDED if rule.kind == "size"}
    if isinstance(old, dict) and isinstance(new, dict):
        made = {}
        for key, value in old.items():
            made[key] = _same_size(value, new.get(key), seen)
            if key in sizes and key in new and 0 < abs(new[key] - value) <= _SIZE:
                made[key] = new[key]
                seen[sizes[key]] += 1
        return made
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [_same_size(a, b, seen) for a, b in zip(old, new, strict=True)]
    return old


def _text_pair(name: str, old: str, new: str, figures: Callable[[str], list[str]], seen: Seen) -> Pair:
    """Compare what a text must have in common, and its prose apart from that."""
    old = _renamed(old, new, seen)
    prose = [[line.rstrip() for line in _without_times(text).splitlines()] for text in (old, new)]
    return Pair(name, figures(old), figures(new), *prose)


def _without_times(text: str) -> str:
    for pattern, instead in (*_TIMES, _DATE):
        text = pattern.sub(instead, text)
    return text


def _figures(text: str) -> list[str]:
    """Return the figures of a text, each once: fractions, and numbers of three digits and more but for years."""
    found = set(_FIGURE.findall(_DATE[0].sub("", text)))
    return sorted(figure for figure in found if not _YEAR.fullmatch(figure))


def _page_figures(text: str) -> list[str]:
    """Return the figures of a page, and all numbers of each row of its tables, in their order."""
    rows = [" ".join(_NUMBER.findall(line)) for line in text.splitlines() if line.startswith("|")]
    return [*_figures(text), *rows]


def _timed_figures(text: str) -> list[str]:
    """Return the figures of a text that are not measured times and sizes."""
    return _figures(_without_times(text))


def _no_figures(_text: str) -> list[str]:
    return []


def _options(text: str) -> list[str]:
    """Return the options, with what they can be, and the commands that a help text lists."""
    return sorted({*_OPTION.findall(text), *_COMMAND.findall(text)})


def _prose(text: str) -> str:
    """Return the text of a page: what is drawn, and how it looks, is left out."""
    if "<html" not in text:
        return text
    plain = re.sub(r"<(svg|style|script)\b.*?</\1>", " ", text, flags=re.DOTALL)
    lines = html.unescape(re.sub(r"<[^>]*>", " ", plain)).splitlines()
    return "\n".join(" ".join(line.split()) for line in lines if line.strip())


def _diff(old: list[str], new: list[str]) -> list[str]:
    """Return a small unified diff, without its heading."""
    lines = list(difflib.unified_diff(old, new, "old", "new", lineterm="", n=1))[2:]
    more = [f"… {len(lines) - _SHOWN} more lines"] if len(lines) > _SHOWN else []
    return [line[:200] for line in lines[:_SHOWN]] + more
