"""The one idea, checked: one prompt pass a step gives the loss and gradient that running it per example gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from references import candidate_loss, relative
from softprompt.data.batching import micro_batches
from softprompt.data.example import Example, shared_text
from softprompt.errors import ModelError
from softprompt.model import lm_head
from softprompt.model.backends.attention import MAX_LENGTH_RATIO_ON_GPU
from softprompt.model.backends.packed import PackedBackend
from softprompt.model.backends.padded import PaddedBackend
from softprompt.model.backends.reference import reference_loss
from softprompt.model.backends.verify import freeze
from softprompt.model.frozen import FrozenModel
from softprompt.model.gradient import prompt_gradient
from softprompt.model.load import load_model
from tiny_data import examples_of
from tiny_models import ARCHITECTURES, frozen, model_by, tiny_model
from tiny_tokenizers import tiny_tokenizer

AMONG = [
    Example((9, 8, 7, 40, 41), 3, ((40, 50, 60), (41, 42))),
    Example((9, 8, 7, 6, 5, 50), 5, ((40, 50, 60),)),
    Example((9, 3, 60, 61, 2), 2, ((40, 50, 60), (61,), (2, 70, 71, 72))),
]
BACKENDS = [
    ("llama", PackedBackend),
    ("llama", PaddedBackend),
    ("gpt2", PackedBackend),
    ("gpt2", PaddedBackend),
    ("bloom", PackedBackend),
    ("bloom", PaddedBackend),
    ("mistral", PackedBackend),
    ("mistral", PaddedBackend),
    ("gemma2", PackedBackend),
    ("gemma2", PaddedBackend),
]
TEXTS = ["mixed lengths", "first token is a target", "common beginning", "one example"]


def start(model: FrozenModel, length: int) -> Tensor:
    return torch.randn(length, model.embedding_width, generator=torch.Generator().manual_seed(1)) * 0.1


@pytest.mark.parametrize("at_once", [2**25, 400], ids=["one piece", "a piece a row"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("architecture", "backend"), BACKENDS)
def test_loss_with_candidate_ids_is_that_of_plain_logits(
    architecture: str,
    backend: type[PackedBackend] | type[PaddedBackend],
    parts: int,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lm_head, "MAX_LOGITS", at_once)
    model = model_by(architecture, backend)
    prompt = start(model, 4)
    cut = [AMONG] if parts == 1 else [AMONG[:1], AMONG[1:]]
    loss, gradient = prompt_gradient(model, prompt, (9,), cut)
    learned = prompt.clone().requires_grad_()
    whole = [torch.cat([learned, model.embed(e.ids)]).unsqueeze(0) for e in AMONG]
    expected = candidate_loss([model.hf_model(inputs_embeds=each).logits[0, 4:] for each in whole], AMONG)
    expected.backward()
    assert learned.grad is not None
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    assert relative(gradient, learned.grad) < 1e-3


def test_a_head_that_learns_has_the_loss_of_one_that_does_not() -> None:
    model = model_by("llama", PackedBackend)
    model.backend.loss(model.prefix(start(model, 2)), AMONG)  # the head is run as the whole model is
    hidden = torch.randn(4, model.embedding_width, generator=torch.Generator().manual_seed(3))
    targets, candidate_ids = (
        torch.tensor([40, 41, 50, 2]),
        torch.tensor([[40, 50, -1], [41, -1, -1], [40, 50, 60], [2, 70, 71]]),
    )
    found = []
    for learns in (False, True):
        model.hf_model.get_output_embeddings().requires_grad_(learns)
        own = hidden.clone().requires_grad_()
        losses = model.backend.lm_head.losses(own, targets, candidate_ids)
        losses.sum().backward()
        assert own.grad is not None
        found.append((losses.detach(), own.grad))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("budget", [10_000, 10], ids=["one micro-batch", "several micro-batches"])
@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("virtual_tokens", [1, 20])
@pytest.mark.parametrize(("architecture", "backend"), BACKENDS)
def test_loss_and_gradient_are_those_of_concatenation(
    architecture: str, backend: type[PackedBackend] | type[PaddedBackend], virtual_tokens: int, kind: str, budget: int
) -> None:
    model, examples = model_by(architecture, backend), examples_of(kind)
    prompt = start(model, virtual_tokens).requires_grad_()
    expected = reference_loss(model.hf_model, prompt, examples) / sum(e.targets for e in examples)
    (wanted,) = torch.autograd.grad(expected, prompt)

    text = shared_text(examples) if len(examples) > 1 else ()
    assert (len(text) == 6) == (kind == "common beginning")
    parts = [[examples[i] for i in part] for part in micro_batches(examples, budget, len(text))]
    loss, gradient = prompt_gradient(model, prompt, text, parts)

    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert relative(gradient, wanted) < 1e-4


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("virtual_tokens", [1, 20])
@pytest.mark.parametrize(("architecture", "backend"), [w for w in BACKENDS if w[0] in ("llama", "gpt2", "bloom")])
def test_loss_and_gradient_are_those_of_peft(
    architecture: str, backend: type[PackedBackend] | type[PaddedBackend], virtual_tokens: int, kind: str
) -> None:
    model, examples = model_by(architecture, backend), examples_of(kind)
    prompt = start(model, virtual_tokens)
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=virtual_tokens)
    peft_model = get_peft_model(tiny_model(architecture), config)
    weight = peft_model.prompt_encoder["default"].embedding.weight
    weight.data.copy_(prompt)
    longest = max(len(e.ids) for e in examples)
    ids = torch.tensor([[*e.ids, *[0] * (longest - len(e.ids))] for e in examples])
    mask = torch.tensor([[1] * len(e.ids) + [0] * (longest - len(e.ids)) for e in examples])
    labels = ids.clone()
    for row, example in enumerate(examples):
        labels[row, : example.start] = -100
        labels[row, len(example.ids) :] = -100
    expected = peft_model(input_ids=ids, attention_mask=mask, labels=labels).loss
    expected.backward()

    text = shared_text(examples) if len(examples) > 1 else ()
    parts = [[examples[i] for i in part] for part in micro_batches(examples, 20, len(text))]
    loss, gradient = prompt_gradient(model, prompt, text, parts)

    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    assert relative(gradient, weight.grad) < 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_freeze_finds_the_backend_on_the_model(architecture: str) -> None:
    assert frozen(architecture).backend.name == ARCHITECTURES[architecture][0]


@pytest.mark.parametrize("virtual_tokens", [1, 20])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_gets_the_loss_and_gradient_of_concatenation(architecture: str, virtual_tokens: int) -> None:
    """With 20 virtual tokens, the prompt alone is longer than the sliding windows."""
    model = frozen(architecture)
    for kind in ("mixed lengths", "common beginning"):
        examples = examples_of(kind)
        prompt = start(model, virtual_tokens).requires_grad_()
        expected = reference_loss(model.hf_model, prompt, examples) / sum(e.targets for e in examples)
        (wanted,) = torch.autograd.grad(expected, prompt)
        for parts in ([examples], [examples[:2], examples[2:]]):
            loss, gradient = prompt_gradient(model, prompt, shared_text(examples), parts)
            assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
            assert relative(gradient, wanted) < 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_how_many_texts_have_their_attention_computed_together_changes_nothing(architecture: str) -> None:
    model, prompt = frozen(architecture), start(frozen(architecture), 20)
    found = []
    for like in (1.0, MAX_LENGTH_RATIO_ON_GPU, 100.0):
        model.backend.max_length_ratio = like
        found.append(prompt_gradient(model, prompt, (), [examples_of("mixed lengths")]))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert relative(gradient, found[0][1]) < 1e-4


@pytest.mark.parametrize("run", ["text_pass", "fused_pass"])
def test_freeze_does_not_choose_a_backend_that_is_wrong(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(PackedBackend, run)

    def shifted(self: PackedBackend, before, texts, wanted, *rest, **more):  # type: ignore[no-untyped-def]
        return right(self, before, texts, [w.clamp(min=0) for w in wanted], *rest, **more)

    monkeypatch.setattr(PackedBackend, run, shifted)
    assert frozen("llama").backend.name == "padded"


def test_a_recurrent_model_is_refused() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=400, hidden_size=16, state_size=4, num_hidden_layers=2))
    with pytest.raises(ModelError, match="cannot share a prompt between examples exactly"):
        freeze(mamba, tiny_tokenizer())


def test_an_encoder_decoder_model_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = T5Config(vocab_size=400, d_model=16, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="its prompt sees the input"):
        load_model(tmp_path)


@pytest.mark.parametrize(("architecture", "backend"), [("llama", PackedBackend), ("bloom", PaddedBackend)])
def test_the_prompt_is_run_once_a_step_and_logits_only_where_there_are_targets(
    architecture: str, backend: type[PackedBackend] | type[PaddedBackend]
) -> None:
    model, examples = model_by(architecture, backend), examples_of("common beginning")
    tokens: list[int] = []
    rows: list[int] = []
    first_layer = next(m for n, m in model.hf_model.named_modules() if n.endswith(("layers.0.mlp", "h.0.mlp")))
    handles = [
        first_layer.register_forward_pre_hook(lambda _m, args: tokens.append(args[0].shape[0] * args[0].shape[1])),
        model.hf_model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: rows.append(out.shape[1])),
    ]
    text = shared_text(examples)
    prompt_gradient(model, start(model, 20), text, [examples[:2], examples[2:]])
    for handle in handles:
        handle.remove()
    # Of each text what the prefix does not hold, and not its last token either: nobody asks what follows it.
    lengths = [[max(len(e.ids) - len(text) - 1, 1) for e in part] for part in (examples[:2], examples[2:])]
    if backend is PackedBackend:
        assert tokens == [20 + len(text), *(sum(part) for part in lengths)]
    else:  # rows of a micro-batch are padded to its longest
        assert tokens == [20 + len(text), *(len(part) * max(part) for part in lengths)]
    assert sum(rows) == sum(e.targets for e in examples)


class Logits(TorchDispatchMode):
    """Notes how many numbers the largest tensor holds, of those made while it is on, whose rows are a vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.most = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and each.ndim and each.shape[-1] == self.vocabulary:
                self.most = max(self.most, each.numel())
        return out


@pytest.mark.parametrize("architecture", ["llama", "bloom", "gemma2", "gptj"])
def test_logits_are_never_in_memory_as_a_whole(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is computed in pieces of a few rows, each with its gradient."""
    model, examples = frozen(architecture), [Example(e.ids, 1) for e in examples_of("mixed lengths")] * 8
    prompt, vocabulary = start(model, 5), 400
    whole, expected = prompt_gradient(model, prompt, (), [examples])
    monkeypatch.setattr(lm_head, "MAX_LOGITS", 7 * vocabulary)
    with Logits(vocabulary) as logits:
        loss, gradient = prompt_gradient(model, prompt, (), [examples])
    assert 7 * vocabulary <= logits.most < sum(e.targets for e in examples) * vocabulary / 8
    assert loss == pytest.approx(whole, rel=1e-6)
    assert relative(gradient, expected) < 1e-5


def test_the_model_is_as_it_was_after_a_step() -> None:
    model = frozen("llama")
    before = {name: tensor.clone() for name, tensor in model.hf_model.state_dict().items()}
    implementation = model.hf_model.config._attn_implementation
    prompt_gradient(model, start(model, 4), (), [examples_of("mixed lengths")])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.hf_model.state_dict().items())
    assert model.hf_model.config._attn_implementation == implementation
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.hf_model.parameters())
    assert not model.hf_model.get_output_embeddings()._forward_pre_hooks


def test_half_precision_keeps_the_gradient_of_many_targets() -> None:
    """Divided by the number of targets before the backward pass, float16 would lose it."""
    model, examples = (
        model_by("gpt2", PackedBackend),
        [Example(e.ids * 4, 0) for e in examples_of("mixed lengths")] * 12,
    )
    prompt = start(model, 5)
    _, exact = prompt_gradient(model, prompt, (), [examples])
    model.hf_model.half()
    _, half = prompt_gradient(model, prompt, (), [examples])
    assert half.dtype == torch.float32
    assert relative(half, exact) < 0.02


def test_a_model_is_not_run_where_its_prefix_would_not_be_the_same_for_all_texts() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0}
    shape = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = Phi3Config(
        **shape,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        max_position_embeddings=256,
        original_max_position_embeddings=24,
        rope_parameters={**rope, "original_max_position_embeddings": 24},
    )
    model = freeze(Phi3ForCausalLM(config), tiny_tokenizer())
    assert model.context_length == 24
