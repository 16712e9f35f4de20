"""LoRA and full fine-tuning, in the loop that prompts learn in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.nn.functional import cross_entropy

from counting import LargestTensor
from references import candidate_loss
from softprompt.comparison.methods.weights import RANK, WeightsTrainer, lora, unfreeze_copy
from softprompt.data.batching import batch_indices
from softprompt.data.example import Example
from softprompt.data.rows import load_data
from softprompt.errors import RunError
from softprompt.model import lm_head
from softprompt.model.backends.base import Backend
from softprompt.model.frozen import FrozenModel
from softprompt.model.prefix import Prefix
from tiny_models import frozen, tiny_model
from tiny_runs import prepared_run, short, weights_hash


@contextmanager
def learning(model: FrozenModel, method: str, seed: int = 0) -> Iterator[FrozenModel]:
    """The model whose weights learn: with LoRA's beside its own, or a copy."""
    if method == "full":
        yield unfreeze_copy(model)
        return
    with lora(model, seed):
        yield model


def loop_of(model: FrozenModel, reviews: Path, **settings: object) -> WeightsTrainer:
    prepared = prepared_run(model, load_data(reviews), short(batch_size=6, micro_batch_tokens=40, **settings))
    return WeightsTrainer(model, prepared)


@pytest.mark.parametrize("loss_of", ["target", "labels"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "falcon-rotary"])
def test_gradients_are_those_of_peft_and_transformers(
    architecture: str, method: str, loss_of: str, reviews: Path
) -> None:
    """Row by row, on a second model of the same weights, with all logits."""
    reference = tiny_model(architecture)
    if method == "lora":
        torch.manual_seed(3)
        config = LoraConfig(r=RANK, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
        reference = get_peft_model(reference, config)
        plain = {name.removeprefix("base_model.model."): p for name, p in reference.named_parameters()}
    else:
        reference.requires_grad_(True)
        plain = dict(reference.named_parameters())
    with learning(frozen(architecture), method, 3) as model:
        trainer = loop_of(model, reviews, loss=loss_of)
        for name, parameter in trainer.parameters.items():  # away from zero, where LoRA's second factors start
            parameter.data.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
            plain[name].data.copy_(parameter.data)
        batch = [trainer.prepared.examples[i] for i in batch_indices(len(trainer.prepared.examples), 6, 0, 0)]
        loss = trainer.gradient(batch)
        total = torch.zeros(())
        for example in batch:
            ids = torch.tensor([example.ids])
            logits = reference(input_ids=ids).logits[0]
            if loss_of == "labels":
                total = total + candidate_loss([logits], [example]) * example.targets
                continue
            total = total + cross_entropy(logits[example.start - 1 : -1], ids[0, example.start :], reduction="sum")
        expected = total / sum(example.targets for example in batch)
        expected.backward()
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
        learned = {name for name, p in plain.items() if p.requires_grad}
        assert learned == set(trainer.parameters)
        for name, parameter in trainer.parameters.items():
            wanted = plain[name].grad
            if wanted is None:
                assert parameter.grad is None
                continue
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_learns_and_the_model_is_as_it_was(llama: FrozenModel, method: str, reviews: Path) -> None:
    before, names = weights_hash(llama), set(llama.hf_model.state_dict())
    with learning(llama, method) as model:
        trainer = loop_of(model, reviews, max_steps=20, learning_rate=0.003)
        first = trainer.evaluate(trainer.weights())
        found = trainer.run()
        assert found.scores is not None
        assert found.scores.loss() < first.loss() - 0.3
        assert found.state.best == found.scores.values()
        assert trainer.evaluate(found.weights).loss() == pytest.approx(found.scores.loss())
    assert weights_hash(llama) == before
    assert set(llama.hf_model.state_dict()) == names
    assert not any(p.requires_grad for p in llama.hf_model.parameters())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_where_memory_runs_out_less_is_run_at_once(
    llama: FrozenModel, method: str, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients are the same, those of the parts that ran before it did not count twice."""
    ran: list[int] = []
    right = Backend.loss

    def little_memory(
        backend: Backend, prefix: Prefix, examples: list[Example], activation_checkpointing: bool
    ) -> torch.Tensor:
        ran.append(len(examples))
        if len(ran) == 2:  # the first part had run
            raise MemoryError
        return right(backend, prefix, examples, activation_checkpointing)

    with learning(llama, method) as model:
        trainer = loop_of(model, reviews, max_steps=1)
        batch = [trainer.prepared.examples[i] for i in range(6)]
        loss = trainer.gradient(batch)
        expected = {name: p.grad.clone() for name, p in trainer.parameters.items() if p.grad is not None}
        monkeypatch.setattr(Backend, "loss", little_memory)
        assert trainer.gradient(batch) == pytest.approx(loss, rel=1e-5)
        assert trainer.state.micro_batch_tokens == 20
        for name, gradient in expected.items():
            torch.testing.assert_close(trainer.parameters[name].grad, gradient, rtol=1e-3, atol=1e-6)
        monkeypatch.setattr(Backend, "loss", broken)
        with pytest.raises(RunError, match="out of memory at one row"):
            trainer.gradient(batch)


def broken(*_: object) -> torch.Tensor:
    raise MemoryError


def test_all_methods_take_the_same_rows_in_the_same_order(
    llama: FrozenModel, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from softprompt.training import trainer as training
    from softprompt.training.prompt_trainer import PromptTrainer

    seen: dict[str, list[list[int]]] = {}
    rows = load_data(reviews)
    for method in ("prompt-tuning", "prefix-tuning", "lora", "full"):
        batches = seen.setdefault(method, [])

        def recorded(*args: int, into: list[list[int]] = batches) -> list[int]:
            into.append(batch_indices(*args))
            return into[-1]

        monkeypatch.setattr(training, "batch_indices", recorded)
        if method in ("lora", "full"):
            with learning(llama, method) as model:
                WeightsTrainer(model, prepared_run(model, rows, short())).run()
        else:
            PromptTrainer(llama, prepared_run(llama, rows, short(method=method))).run()
    assert len(seen["lora"]) == 6
    assert all(batches == seen["lora"] for batches in seen.values())


def test_a_head_that_learns_makes_its_logits_a_piece_at_a_time(
    llama: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = unfreeze_copy(llama)
    generator = torch.Generator().manual_seed(0)
    hidden, targets = torch.randn(100, 32, generator=generator), torch.randint(400, (100,), generator=generator)
    candidate_ids = torch.stack([targets, (targets + 1) % 400, torch.full_like(targets, -1)], dim=1)

    copy.backend.loss(Prefix(), [Example((5, 6, 7), 1)])  # logits are made as the model makes them, which is seen then

    def found(others: torch.Tensor | None) -> list[torch.Tensor]:
        given = hidden.clone().requires_grad_()
        losses = copy.backend.lm_head.losses(given, targets, others)
        weight = copy.hf_model.get_output_embeddings().weight
        return [losses, *torch.autograd.grad(losses.sum(), [given, weight])]

    for others in (None, candidate_ids):
        whole = found(others)
        with monkeypatch.context() as patch, LargestTensor(copy) as made:
            patch.setattr(lm_head, "MAX_LOGITS", 2 * copy.vocabulary_size)
            pieces = found(others)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(pieces, whole, strict=True))
        assert made.most == copy.hf_model.get_output_embeddings().weight.numel()  # its gradient is the widest


def test_a_weight_that_text_does_not_come_by_has_no_moments(reviews: Path) -> None:
    model = unfreeze_copy(frozen("llama"))
    model.hf_model.register_parameter("for_images", torch.nn.Parameter(torch.zeros(3)))
    trainer = loop_of(model, reviews)
    trainer.run()
    assert "learned.for_images" in trainer._checkpoint().tensors
    assert "exp_avg.for_images" not in trainer._checkpoint().tensors
