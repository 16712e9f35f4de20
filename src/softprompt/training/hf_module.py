"""A prompt as a PyTorch module, for those who have a `transformers.Trainer` script."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from softprompt.errors import SettingsError
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.base_model import base_model_record
from softprompt.prompt.initialization import text_prompt
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import SoftPrompt

_IGNORED = -100  # transformers' label of what is not learned
# What the Trainer asks a model for, and why this one does not have it.
_NOT_THERE = {
    "config": "label_smoothing_factor is not supported: TrainablePrompt takes the labels' loss alone; leave it out",
    "get_input_embeddings": "neftune_noise_alpha is not supported: its noise belongs to embeddings that are trained; "
    "leave it out",
    "generate": "predict_with_generate is not supported; take softprompt.generate with the soft_prompt() that was made",
}


class _NotSupportedError(SettingsError, AttributeError):
    """A setting of the Trainer's needs what a prompt does not have; `hasattr` says so too."""


class TrainablePrompt(torch.nn.Module):
    """Virtual tokens in front of a frozen model; `transformers.Trainer` takes it where it takes PEFT's wrapped model.

    The frozen model is no submodule: checkpoints hold the prompt alone, and `train()` switches no dropout on in it.
    The Trainer's `gradient_checkpointing` runs the frozen layers once more in the backward pass; `torch_compile`
    changes nothing; label smoothing, NEFTune's noise and `predict_with_generate` are refused.

    Args:
        model: the frozen model.
        start: where the virtual tokens start: `[P, H]`, or a text whose tokens' embeddings they take.
        num_virtual_tokens: P, where `start` is a text; None for its length, 20 at least.
    """

    def __init__(self, model: FrozenModel, start: Tensor | str, num_virtual_tokens: int | None = None) -> None:
        super().__init__()
        first = text_prompt(model, num_virtual_tokens, start) if isinstance(start, str) else start
        self.frozen = model
        self.prompt = torch.nn.Parameter(first.detach().float().clone())
        self._recomputes = False

    def __getattr__(self, name: str) -> Any:
        """Say why something is not there, where a setting of the Trainer's asks for it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _NOT_THERE:
                raise _NotSupportedError(_NOT_THERE[name]) from None
            raise

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: object = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Run layers again in the backward pass, in less memory, as the Trainer's `gradient_checkpointing` asks.

        Raises:
            SettingsError: the model's layers cannot, or only some are to.
        """
        if not self.frozen.backend.can_checkpoint:
            raise SettingsError(
                f"gradient_checkpointing is not supported for {self.frozen.source}: its attention is one of its own; "
                "leave it out, and take smaller batches"
            )
        if every_n_layers != 1 or offload:
            raise SettingsError(
                "gradient_checkpointing takes every layer, and keeps nothing elsewhere; leave those out"
            )
        self._recomputes = True

    def activation_checkpointing_disable(self) -> None:
        """Keep what the layers compute for the backward pass."""
        self._recomputes = False

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: object = None, **more: Any) -> None:
        """Do the same, by its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **more)

    gradient_checkpointing_disable = activation_checkpointing_disable

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what is run depends on the texts' lengths
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_kwargs: object,
    ) -> CausalLMOutput:
        """Return the loss of a padded batch, its logits where there are no labels, and both in eval mode.

        The prompt runs once; padding, on whichever side, is dropped before the texts run behind it, so that it never
        stands between prompt and text.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, 0 for padding; None where there is none.
            labels: `[B, T]`, -100 where nothing is learned. The first text token's label counts: the prompt's last
                position predicts it, as with PEFT.
            num_items_in_batch: what the summed loss is divided by, for accumulation over several batches; None for
                the number of labels.

        Returns:
            `loss`, a mean in nats, and `logits` `[B, T, V]`, zero at padding: in eval mode both, for `compute_metrics`;
            in training mode the loss where there are labels, and the logits where there are none.
        """
        real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        texts = [ids[there].cpu() for ids, there in zip(input_ids, real, strict=True)]
        whole = [torch.arange(len(text)) for text in texts]
        if labels is None:
            return CausalLMOutput(logits=self._filled(self._hidden(texts, whole), real))
        targets = [row[there].cpu() for row, there in zip(labels, real, strict=True)]
        learned = [row != _IGNORED for row in targets]
        wanted = torch.cat([row[there] for row, there in zip(targets, learned, strict=True)])
        if self.training:
            hidden, logits = self._hidden(texts, [there.nonzero().squeeze(1) - 1 for there in learned]), None
        else:  # each text's hidden states from the prompt's last position on
            every = self._hidden(texts, [torch.arange(-1, len(text)) for text in texts])
            parts = every.split([len(text) + 1 for text in texts])
            hidden = torch.cat([part[:-1][there] for part, there in zip(parts, learned, strict=True)])
            logits = self._filled(torch.cat([part[1:] for part in parts]), real)
        total = self.frozen.backend.lm_head.losses(hidden, wanted).sum()
        loss = total / (len(wanted) if num_items_in_batch is None else num_items_in_batch)
        return CausalLMOutput(loss=loss, logits=logits)

    def _hidden(self, texts: list[Tensor], wanted: list[Tensor]) -> Tensor:
        """Return the output head's inputs at some positions of each text behind the prompt, one after the other."""
        activation_checkpointing = self._recomputes and torch.is_grad_enabled()
        return self.frozen.backend.text_pass(
            self.frozen.prefix(self.prompt), texts, wanted, activation_checkpointing=activation_checkpointing
        ).hidden

    def _filled(self, hidden: Tensor, real: Tensor) -> Tensor:
        """Return the logits `[B, T, V]` of all positions that are real; the others are zero."""
        logits = self.frozen.backend.lm_head.logits(hidden)
        filled = logits.new_zeros(*real.shape, logits.shape[-1])
        filled[real.to(logits.device)] = logits
        return filled

    def soft_prompt(self) -> SoftPrompt:
        """Return the prompt as it stands, to be saved, evaluated and generated with: for plain text."""
        record = Record(base_model=base_model_record(self.frozen))
        return SoftPrompt(self.prompt.detach().float().cpu().clone(), record)
