"""The output head: run where logits are wanted, a piece at a time, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from softprompt.errors import ModelError

# Logits that are held at once: 128 MiB of them in float32. Fewer make the matrix product less efficient.
LOGITS_AT_ONCE = 2**25


class LMHead:
    """A model's output head, with whatever the model does to its logits afterwards (scaling, soft-capping).

    Both of its runs are runs of the full model: one in which the head sees nothing and its input is taken away, and
    one in which the decoder does nothing and the head sees what it is given.

    Args:
        hf_model: a causal language model.
        running: a context to run the model in; nobody else does while it lasts.
    """

    def __init__(self, hf_model: PreTrainedModel, running: Callable[[], AbstractContextManager[None]]) -> None:
        lm_head = hf_model.get_output_embeddings()
        if lm_head is None:
            raise ModelError(f"{type(hf_model).__name__} has no output head; give a causal language model")
        self._model, self._module, self._running = hf_model, lm_head, running
        self._decoder = hf_model.get_decoder()
        self._empty: Any = None  # a decoder's output without positions, of the kind that the model itself gives

    @contextmanager
    def skipped(self, take: Callable[[Tensor], None]) -> Iterator[None]:
        """Hand the head's input `[B, T, H]` to `take`, and compute no logits."""

        def nothing(_module: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            take(args[0])
            return (args[0][:, :0],)

        def note(_module: torch.nn.Module, _args: object, output: Any) -> None:
            self._empty = type(output)(last_hidden_state=output[0][:, :0].detach())

        handles = [self._module.register_forward_pre_hook(nothing), self._decoder.register_forward_hook(note)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `[R, V]` of what `skipped` took, `[R, H]`."""
        with self._running(), replaced(self._decoder, lambda *_args, **_kwargs: self._empty):
            handle = self._module.register_forward_pre_hook(lambda _module, _args: (hidden.unsqueeze(0),))
            try:
                one = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
                made: Tensor = self._model(input_ids=one, use_cache=False).logits.squeeze(0)
            finally:
                handle.remove()
        return made

    def losses(self, hidden: Tensor, targets: Tensor, candidate_ids: Tensor | None = None) -> Tensor:
        """Return the loss of each target token `[R]` in nats, from the head's inputs `[R, H]` at its position.

        Args:
            hidden: `[R, H]`.
            targets: `[R]`.
            candidate_ids: `[R, A]`, the tokens that can continue some label there, the target among them, filled up
                with -1. Half of the loss is then restricted to these.

        No more than `LOGITS_AT_ONCE` logits are held. A row's gradient is found along with its loss, while its
        logits are there, as in Liger Kernel's fused cross-entropy (Hsu et al. 2024).
        """
        if any(weight.requires_grad for weight in self._module.parameters()):  # its own gradients are wanted as well
            pieces, parts = list(_pieces(hidden, self._model)), []
            if len(pieces) == 1:
                return self._plain_losses(hidden, targets, candidate_ids)
            for begin, piece in pieces:  # whose logits are made once more for the gradients
                own = slice(begin, begin + len(piece))
                others = None if candidate_ids is None else candidate_ids[own]
                parts.append(checkpoint(self._plain_losses, piece, targets[own], others, use_reentrant=False))
            return torch.cat(parts)
        made: Tensor = _Losses.apply(hidden, targets, candidate_ids, self)  # type: ignore[no-untyped-call]
        return made

    def _plain_losses(self, hidden: Tensor, targets: Tensor, candidate_ids: Tensor | None) -> Tensor:
        logs = self.logits(hidden).float().log_softmax(dim=-1)
        losses = -logs.gather(1, targets[:, None].to(logs.device)).squeeze(1)
        return (
            losses
            if candidate_ids is None
            else losses + _near(logs, candidate_ids.to(logs.device)).logsumexp(dim=1) / 2
        )

    @torch.no_grad()
    def log_probabilities(self, hidden: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return log-probabilities of single tokens.

        Args:
            hidden: `[R, H]`.
            rows: `[N]`, for each wanted number the row of `hidden`.
            tokens: `[N]`, the token.

        Returns:
            `[N]`, float32, on the CPU.
        """
        found = torch.empty(len(rows))
        for begin, piece in _pieces(hidden, self._model):
            there = ((rows >= begin) & (rows < begin + len(piece))).nonzero().squeeze(1)
            logits = self.logits(piece).float()
            chosen = (rows[there] - begin).to(logits.device)
            likely = logits[chosen, tokens[there].to(logits.device)] - logits.logsumexp(dim=-1)[chosen]
            found[there] = likely.cpu()
        return found


class _Losses(torch.autograd.Function):
    """Cross-entropy in pieces, whose gradients are computed in the forward pass: logits are made once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, candidate_ids: Tensor | None, lm_head: LMHead) -> Tensor:
        needed = ctx.needs_input_grad[0]
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for begin, piece in _pieces(hidden, lm_head._model):
            with torch.set_grad_enabled(needed):
                inputs = piece.detach().requires_grad_(needed)
                logits = lm_head.logits(inputs)
            logs = logits.detach().float().log_softmax(dim=-1)
            wanted = targets[begin : begin + len(piece), None].to(logs.device)
            loss = -logs.gather(1, wanted).squeeze(1)
            if candidate_ids is not None:
                others = candidate_ids[begin : begin + len(piece)].to(logs.device)
                near = _near(logs, others)
                # Half of -log p(target), and half of -log p(target) / p(others): in both, the first is the same.
                loss += near.logsumexp(dim=1) / 2
            losses.append(loss)
            if needed:  # a loss's gradient on the logits: the probabilities, less one where the target is
                share = logs.exp_()
                if candidate_ids is not None:
                    share.div_(2).scatter_add_(1, others.clamp(min=0), near.softmax(dim=1) / 2)
                share.scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=logs.dtype))
                gradients.extend(torch.autograd.grad(logits, inputs, share.to(logits.dtype)))
        if needed:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * grad[:, None].to(gradients), None, None, None


def _near(logs: Tensor, candidate_ids: Tensor) -> Tensor:
    """Return the log-probabilities `[R, A]` of the tokens `candidate_ids`; of -1, none."""
    return logs.gather(1, candidate_ids.clamp(min=0)).masked_fill(candidate_ids < 0, -torch.inf)


def _pieces(hidden: Tensor, hf_model: PreTrainedModel) -> Iterator[tuple[int, Tensor]]:
    """Cut `[R, H]` into runs of rows (one at least), each with where it begins."""
    rows = max(1, LOGITS_AT_ONCE // hf_model.config.get_text_config().vocab_size)
    for begin in range(0, max(len(hidden), 1), rows):
        yield begin, hidden[begin : begin + rows]


@contextmanager
def replaced(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run `forward` instead of its own; hooks of other libraries on it are put back afterwards."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
