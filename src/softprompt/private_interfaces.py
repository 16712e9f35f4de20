"""Private names of other packages that are used, and what happens when one is missing.

`pyproject.toml` bounds these packages' versions; a test finds private names that `PRIVATE` does not list.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class Private(NamedTuple):
    """A private name.

    Attributes:
        package: the package that has it.
        used_in: the modules that name it.
        why: what it is for, and why no public name does it.
        without: what happens when it is missing, or does something else.
    """

    package: str
    used_in: tuple[str, ...]
    why: str
    without: str


PRIVATE: dict[str, Private] = {
    "_linear_pointwise": Private(
        "torch",
        ("private_interfaces",),
        "multiplies float32 matrices in oneDNN; `linear` uses MKL, and no setting changes that",
        "PyTorch chooses the library, which is slower on AMD's processors; that is logged once",
    ),
    "_attn_implementation": Private(
        "transformers",
        ("model.backends.packed", "model.backends.tiny_copy"),
        "the name of the attention that a pass uses; `set_attn_implementation` is public, but looks through the whole "
        "model and may ask a hub for kernels, twice a pass",
        "the packed attention is not called; the load check refuses that backend, and the padded one is used",
    ),
    "_hf_hook": Private(
        "accelerate",
        ("private_interfaces",),
        "the device that a module's inputs are moved to, on a model that is split over devices",
        "inputs are put where the embedding's weights are; a model whose weights are offloaded fails to load",
    ),
    "_extract_corpus_statistics": Private(
        "sacrebleu",
        ("evaluation.completions",),
        "each output's counts, from which intervals are resampled; the public scores have no interval per text",
        "completions are not scored: AttributeError",
    ),
    "_compute_score_from_stats": Private(
        "sacrebleu",
        ("evaluation.primary_metric",),
        "the score of summed counts",
        "completions are not scored: AttributeError",
    ),
}


@cache
def onednn_product() -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """Return PyTorch's product in oneDNN of inputs `[…, in]`, a weight `[out, in]` and a bias; None if there is none.

    It is tried once: an operator with other results does not count.
    """

    def product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
        return result

    inputs, weight, bias = (torch.arange(1.0, 1 + n).reshape(shape) for n, shape in ((6, (2, 3)), (12, (4, 3)), (4, 4)))
    try:
        with torch.no_grad():
            same = torch.allclose(product(inputs, weight, bias), torch.nn.functional.linear(inputs, weight, bias))
    except Exception as error:  # gone, or with other arguments: whatever PyTorch raises then
        reason = f"{type(error).__name__}: {str(error).split(chr(10))[0]}"
    else:
        if same:
            return product
        reason = "it gives other results"
    logger.warning("PyTorch %s multiplies more slowly than it could: no oneDNN product (%s)", torch.__version__, reason)
    return None


def input_device(hf_model: PreTrainedModel) -> torch.device:
    """Return the device that a model takes its token ids on: where its embedding is, or where accelerate moves them."""
    embedding = hf_model.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return torch.device(next(embedding.parameters()).device if device is None else device)
