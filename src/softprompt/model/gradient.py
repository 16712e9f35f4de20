"""The exact gradient on a prompt, with the prompt run through the model once a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from softprompt.data.example import Example
from softprompt.model.frozen import FrozenModel
from softprompt.model.prefix import Prefix, is_prefix


class TokenLoss:
    """The loss of each target token; an objective may compute another.

    Attributes:
        can_fuse: whether `Backend.fused_loss` gives the same.
    """

    can_fuse: ClassVar[bool] = True

    def loss(
        self, model: FrozenModel, prefix: Prefix, examples: Sequence[Example], activation_checkpointing: bool
    ) -> Tensor:
        """Return the losses of a micro-batch after a prefix; their sum is what the gradient is computed of."""
        return model.backend.loss(prefix, examples, activation_checkpointing)


_TOKEN_LOSS = TokenLoss()


def prompt_gradient(
    model: FrozenModel,
    weights: Tensor,
    shared_text_ids: Sequence[int],
    micro_batches: Sequence[Sequence[Example]],
    activation_checkpointing: bool = False,
    objective: TokenLoss = _TOKEN_LOSS,
) -> tuple[float, Tensor]:
    """Return the mean loss over all target tokens of a step, and its gradient on the prompt.

    The prompt's own pass gives the prefix, which is detached into leaves; every micro-batch of text adds to the leaves'
    gradients; one backward pass from there through the prompt ends the step. A soft prompt and a single micro-batch run
    in one pass where the model's backend `can_fuse` them: half as many operations, each on more tokens.

    Args:
        weights: a soft prompt `[P, H]` or a learned prefix `[L, 2, K, P, D]`; float32.
        shared_text_ids: token ids that every example begins with; they are run once, with the prompt.
        micro_batches: the step's examples; how they are cut changes the result by rounding only.
        activation_checkpointing: run each layer of the texts' passes again in the backward pass, in less memory.
        objective: computes the loss of examples.

    Returns:
        The loss in nats per target token, and its gradient, of the weights' shape.
    """
    weights = weights.detach().requires_grad_()
    targets = sum(example.targets for part in micro_batches for example in part)
    with torch.enable_grad():
        if len(micro_batches) == 1 and objective.can_fuse and model.backend.can_fuse and not is_prefix(weights):
            loss = model.backend.fused_loss(weights, shared_text_ids, micro_batches[0], activation_checkpointing).sum()
            loss.backward()
            total = float(loss.detach())
        else:
            prefix = model.prefix(weights, shared_text_ids)
            leaves = prefix.leaves()
            total = 0.0
            for part in micro_batches:
                # The sum: divided by the number of targets, half precision would lose the gradients of most logits.
                loss = objective.loss(model, leaves, part, activation_checkpointing).sum()
                loss.backward()
                total += float(loss.detach())
            prefix.backward(leaves)
    assert weights.grad is not None
    return total / targets, weights.grad / targets
