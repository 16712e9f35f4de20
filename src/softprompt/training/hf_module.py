"""A trainable prompt as a PyTorch module, for `transformers.Trainer`."""

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

_IGNORED = -100  # the label of tokens that are not learned, in transformers
# Attributes that the Trainer reads for some of its settings, and why they are missing here.
_NOT_THERE = {
    "config": "label_smoothing_factor is not supported: TrainablePrompt computes the plain loss; leave it out",
    "get_input_embeddings": "neftune_noise_alpha is not supported: it adds noise to embeddings that are trained; "
    "leave it out",
    "generate": "predict_with_generate is not supported; use softprompt.generate with soft_prompt()",
}


class _NotSupportedError(SettingsError, AttributeError):
    """A setting of the Trainer needs an attribute that is missing; for `hasattr` it is missing too."""


class TrainablePrompt(torch.nn.Module):
    """Virtual tokens before a frozen model; use it with `transformers.Trainer` like a model wrapped by PEFT.

    The frozen model is no submodule: checkpoints contain the prompt alone, and `train()` does not turn on the model's
    dropout. The Trainer's `gradient_checkpointing` works, `torch_compile` has no effect, and label smoothing, NEFTune
    and `predict_with_generate` are refused.

    Args:
        model: the frozen model.
        start: the initial virtual tokens: `[P, H]`, or a text whose token embeddings are used.
        num_virtual_tokens: P, where `start` is a text; None for the length of the text, at least 20.
    """

    def __init__(self, model: FrozenModel, start: Tensor | str, num_virtual_tokens: int | None = None) -> None:
        super().__init__()
        first = text_prompt(model, num_virtual_tokens, start) if isinstance(start, str) else start
        self.frozen = model
        self.prompt = torch.nn.Parameter(first.detach().float().clone())
        self.activation_checkpointing = False

    def __getattr__(self, name: str) -> Any:
        """Explain which setting of the Trainer needs a missing attribute."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _NOT_THERE:
                raise _NotSupportedError(_NOT_THERE[name]) from None
            raise

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: object = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Run layers again in the backward pass, to save memory: the Trainer's `gradient_checkpointing`.

        Raises:
            SettingsError: the backend cannot, or it is wanted for some layers only.
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
        self.activation_checkpointing = True

    def activation_checkpointing_disable(self) -> None:
        """Keep the activations for the backward pass."""
        self.activation_checkpointing = False

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: object = None, **more: Any) -> None:
        """Do the same; this is the older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **more)

    gradient_checkpointing_disable = activation_checkpointing_disable

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what is run depends on the lengths of the texts
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_kwargs: object,
    ) -> CausalLMOutput:
        """Return the loss of a padded batch, its logits where there are no labels, and both in eval mode.

        The prompt runs once. Padding, on either side, is removed, so that it never stands between prompt and text.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, 0 for padding; None where there is none.
            labels: `[B, T]`, -100 for tokens that are not learned. The first text token can be learned: the last
                position of the prompt predicts it, as in PEFT.
            num_items_in_batch: the divisor of the summed loss, for accumulation over several batches; None for the
                number of labels.

        Returns:
            `loss`, a mean in nats, and `logits` `[B, T, V]`, zero at padding: in eval mode both, for `compute_metrics`;
            in training mode the loss where there are labels, and the logits where there are none.
        """
        mask = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        texts = [ids[in_text].cpu() for ids, in_text in zip(input_ids, mask, strict=True)]
        all_positions = [torch.arange(len(text)) for text in texts]
        if labels is None:
            return CausalLMOutput(logits=self._padded_logits(self._hidden(texts, all_positions), mask))
        text_labels = [row[in_text].cpu() for row, in_text in zip(labels, mask, strict=True)]
        is_target = [row != _IGNORED for row in text_labels]
        target_ids = torch.cat([row[chosen] for row, chosen in zip(text_labels, is_target, strict=True)])
        if self.training:
            hidden, logits = self._hidden(texts, [chosen.nonzero().squeeze(1) - 1 for chosen in is_target]), None
        else:  # each text's hidden states from the prompt's last position on
            all_hidden = self._hidden(texts, [torch.arange(-1, len(text)) for text in texts])
            parts = all_hidden.split([len(text) + 1 for text in texts])
            hidden = torch.cat([part[:-1][chosen] for part, chosen in zip(parts, is_target, strict=True)])
            logits = self._padded_logits(torch.cat([part[1:] for part in parts]), mask)
        total = self.frozen.backend.lm_head.losses(hidden, target_ids).sum()
        loss = total / (len(target_ids) if num_items_in_batch is None else num_items_in_batch)
        return CausalLMOutput(loss=loss, logits=logits)

    def _hidden(self, texts: list[Tensor], output_positions: list[Tensor]) -> Tensor:
        """Return the inputs of the output head at some positions of each text after the prompt, text by text."""
        checkpointing = self.activation_checkpointing and torch.is_grad_enabled()
        return self.frozen.backend.text_pass(
            self.frozen.prefix(self.prompt),
            texts,
            output_positions=output_positions,
            activation_checkpointing=checkpointing,
        ).hidden

    def _padded_logits(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the logits `[B, T, V]`, zero at padding."""
        logits = self.frozen.backend.lm_head.logits(hidden)
        padded = logits.new_zeros(*mask.shape, logits.shape[-1])
        padded[mask.to(logits.device)] = logits
        return padded

    def soft_prompt(self) -> SoftPrompt:
        """Return the current prompt, for plain text: to save it, evaluate it, and generate with it."""
        record = Record(base_model=base_model_record(self.frozen))
        return SoftPrompt(self.prompt.detach().float().cpu().clone(), record)
