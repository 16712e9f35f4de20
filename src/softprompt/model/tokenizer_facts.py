"""Everything in a tokenizer that determines token ids, so that two can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

# Accents, ligatures, case, digits, white space, punctuation, other scripts and emoji: normalizers and pre-tokenizers
# differ in these.
_TEXT = (
    "Hello World, don't  stop\u2026 caf\u00e9 cafe\u0301 \ufb01ne \u00bd 1234567 3.14\t(tab)\n\n  line <x> [y]_z "
    "\u6211\u559c\u6b22 \u0645\u0631\u062d\u0628\u0627 \u041f\u0440\u0438\u0432\u0435\u0442 \U0001f600 ``quote'' END "
)
_LONGEST = 200  # characters; a longer text is replaced by its hash


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return hashes and settings of what changes token ids, as JSON values.

    Padding and truncation change none. A padding token changes none either, so the hashes of the vocabulary and of the
    added tokens are computed with and without it.
    """
    padding = tokenizer.pad_token
    if padding in (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token):
        padding = None
    facts: dict[str, Any] = {
        "vocabulary": _with_and_without(tokenizer.get_vocab(), padding),
        "end of text": [tokenizer.eos_token, tokenizer.eos_token_id],
        "ids of a sample text": _ids(tokenizer),
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python, so only the sample text shows differences
        return facts
    parts = json.loads(backend.to_str())
    model = parts["model"]
    added = {token.pop("content"): token for token in parts["added_tokens"]}
    facts["added tokens"] = _with_and_without(added, padding)
    if model.get("merges"):
        facts["merges"] = hash_json([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    if isinstance(model.get("vocab"), list):
        facts["scores"] = hash_json(model["vocab"])
    facts["model"] = {name: value for name, value in model.items() if name not in ("vocab", "merges")}
    for name in ("normalizer", "pre_tokenizer", "post_processor"):
        facts[name] = _shortened(parts[name])
    return facts


def different_tokenizer(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of facts that both sides have and that differ."""
    if before == now:
        return []
    return [name for name in before if name in now and not _same(before[name], now[name])]


def _same(before: Any, now: Any) -> bool:
    """Compare what both sides have: a newer tokenizers library saves more settings."""
    if isinstance(before, dict) and isinstance(now, dict):
        if "without_padding" in before:
            return bool(set(before.values()) & set(now.values()))
        return all(_same(before[name], now[name]) for name in before.keys() & now.keys())
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(_same(a, b) for a, b in zip(before, now, strict=True))
    return bool(before == now)


def _ids(tokenizer: PreTrainedTokenizerBase) -> str | None:
    try:
        return hash_json(list(tokenizer(_TEXT)["input_ids"]))
    except Exception:  # a word-level tokenizer without an unknown token raises its library's own error
        return None


def _with_and_without(entries: Mapping[str, Any], padding: str | None) -> dict[str, str]:
    rest = {name: value for name, value in entries.items() if name != padding}
    return {"with_padding": hash_json(entries), "without_padding": hash_json(rest)}


def _shortened(value: Any) -> Any:
    """Return a part of a tokenizer with a hash for each long text: a table of characters has a quarter of a million."""
    if isinstance(value, dict):
        return {name: _shortened(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_shortened(inner) for inner in value]
    return hash_json(value) if isinstance(value, str) and len(value) > _LONGEST else value


def hash_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
