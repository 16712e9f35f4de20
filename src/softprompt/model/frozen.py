"""The frozen model: a base model that is never changed, and what prompts ask of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.data.encoder import Example, common_start
from softprompt.model.backends.base import Backend, input_device
from softprompt.model.backends.decode import ContinuedRows, OwnPrefixes, SharedCache
from softprompt.model.backends.prefix_batch import broadcast_prefix
from softprompt.model.prefix import Prefix, is_prefix

_MAX_CACHED = 8  # prefixes: 100 virtual tokens of a model of 7 billion parameters take about 50 MB in half precision
_WORTH_A_PASS = 64  # tokens: running a few alone takes as long as running so many more along with others


@dataclass(frozen=True)
class _CachedPrefix:
    """A prompt's prefix, and the very tensor, in the very state, that it was made from."""

    prompt: ReferenceType[Tensor]
    version: int
    prefix: Prefix

    def is_of(self, prompt: Tensor) -> bool:
        return self.prompt() is prompt and self.version == _version(prompt)


class FrozenModel:
    """A causal language model in eval mode, none of whose weights takes a gradient.

    Attributes:
        hf_model: the transformers model itself.
        tokenizer: its tokenizer.
        source: what it was loaded from: a hub id, a path or a bundled name.
        revision: the hub revision, None for local models.
        backend: how text is run against a prefix.
        shares_cache: whether rows of unlike lengths can be continued in one cache of the model's own.
    """

    def __init__(
        self,
        hf_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        backend: Backend,
        source: str,
        revision: str | None = None,
        shares_cache: bool = True,
    ) -> None:
        self.hf_model = hf_model
        self.tokenizer = tokenizer
        self.backend = backend
        self.source = source
        self.revision = revision
        self._cached: OrderedDict[int, _CachedPrefix] = OrderedDict()
        self.shares_cache = shares_cache

    @property
    def device(self) -> torch.device:
        return input_device(self.hf_model)

    @property
    def embedding_width(self) -> int:
        """H, the width of the input embedding; not the hidden size in every model."""
        return int(self.embed([0]).shape[1])

    @property
    def vocabulary_size(self) -> int:
        """How many tokens have an embedding; V, or a little more where the table is padded."""
        return int(self.hf_model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]

    @property
    def context_length(self) -> int | None:
        """The most positions that a prefix and a text can be run at exactly, None where there is no limit.

        Chunked attention starts anew at a chunk's border, and `longrope` changes all positions beyond its original
        length: up to there the prefix is the same for all texts.
        """
        config = self.hf_model.config.get_text_config()
        limits = [getattr(config, name, None) for name in ("max_position_embeddings", "attention_chunk_size")]
        rope = getattr(config, "rope_parameters", None) or {}
        if "longrope" in (rope.get("rope_type"), rope.get("type")):
            limits.append(rope.get("original_max_position_embeddings"))
            limits.append(getattr(config, "original_max_position_embeddings", None))
        found = [int(limit) for limit in limits if limit]
        return min(found) if found else None

    @cached_property
    def prefix_shape(self) -> tuple[int, int, int]:
        """L, K and D: how many layers there are, and how many keys and values of which size each keeps a position.

        Raises:
            ModelError: the layers differ in that.
        """
        with torch.no_grad():
            layers, _, heads, _, size = self.prefix(self.embed([0])).stacked().shape
        return layers, heads, size

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Return the input embeddings of token ids, `[T, H]`, through the model's own module (Gemma scales in it)."""
        with torch.no_grad():
            embedded: Tensor = self.hf_model.get_input_embeddings()(
                torch.tensor(list(ids), dtype=torch.long, device=self.device)
            )
        return embedded

    def prefix(self, prompt: Tensor | None, text: Sequence[int] = ()) -> Prefix:
        """Run a prompt, and the text that all examples begin with, once.

        Args:
            prompt: a soft prompt `[P, H]`, or a deep prefix `[L, 2, K, P, D]`; None for no virtual tokens.
            text: token ids that follow the virtual tokens in every example.

        Returns:
            The prefix; differentiable with respect to `prompt`. Empty where both are.
        """
        if prompt is not None and is_prefix(prompt):
            prefix = Prefix.of(prompt.to(self.device))
            if not len(text):
                return prefix
            ids, nothing = torch.tensor(list(text)), torch.tensor([], dtype=torch.long)
            return self.backend.text_pass(prefix, [ids], [nothing], extend=True).extended[0]
        embeddings = self._embedded(prompt, text)
        if not embeddings.shape[1]:
            return Prefix()
        prefix = self.backend.prompt_pass(embeddings)
        return Prefix(prefix.keys, prefix.values, prefix.last, prefix.length, tuple(text))

    def _embedded(self, prompt: Tensor | None, text: Sequence[int]) -> Tensor:
        """Return the embeddings of a soft prompt and of what all examples begin with, `[1, P, H]`."""
        parts = [self.embed(text)] if len(text) or prompt is None else []
        if prompt is not None:
            parts.insert(0, prompt.to(self.device, self.hf_model.dtype))
        return torch.cat(parts).unsqueeze(0)

    @torch.no_grad()
    def cached_prefix(self, prompt: Tensor | None) -> Prefix:
        """Return the prefix of a prompt without gradients; those of the last few prompts are kept.

        A prompt is known again as the same tensor that was not changed in place: hashing a deep prefix takes longer
        than a short text.
        """
        if prompt is None:
            return Prefix()
        with self.backend.lock:
            found = self._cached.get(id(prompt))
            if found is None or not found.is_of(prompt):
                found = self._cached[id(prompt)] = _CachedPrefix(ref(prompt), _version(prompt), self.prefix(prompt))
            self._cached.move_to_end(id(prompt))
            if len(self._cached) > _MAX_CACHED:
                self._cached.popitem(last=False)
            return found.prefix

    @torch.no_grad()
    def shared_prefixes(self, prompts: Sequence[Tensor | None], texts: Sequence[Sequence[int]]) -> list[Prefix]:
        """Return each prompt's prefix without gradients, extended by what all texts begin with.

        It is extended only where that is worth a pass, and leaves at least the last token of every text.
        """
        prefixes = [self.cached_prefix(prompt) for prompt in prompts]
        shortest = min((len(ids) for ids in texts), default=0)
        shared_text_ids = common_start(texts)[: max(shortest - 1, 0)]
        if (len(texts) - 1) * len(shared_text_ids) < _WORTH_A_PASS:
            return prefixes
        shared, nothing = (
            [torch.tensor(shared_text_ids)] * len(prefixes),
            [torch.tensor([], dtype=torch.long)] * len(prefixes),
        )
        return self.backend.text_pass(prefixes, shared, nothing, extend=True).extended

    def loss(
        self, prefix: Prefix | Sequence[Prefix], examples: Sequence[Example], activation_checkpointing: bool = False
    ) -> Tensor:
        """Return the loss of each target token of some examples, in nats, `[number of target tokens]`.

        Args:
            prefix: of all examples, or one for each; its `text` must be how an example begins, up to its first target
                at most.
            examples: they are run at once: a micro-batch.
            activation_checkpointing: run each layer again in the backward pass, in less memory.
        """
        texts, wanted, targets = _asked(examples, [len(each.text) for each in broadcast_prefix(prefix, len(examples))])
        hidden = self.backend.text_pass(prefix, texts, wanted, activation_checkpointing=activation_checkpointing).hidden
        return self.backend.lm_head.losses(hidden, targets, _candidate_ids(examples))

    def fused_loss(
        self, prompt: Tensor, text: Sequence[int], examples: Sequence[Example], activation_checkpointing: bool = False
    ) -> Tensor:
        """Return what `loss` gives behind `prefix(prompt, text)`, both in one pass; only where the way `can_fuse`.

        Args:
            prompt: a soft prompt `[P, H]`; the loss is differentiable with respect to it.
            text, examples, activation_checkpointing: as there.
        """
        texts, wanted, targets = _asked(examples, [len(text)] * len(examples))
        hidden = self.backend.fused_pass(self._embedded(prompt, text), texts, wanted, activation_checkpointing)
        return self.backend.lm_head.losses(hidden, targets, _candidate_ids(examples))

    @torch.no_grad()
    def read(self, prefix: Prefix, texts: Sequence[Sequence[int]]) -> tuple[Tensor, list[Prefix]]:
        """Run texts, at least one token each, without those that the prefix already holds.

        Returns:
            The logits after each text's last token, `[texts, V]`, and per text the prefix that ends with it.
        """
        ids = [torch.tensor(list(text)) for text in texts]
        done = self.backend.text_pass(prefix, ids, [torch.tensor([len(text) - 1]) for text in texts], extend=True)
        return self.backend.lm_head.logits(done.hidden), done.extended

    def continued(self, prefixes: Sequence[Prefix]) -> ContinuedRows:
        """Return rows that are continued a token at a time, each from the end of a prefix."""
        if self.shares_cache:
            return SharedCache(self.hf_model, self.backend, prefixes)
        return OwnPrefixes(self.backend, prefixes)


def _version(prompt: Tensor) -> int:
    """Return how often a tensor was changed in place; a tensor made in inference mode does not count that."""
    return 0 if prompt.is_inference() else prompt._version


def _asked(examples: Sequence[Example], shared_text_len: Sequence[int]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return the texts of examples, the positions that predict their targets, and all targets.

    Args:
        examples: whole.
        shared_text_len: how many of an example's first tokens stand before its text.
    """
    # What a text's last token is followed by is nobody's question, so it is not run; but one token always is.
    texts = [
        torch.tensor(e.ids[h : max(len(e.ids) - 1, h + 1)]) for e, h in zip(examples, shared_text_len, strict=True)
    ]
    wanted = [torch.arange(e.start - h - 1, len(e.ids) - h - 1) for e, h in zip(examples, shared_text_len, strict=True)]
    return texts, wanted, torch.cat([torch.tensor(e.ids[e.start :]) for e in examples])


def _candidate_ids(examples: Sequence[Example]) -> Tensor | None:
    """Return the tokens that each target is told from, filled up with -1; None where examples name none."""
    if not all(example.candidate_ids for example in examples):
        return None
    return pad_sequence([torch.tensor(tokens) for e in examples for tokens in e.candidate_ids], True, -1)
