"""Version 1 of the fingerprint, in older prompts, runs and comparisons."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from pydantic import BaseModel

from softprompt.model.frozen import FrozenModel
from softprompt.model.tokenizer_facts import hash_json

_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
# bfloat16 keeps 8 bits: values that were rounded to it differ by up to 2^-8 of themselves, two of them by twice that.
_RELATIVE = 2.0**-7
_ABSOLUTE = 1e-6
_TOKENIZERS: WeakKeyDictionary[FrozenModel, str] = WeakKeyDictionary()


class FirstFingerprint(BaseModel):
    """Version 1 of a base model's fingerprint: without its layers, its head, its RoPE settings and how it splits text.

    Attributes:
        configuration: a hash of the model's type and shape.
        tokenizer: a hash of its vocabulary and special tokens.
        embeddings: 64 values of the input embedding.
    """

    configuration: str
    tokenizer: str
    embeddings: list[float]

    def mismatch(self, other: FirstFingerprint) -> str | None:
        """Return what differs in `other`, or None where nothing does."""
        if self.configuration != other.configuration:
            return "its architecture or size"
        if self.tokenizer != other.tokenizer:
            return "its tokenizer"
        if len(self.embeddings) != len(other.embeddings):
            return "its weights"
        pairs = zip(self.embeddings, other.embeddings, strict=True)
        if any(abs(a - b) > _RELATIVE * max(abs(a), abs(b)) + _ABSOLUTE for a, b in pairs):
            return "its weights"
        return None


def first_fingerprint(model: FrozenModel) -> FirstFingerprint:
    """Compute version 1's fingerprint of a loaded model, to compare an older one with."""
    config = model.hf_model.config.get_text_config()
    shape = {name: getattr(config, name, None) for name in _SHAPE}
    sample = model.embed([i * model.vocabulary_size // 64 for i in range(64)]).float().cpu()
    values = [float(sample[i, (i * 37) % sample.shape[1]]) for i in range(64)]
    return FirstFingerprint(configuration=hash_json(shape), tokenizer=_tokenizer(model), embeddings=values)


def _tokenizer(model: FrozenModel) -> str:
    """Return the tokenizer's hash; it is cached: hashing a vocabulary takes a tenth of a second."""
    if model not in _TOKENIZERS:
        special = {name: str(token) for name, token in model.tokenizer.special_tokens_map.items()}
        _TOKENIZERS[model] = hash_json([model.tokenizer.get_vocab(), special])
    return _TOKENIZERS[model]
