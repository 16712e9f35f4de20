"""The prefixes of a batch of texts: one for all of them, or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from softprompt.model.prefix import Prefix


class PrefixBatch:
    """The prefixes of some texts, padded to one length.

    Padding is before a prefix, never between it and its text: some models count cache slots, not positions.

    Attributes:
        lengths: positions of each text's prefix.
        longest: P, the length of the longest.
    """

    def __init__(self, prefixes: Sequence[Prefix]) -> None:
        self.lengths = [prefix.length for prefix in prefixes]
        self.longest = max(self.lengths)
        self._fullest = max(prefixes, key=lambda prefix: prefix.length)
        self._runs = [list(run) for _, run in groupby(prefixes, key=id)]

    def states(self, kind: Literal["keys", "values"], layer: int, dtype: torch.dtype) -> Tensor:
        """Return the keys or values at a layer, `[n, K, P, D]`; only where P is not 0."""
        padded: dict[int, Tensor] = {}
        for prefix, *_ in self._runs:
            if id(prefix) not in padded:
                padded[id(prefix)] = self._padded(prefix, kind, layer, dtype)
        parts = [padded[id(run[0])].expand(len(run), -1, -1, -1) for run in self._runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _padded(self, prefix: Prefix, kind: Literal["keys", "values"], layer: int, dtype: torch.dtype) -> Tensor:
        padding = self.longest - prefix.length
        if not padding:
            return getattr(prefix, kind)[layer].to(dtype)  # type: ignore[no-any-return]
        # An empty prefix has no tensors: its padding is shaped like another's.
        tensor = getattr(prefix, kind)[layer] if prefix.length else getattr(self._fullest, kind)[layer][:, :, :0]
        return pad(tensor.to(dtype), (0, 0, padding, 0))


def broadcast_prefix(prefix: Prefix | Sequence[Prefix], texts: int) -> Sequence[Prefix]:
    """Return a prefix for each text, from one for all or from one each."""
    prefixes = [prefix] * texts if isinstance(prefix, Prefix) else prefix
    assert len(prefixes) == texts
    return prefixes
