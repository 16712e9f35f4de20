"""What the ways of running text against a prefix have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.model.backends.attention import MAX_LENGTH_RATIO
from softprompt.model.backends.onednn import products
from softprompt.model.lm_head import LMHead
from softprompt.model.prefix import Prefix
from softprompt.private_interfaces import device_of_hook


@dataclass(frozen=True)
class TextPass:
    """What one pass of text gives.

    Attributes:
        hidden: `[R, H]`, the output head's input at each wanted position, text by text.
        extended: per text, the prefix that ends with it; empty unless asked for.
    """

    hidden: Tensor
    extended: list[Prefix] = field(default_factory=list)


class Backend(ABC):
    """Runs prompts and texts through a frozen model.

    A position counts from the first token of a text; -1 is the last position of the prefix, whose logits
    predict a text's first token.
    """

    name: str
    pads: bool  # whether the shorter texts of a pass cost as much as the longest
    can_checkpoint = False  # whether the layers can run again in the backward pass
    can_fuse = False  # whether a prompt and texts can run in one pass
    max_length_ratio = MAX_LENGTH_RATIO  # how unlike in length texts may be whose attention is computed together

    def __init__(self, hf_model: PreTrainedModel) -> None:
        self.hf_model = hf_model
        self.lock = RLock()
        self.lm_head = LMHead(hf_model, self.running)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have the model alone: a pass hooks it, and may switch the attention of the one that all threads share."""
        with self.lock, products():
            yield

    @abstractmethod
    def prompt_pass(self, embeddings: Tensor) -> Prefix:
        """Run embeddings `[1, P, H]` (P at least 1) on their own and note their keys and values."""

    @abstractmethod
    def text_pass(
        self,
        prefix: Prefix | Sequence[Prefix],
        texts: Sequence[Tensor],
        wanted: Sequence[Tensor],
        parents: Sequence[Tensor] | None = None,
        extend: bool = False,
        activation_checkpointing: bool = False,
    ) -> TextPass:
        """Run texts (ids `[t]` each, t at least 1) behind a prefix.

        Args:
            prefix: the prefix, the same for all texts, or one for each; their lengths and texts may differ.
            texts: token ids of each text.
            wanted: per text, the positions at which the output head's input is returned.
            parents: per text, for each token the position of the token before it: a text that branches is a tree.
                None where every token follows the one before.
            extend: also return, per text, the prefix that ends with it; not for trees.
            activation_checkpointing: keep the layers' inputs alone for the backward pass, and run each layer again
                there; only where the backend `can_checkpoint`.
        """

    def fused_pass(
        self,
        embeddings: Tensor,
        texts: Sequence[Tensor],
        wanted: Sequence[Tensor],
        activation_checkpointing: bool = False,
    ) -> Tensor:
        """Run embeddings `[1, P, H]` and texts behind them in one pass, differentiable; only where the way `can_fuse`.

        Args:
            embeddings: what all texts stand behind.
            texts, wanted, activation_checkpointing: as of a text's pass.

        Returns:
            `[R, H]`, the output head's input at each wanted position, text by text.
        """
        raise NotImplementedError


def input_device(hf_model: PreTrainedModel) -> torch.device:
    """Return where a model takes its token ids: where its embedding is, or is brought to when it is run."""
    embedding = hf_model.get_input_embeddings()
    place = device_of_hook(embedding)
    return torch.device(next(embedding.parameters()).device if place is None else place)


def rows_of(hidden: Tensor, starts: Sequence[int], wanted: Sequence[Tensor], prefixes: Sequence[Prefix]) -> Tensor:
    """Gather the head's input at the wanted positions.

    Args:
        hidden: `[B, T, H]`.
        starts: per text, where its first token lies in the flattened `[B·T]` axis.
        wanted: per text, positions; -1 is the last of the text's prefix.
        prefixes: per text, what gives that last position.

    Returns:
        `[R, H]`.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    lasts: dict[int, Tensor] = {}
    places = []
    for own, start, prefix in zip(wanted, starts, prefixes, strict=True):
        place = own + start
        first = own < 0
        if bool(first.any()):
            if prefix.last is None:
                raise ValueError("nothing stands before the first token, so nothing predicts it")
            lasts.setdefault(id(prefix), prefix.last.to(flat.dtype))
            place[first] = flat.shape[0] + list(lasts).index(id(prefix))
        places.append(place)
    if lasts:
        flat = torch.cat([flat, *lasts.values()])
    return flat.index_select(0, torch.cat(places).to(flat.device))
