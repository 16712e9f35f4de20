"""The output head: run only where logits are wanted, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from softprompt.errors import ModelError

# Logits in memory at once: 128 MiB in float32. Fewer make the matrix product less efficient.
MAX_LOGITS = 2**25


class LMHead:
    """A model's output head, with whatever the model does to its logits afterwards (scaling, soft-capping).

    It always runs the full model: either the head's input is captured and the head gets no positions, or the decoder is
    skipped and the head gets the input that it is given.

    Args:
        hf_model: a causal language model.
        running: a context to run the model in, which locks it.
    """

    def __init__(self, hf_model: PreTrainedModel, running: Callable[[], AbstractContextManager[None]]) -> None:
        lm_head = hf_model.get_output_embeddings()
        if lm_head is None:
            raise ModelError(f"{type(hf_model).__name__} has no output head; give a causal language model")
        self._model, self._module, self._running = hf_model, lm_head, running
        self._decoder = hf_model.get_decoder()
        self._empty: Any = None  # a decoder output without positions, of the model's own class

    @contextmanager
    def skipped(self, capture: Callable[[Tensor], None]) -> Iterator[None]:
        """Pass the head's input `[B, T, H]` to `capture`, and compute no logits."""

        def skip(_module: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            capture(args[0])
            return (args[0][:, :0],)

        def remember_class(_module: torch.nn.Module, _args: object, output: Any) -> None:
            self._empty = type(output)(last_hidden_state=output[0][:, :0].detach())

        handles = [self._module.register_forward_pre_hook(skip), self._decoder.register_forward_hook(remember_class)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `[R, V]` from the head's input `[R, H]`."""
        with self._running(), replaced(self._decoder, lambda *_args, **_kwargs: self._empty):
            handle = self._module.register_forward_pre_hook(lambda _module, _args: (hidden.unsqueeze(0),))
            try:
                token = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
                logits: Tensor = self._model(input_ids=token, use_cache=False).logits.squeeze(0)
            finally:
                handle.remove()
        return logits

    def losses(self, hidden: Tensor, targets: Tensor, candidate_ids: Tensor | None = None) -> Tensor:
        """Return the loss of each target token `[R]` in nats, from the head's inputs `[R, H]` at its position.

        Args:
            hidden: `[R, H]`.
            targets: `[R]`.
            candidate_ids: `[R, A]`, the tokens that can continue some label there, the target among them, padded with
                -1. Half of the loss is then restricted to these.

        No more than `MAX_LOGITS` logits are in memory at once. A row's gradient is computed along with its loss, from
        the same logits, as in Liger Kernel's fused cross-entropy (Hsu et al. 2024).
        """
        if any(weight.requires_grad for weight in self._module.parameters()):  # the head is trained as well
            chunks = list(_chunks(hidden, self._model))
            if len(chunks) == 1:
                return self._differentiable_losses(hidden, targets, candidate_ids)
            parts = []
            for begin, chunk in chunks:  # whose logits are computed again in the backward pass
                rows = slice(begin, begin + len(chunk))
                candidates = None if candidate_ids is None else candidate_ids[rows]
                given = (chunk, targets[rows], candidates)
                parts.append(checkpoint(self._differentiable_losses, *given, use_reentrant=False))
            return torch.cat(parts)
        losses: Tensor = _FusedLosses.apply(hidden, targets, candidate_ids, self)  # type: ignore[no-untyped-call]
        return losses

    def _differentiable_losses(self, hidden: Tensor, targets: Tensor, candidate_ids: Tensor | None) -> Tensor:
        logs = self.logits(hidden).float().log_softmax(dim=-1)
        losses = -logs.gather(1, targets[:, None].to(logs.device)).squeeze(1)
        if candidate_ids is None:
            return losses
        return losses + _candidate_logs(logs, candidate_ids.to(logs.device)).logsumexp(dim=1) / 2

    @torch.no_grad()
    def log_probabilities(self, hidden: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return log-probabilities of single tokens.

        Args:
            hidden: `[R, H]`.
            rows: `[N]`, row indices of `hidden`.
            tokens: `[N]`, token ids.

        Returns:
            `[N]`, float32, on the CPU.
        """
        log_probabilities = torch.empty(len(rows))
        for begin, chunk in _chunks(hidden, self._model):
            in_chunk = ((rows >= begin) & (rows < begin + len(chunk))).nonzero().squeeze(1)
            logits = self.logits(chunk).float()
            row = (rows[in_chunk] - begin).to(logits.device)
            values = logits[row, tokens[in_chunk].to(logits.device)] - logits.logsumexp(dim=-1)[row]
            log_probabilities[in_chunk] = values.cpu()
        return log_probabilities


class _FusedLosses(torch.autograd.Function):
    """Cross-entropy in chunks, with gradients computed in the forward pass: logits are computed once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, candidate_ids: Tensor | None, lm_head: LMHead) -> Tensor:
        needed = ctx.needs_input_grad[0]
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for begin, chunk in _chunks(hidden, lm_head._model):
            with torch.set_grad_enabled(needed):
                inputs = chunk.detach().requires_grad_(needed)
                logits = lm_head.logits(inputs)
            logs = logits.detach().float().log_softmax(dim=-1)
            target = targets[begin : begin + len(chunk), None].to(logs.device)
            loss = -logs.gather(1, target).squeeze(1)
            if candidate_ids is not None:
                candidates = candidate_ids[begin : begin + len(chunk)].to(logs.device)
                candidate_logs = _candidate_logs(logs, candidates)
                # The mean of -log p(target) and of -log (p(target) / p(candidates)).
                loss += candidate_logs.logsumexp(dim=1) / 2
            losses.append(loss)
            if needed:  # the gradient on the logits: the probabilities, minus one at the target
                gradient = logs.exp_()
                if candidate_ids is not None:
                    gradient.div_(2).scatter_add_(1, candidates.clamp(min=0), candidate_logs.softmax(dim=1) / 2)
                gradient.scatter_add_(1, target, -torch.ones_like(target, dtype=logs.dtype))
                gradients.extend(torch.autograd.grad(logits, inputs, gradient.to(logits.dtype)))
        if needed:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * grad[:, None].to(gradients), None, None, None


def _candidate_logs(logs: Tensor, candidate_ids: Tensor) -> Tensor:
    """Return the log-probabilities `[R, A]` of candidate tokens; minus infinity for the padding -1."""
    return logs.gather(1, candidate_ids.clamp(min=0)).masked_fill(candidate_ids < 0, -torch.inf)


def _chunks(hidden: Tensor, hf_model: PreTrainedModel) -> Iterator[tuple[int, Tensor]]:
    """Cut `[R, H]` into chunks of rows, at least one; yield the index of each one's first row, and the chunk."""
    rows = max(1, MAX_LOGITS // hf_model.config.get_text_config().vocab_size)
    for begin in range(0, max(len(hidden), 1), rows):
        yield begin, hidden[begin : begin + rows]


@contextmanager
def replaced(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward method for a while; what other libraries had set on it is restored afterwards."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
