"""The interface of the backends, which run text against a prefix, and what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from threading import RLock

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from softprompt.data.example import Choices, Example
from softprompt.model.backends.attention import MAX_LENGTH_RATIO
from softprompt.model.backends.decode import DecodeBatch, OwnPrefixBatch, SharedCacheBatch
from softprompt.model.backends.onednn import faster_matmuls
from softprompt.model.backends.prefix_batch import broadcast_prefix
from softprompt.model.lm_head import LMHead
from softprompt.model.prefix import Prefix, is_prefix
from softprompt.private_interfaces import input_device


@dataclass(frozen=True)
class TextPass:
    """What one pass of text gives.

    Attributes:
        hidden: `[R, H]`, the output head's input at each output position, text by text.
        extended: per text, the prefix that ends with it; empty unless asked for.
    """

    hidden: Tensor
    extended: list[Prefix] = field(default_factory=list)


class Backend(ABC):
    """Runs prompts and texts through a frozen model.

    The rest of the package calls `prefix`, `loss`, `score`, `prefill` and `decode`. They are built on passes of a
    prompt and of texts, which a backend for causal models defines; one for other models would define the five.

    A position counts from the first token of a text; -1 is the last position of the prefix, whose logits
    predict a text's first token.

    Args:
        shares_cache: whether rows of unlike lengths can be continued in one cache of the model's own.
    """

    name: str
    pads: bool  # whether the shorter texts of a pass cost as much as the longest
    can_checkpoint = False  # whether the layers can run again in the backward pass
    can_fuse = False  # whether a prompt and texts can run in one pass
    max_length_ratio = MAX_LENGTH_RATIO  # the largest, of the lengths of texts whose attention is computed together

    def __init__(self, hf_model: PreTrainedModel, shares_cache: bool = True) -> None:
        self.hf_model, self.shares_cache = hf_model, shares_cache
        self.lock = RLock()
        self.lm_head = LMHead(hf_model, self.running)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Lock the model, which all threads share: a pass hooks it, and may switch its attention."""
        with self.lock, faster_matmuls():
            yield

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Return the input embeddings of token ids, `[T, H]`, through the model's own module (Gemma scales in it)."""
        indices = torch.tensor(list(ids), dtype=torch.long, device=input_device(self.hf_model))
        with torch.no_grad():
            embedded: Tensor = self.hf_model.get_input_embeddings()(indices)
        return embedded

    def prefix(self, weights: Tensor | None, text_ids: Sequence[int] = ()) -> Prefix:
        """Run a prompt, and the text that all examples begin with, once.

        Args:
            weights: a soft prompt `[P, H]`, or a learned prefix `[L, 2, K, P, D]`; None for no virtual tokens.
            text_ids: token ids that follow the virtual tokens in every example.

        Returns:
            The prefix; differentiable with respect to `weights`. Empty without virtual tokens and text.
        """
        if weights is not None and is_prefix(weights):
            prefix = Prefix.of(weights.to(input_device(self.hf_model)))
            return self.extend([prefix], text_ids)[0] if len(text_ids) else prefix
        embeddings = self._embedded(weights, text_ids)
        if not embeddings.shape[1]:
            return Prefix()
        return replace(self.prompt_pass(embeddings), shared_text_ids=tuple(text_ids))

    def extend(self, prefixes: Sequence[Prefix], text_ids: Sequence[int]) -> list[Prefix]:
        """Return prefixes extended by a text that follows each of them."""
        nothing = torch.tensor([], dtype=torch.long)
        texts = [torch.tensor(list(text_ids))] * len(prefixes)
        return self.text_pass(prefixes, texts, output_positions=[nothing] * len(prefixes), extend=True).extended

    def _embedded(self, weights: Tensor | None, text_ids: Sequence[int]) -> Tensor:
        """Return the embeddings of a soft prompt and of what all examples begin with, `[1, P, H]`."""
        parts = [self.embed(text_ids)] if len(text_ids) or weights is None else []
        if weights is not None:
            parts.insert(0, weights.to(input_device(self.hf_model), self.hf_model.dtype))
        return torch.cat(parts).unsqueeze(0)

    def loss(
        self, prefix: Prefix | Sequence[Prefix], examples: Sequence[Example], activation_checkpointing: bool = False
    ) -> Tensor:
        """Return the loss of each target token of some examples, in nats, `[number of target tokens]`.

        Args:
            prefix: of all examples, or one for each; each example begins with its `shared_text_ids`, before the
                first target.
            examples: a micro-batch, run at once.
            activation_checkpointing: run each layer again in the backward pass, in less memory.
        """
        prefixes = broadcast_prefix(prefix, len(examples))
        texts, output_positions, targets = _texts_and_targets(
            examples, [len(each.shared_text_ids) for each in prefixes]
        )
        hidden = self.text_pass(
            prefix, texts, output_positions=output_positions, activation_checkpointing=activation_checkpointing
        ).hidden
        return self.lm_head.losses(hidden, targets, _candidate_ids(examples))

    def fused_loss(
        self,
        weights: Tensor,
        text_ids: Sequence[int],
        examples: Sequence[Example],
        activation_checkpointing: bool = False,
    ) -> Tensor:
        """Return what `loss` gives after `prefix(weights, text_ids)`, from one pass; only where `can_fuse`.

        Args:
            weights: a soft prompt `[P, H]`; the loss is differentiable with respect to it.
        """
        texts, output_positions, targets = _texts_and_targets(examples, [len(text_ids)] * len(examples))
        hidden = self.fused_pass(self._embedded(weights, text_ids), texts, output_positions, activation_checkpointing)
        return self.lm_head.losses(hidden, targets, _candidate_ids(examples))

    @torch.no_grad()
    def score(self, prefixes: Sequence[Prefix], choices: Sequence[Choices]) -> Tensor:
        """Return the log-likelihood of each label, the sum over its tokens.

        Args:
            prefixes: one for each row; all with the same `shared_text_ids`, which every input begins with.
            choices: each row's input and labels.

        Returns:
            `[rows, labels]`, float64, on the CPU.
        """
        shared_text_len = len(prefixes[0].shared_text_ids)
        lengths = [len(each.input_ids) - shared_text_len for each in choices]
        trees = [each.tree for each in choices]
        texts = [torch.tensor(each.ids[shared_text_len:]) for each in choices]
        output_positions = [
            torch.arange(length - 1, length + len(tree.ids)) for tree, length in zip(trees, lengths, strict=True)
        ]
        parents = None
        if any(tree.ids for tree in trees):
            parents = [torch.tensor(tree.parents_after(n)) for tree, n in zip(trees, lengths, strict=True)]
        hidden = self.text_pass(prefixes, texts, output_positions=output_positions, parents=parents).hidden
        starts = accumulate((len(each) for each in output_positions[:-1]), initial=0)
        indices = [torch.tensor(tree.positions) + start for tree, start in zip(trees, starts, strict=True)]
        tokens = torch.tensor([token for tree in trees for token in tree.tokens])
        each_token = self.lm_head.log_probabilities(hidden, torch.cat(indices), tokens).double()
        likelihoods = []
        for tree, own in zip(trees, each_token.split([len(tree.tokens) for tree in trees]), strict=True):
            values = own.tolist()
            likelihoods.append([sum(values[index] for index in path) for path in tree.paths])
        return torch.tensor(likelihoods, dtype=torch.float64)

    @torch.no_grad()
    def prefill(self, prefix: Prefix | Sequence[Prefix], texts: Sequence[Sequence[int]]) -> tuple[Tensor, list[Prefix]]:
        """Run texts after a prefix, to continue them.

        Args:
            prefix: the same for all texts, or one for each.
            texts: token ids, at least one each, without those that the prefix holds.

        Returns:
            The logits after each text's last token, `[texts, V]`, and per text the prefix that ends with it.
        """
        ids = [torch.tensor(list(text)) for text in texts]
        done = self.text_pass(
            prefix, ids, output_positions=[torch.tensor([len(text) - 1]) for text in texts], extend=True
        )
        return self.lm_head.logits(done.hidden), done.extended

    def decode(self, prefixes: Sequence[Prefix]) -> DecodeBatch:
        """Return rows that are continued a token at a time, each from the end of a prefix."""
        if self.shares_cache:
            return SharedCacheBatch(self.hf_model, self.running, prefixes)
        return OwnPrefixBatch(self.prefill, prefixes)

    @abstractmethod
    def prompt_pass(self, embeddings: Tensor) -> Prefix:
        """Run embeddings `[1, P, H]` (P at least 1) on their own and return their keys and values."""

    @abstractmethod
    def text_pass(
        self,
        prefix: Prefix | Sequence[Prefix],
        texts: Sequence[Tensor],
        output_positions: Sequence[Tensor],
        parents: Sequence[Tensor] | None = None,
        extend: bool = False,
        activation_checkpointing: bool = False,
    ) -> TextPass:
        """Run texts (ids `[t]` each, t at least 1) after a prefix.

        Args:
            prefix: the prefix, the same for all texts, or one for each; their lengths and texts may differ.
            output_positions: per text, the positions at which the output head's input is returned.
            parents: per text, for each token the position of the token before it: a text that branches is a tree.
                None where every token follows the one before.
            extend: also return, per text, the prefix that ends with it; not for trees.
            activation_checkpointing: save only the layers' inputs for the backward pass, and run each layer again
                there; only where the backend `can_checkpoint`.
        """

    def fused_pass(
        self,
        embeddings: Tensor,
        texts: Sequence[Tensor],
        output_positions: Sequence[Tensor],
        activation_checkpointing: bool = False,
    ) -> Tensor:
        """Run embeddings `[1, P, H]` and texts after them in one pass, differentiable; only where `can_fuse`.

        Returns:
            `[R, H]`, the output head's input at each output position, text by text.
        """
        raise NotImplementedError


def gather_hidden(
    hidden: Tensor, starts: Sequence[int], output_positions: Sequence[Tensor], prefixes: Sequence[Prefix]
) -> Tensor:
    """Gather the head's input at the output positions.

    Args:
        hidden: `[B, T, H]`.
        starts: per text, the index of its first token in the flattened `[B·T]` axis.
        output_positions: per text, positions; -1 is the last of the text's prefix.

    Returns:
        `[R, H]`.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    lasts: dict[int, Tensor] = {}
    indices = []
    for positions, start, prefix in zip(output_positions, starts, prefixes, strict=True):
        index = positions + start
        first = positions < 0
        if bool(first.any()):
            if prefix.last is None:
                raise ValueError("the prefix has no output before the first token, so nothing predicts it")
            lasts.setdefault(id(prefix), prefix.last.to(flat.dtype))
            index[first] = flat.shape[0] + list(lasts).index(id(prefix))
        indices.append(index)
    if lasts:
        flat = torch.cat([flat, *lasts.values()])
    return flat.index_select(0, torch.cat(indices).to(flat.device))


def _texts_and_targets(
    examples: Sequence[Example], shared_text_len: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return the texts of examples, the positions that predict their targets, and all targets.

    Args:
        shared_text_len: how many of an example's first tokens its prefix holds.
    """
    starts = list(zip(examples, shared_text_len, strict=True))
    # The last token's prediction is never used, so the token is not run; but one token always is.
    texts = [torch.tensor(e.ids[start : max(len(e.ids) - 1, start + 1)]) for e, start in starts]
    output_positions = [torch.arange(e.start - start - 1, len(e.ids) - start - 1) for e, start in starts]
    return texts, output_positions, torch.cat([torch.tensor(e.ids[e.start :]) for e in examples])


def _candidate_ids(examples: Sequence[Example]) -> Tensor | None:
    """Return each target's candidate tokens, `[targets, A]`, padded with -1; None where an example has none."""
    if not all(example.candidate_ids for example in examples):
        return None
    return pad_sequence([torch.tensor(tokens) for e in examples for tokens in e.candidate_ids], True, -1)
