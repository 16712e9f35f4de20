"""A prompt as a PyTorch module, for those who have a `transformers.Trainer` script."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from softprompt.model.frozen import FrozenModel
from softprompt.prompt.initialization import text_prompt
from softprompt.prompt.soft_prompt import Record, SoftPrompt, base_model_record

_IGNORED = -100  # transformers' label of what is not learned


class TrainablePrompt(torch.nn.Module):
    """Virtual tokens in front of a frozen model; `transformers.Trainer` takes it where it takes PEFT's wrapped model.

    The frozen model is no submodule: checkpoints hold the prompt alone, and `train()` switches no dropout on in it.

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

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_kwargs: object,
    ) -> CausalLMOutput:
        """Return the loss of a padded batch, or its logits where there are no labels.

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
            `loss`, a mean in nats, and no logits; or `logits` `[B, T, V]`, zero at padding.
        """
        real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        texts = [ids[there].cpu() for ids, there in zip(input_ids, real, strict=True)]
        prefix, way = self.frozen.prefix(self.prompt), self.frozen.way
        if labels is None:
            whole = [torch.arange(len(text)) for text in texts]
            logits = way.head.logits(way.text_pass(prefix, texts, whole).hidden)
            filled = logits.new_zeros(*input_ids.shape, logits.shape[-1])
            filled[real.to(logits.device)] = logits
            return CausalLMOutput(logits=filled)
        targets = [row[there].cpu() for row, there in zip(labels, real, strict=True)]
        learned = [(row != _IGNORED).nonzero().squeeze(1) for row in targets]
        wanted = torch.cat([row[places] for row, places in zip(targets, learned, strict=True)])
        hidden = way.text_pass(prefix, texts, [places - 1 for places in learned]).hidden
        total = way.head.losses(hidden, wanted).sum()
        return CausalLMOutput(loss=total / (len(wanted) if num_items_in_batch is None else num_items_in_batch))

    def soft_prompt(self) -> SoftPrompt:
        """Return the prompt as it stands, to be saved, evaluated and generated with: for plain text."""
        record = Record(base_model=base_model_record(self.frozen))
        return SoftPrompt(self.prompt.detach().float().cpu().clone(), record)
