"""Texts behind different prefixes in one pass: what each gives is what it gives behind its own prefix alone."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from softprompt.data.example import Example
from softprompt.model.backends.attention import MAX_LENGTH_RATIO, PackedBatch, length_buckets
from softprompt.model.backends.padded import PaddedBackend
from softprompt.model.backends.reference import reference_loss
from softprompt.model.frozen import FrozenModel
from softprompt.model.prefix import Prefix
from tiny_models import ARCHITECTURES, frozen, model_by

# Each architecture on its own backend, and a few on the padded one: with a sliding window of 6, soft-capping, ALiBi.
MODELS = [*ARCHITECTURES, *(f"{name}, padded" for name in ("llama", "gpt2", "bloom", "mistral", "gemma2"))]
VIRTUAL = [3, 20, 15]  # shorter than the windows, and longer
SHARED = 5  # tokens of text that the last prefix holds; with them it is as long as another
BEHIND = [0, 1, 2, 1, 0, 2, 1, 0, 3]  # for each text, its prefix; the last one's is empty
LENGTHS = [9, 12, 9, 1, 3, 4, 4, 14, 9]
# The second branches twice, also behind its branches' first tokens; the last is a chain.
TREES = [[-1, 0, 1, 2, 2, 2], [-1, 0, 1, 2, 3, 2, 5, 5], [-1, 0, 1, 2]]


@functools.cache
def made(name: str) -> FrozenModel:
    architecture, *cached = name.split(", ")
    return model_by(architecture, PaddedBackend) if cached else frozen(architecture)


def ids(length: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(3, 400) for _ in range(length))


def prompt(model: FrozenModel, length: int) -> Tensor:
    return torch.randn(length, model.embedding_width, generator=torch.Generator().manual_seed(length)) * 0.3


def prefixes_of(model: FrozenModel) -> list[Prefix]:
    texts: list[tuple[int, ...]] = [(), (), ids(SHARED, 99)]
    made = [model.prefix(prompt(model, n), text).leaves() for n, text in zip(VIRTUAL, texts, strict=True)]
    return [*made, Prefix()]


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).detach().norm()) <= 1e-4 * float(b.detach().norm())


def gradients(prefixes: Sequence[Prefix], hidden: Tensor) -> list[Tensor]:
    """Of a sum that weighs each number differently, on every tensor of the prefixes."""
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    tensors = [t for prefix in prefixes for t in (*prefix.keys, *prefix.values, prefix.last) if t is not None]
    return list(torch.autograd.grad((hidden * weights).sum(), tensors, materialize_grads=True))


@pytest.mark.parametrize("name", MODELS)
def test_each_text_gives_what_it_gives_behind_its_prefix_alone(name: str) -> None:
    """Hidden states, the prefixes that end with the texts, and gradients on the prefixes."""
    model = made(name)
    prefixes, texts = prefixes_of(model), [torch.tensor(ids(n, i)) for i, n in enumerate(LENGTHS)]
    # Everywhere, and at the end of every prefix that is not empty.
    wanted = [torch.arange(0 if k == 3 else -1, n) for k, n in zip(BEHIND, LENGTHS, strict=True)]
    each = [
        model.backend.text_pass(prefixes[k], [text], [want], extend=True)
        for k, text, want in zip(BEHIND, texts, wanted, strict=True)
    ]
    mixed = model.backend.text_pass([prefixes[k] for k in BEHIND], texts, wanted, extend=True)
    alone = torch.cat([done.hidden for done in each])
    assert same(mixed.hidden, alone)
    for ours, done in zip(mixed.extended, each, strict=True):
        (theirs,) = done.extended
        assert (ours.length, ours.shared_text_ids) == (theirs.length, theirs.shared_text_ids)
        for a, b in zip(ours._tensors(), theirs._tensors(), strict=True):
            assert same(a, b)
    expected = gradients(prefixes, alone)
    assert all(map(same, gradients(prefixes, mixed.hidden), expected))
    if model.backend.can_checkpoint:
        again = model.backend.text_pass([prefixes[k] for k in BEHIND], texts, wanted, activation_checkpointing=True)
        once = model.backend.text_pass([prefixes[k] for k in BEHIND], texts, wanted)
        assert all(map(torch.equal, gradients(prefixes, again.hidden), gradients(prefixes, once.hidden)))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_plain_transformers(name: str) -> None:
    """One forward pass a text of the base model, on the embeddings of prompt and text."""
    model = made(name)
    prompts = [prompt(model, length) for length in VIRTUAL]
    prefixes = [model.prefix(each) for each in prompts]
    texts = [ids(n, i) for i, n in enumerate(LENGTHS[:-1])]
    expected = []
    for k, text in zip(BEHIND, texts, strict=False):
        row = torch.cat([prompts[k], model.embed(text)]).unsqueeze(0)
        expected.append(model.hf_model(inputs_embeds=row, use_cache=False).logits[0, VIRTUAL[k] - 1 :])
    with torch.no_grad():
        done = model.backend.text_pass(
            [prefixes[k] for k in BEHIND[:-1]],
            [torch.tensor(text) for text in texts],
            [torch.arange(-1, len(text)) for text in texts],
        )
        logits = model.backend.lm_head.logits(done.hidden)
    assert same(logits, torch.cat(expected))


@pytest.mark.parametrize("name", MODELS)
def test_each_prompts_loss_and_gradient_are_those_of_concatenation(name: str) -> None:
    """Of one micro-batch for three prompts; one of them with a text that its examples begin with."""
    model, shared_text_ids = made(name), ids(SHARED, 99)
    examples = [
        Example((*(shared_text_ids if k == 2 else ()), *ids(n, i)), SHARED if k == 2 else min(n - 1, i % 4))
        for i, (k, n) in enumerate(zip(BEHIND[:-1], LENGTHS[:-1], strict=True))
    ]
    prompts = [prompt(model, length).requires_grad_() for length in VIRTUAL]
    own = [[e for e, k in zip(examples, BEHIND, strict=False) if k == which] for which in range(3)]
    expected = [reference_loss(model.hf_model, *pair) for pair in zip(prompts, own, strict=True)]
    wanted = torch.autograd.grad(sum(expected, torch.zeros(())), prompts)

    prefixes = [model.prefix(each, shared_text_ids if k == 2 else ()) for k, each in enumerate(prompts)]
    leaves = [prefix.leaves() for prefix in prefixes]
    losses = model.backend.loss([leaves[k] for k in BEHIND[:-1]], examples)
    losses.sum().backward()
    for prefix, leaf in zip(prefixes, leaves, strict=True):
        prefix.backward(leaf)
    for which, target in enumerate(expected):
        each = zip(losses.detach().split([e.targets for e in examples]), BEHIND, strict=False)
        assert sum(float(part.sum()) for part, k in each if k == which) == pytest.approx(
            float(target.detach()), rel=1e-5
        )
        found = prompts[which].grad
        assert found is not None
        assert same(found, wanted[which])


@pytest.mark.parametrize("name", MODELS)
def test_trees_grow_behind_different_prefixes(name: str) -> None:
    model = made(name)
    prefixes = prefixes_of(model)
    texts = [torch.tensor(ids(len(tree), i)) for i, tree in enumerate(TREES)]
    parents = [torch.tensor(tree) for tree in TREES]
    wanted = [torch.arange(len(tree)) for tree in TREES]
    mixed = model.backend.text_pass([prefixes[2], prefixes[0], prefixes[1]], texts, wanted, parents).hidden
    # Every branch as a chain of its own.
    expected = []
    for k, text, tree in zip((2, 0, 1), texts, TREES, strict=True):
        for token in range(len(tree)):
            path = [token]
            while tree[path[0]] >= 0:
                path.insert(0, tree[path[0]])
            chain = [text[path]]
            expected.append(model.backend.text_pass(prefixes[k], chain, [torch.tensor([len(path) - 1])]).hidden)
    assert same(mixed, torch.cat(expected))
    assert all(map(same, gradients(prefixes, mixed), gradients(prefixes, torch.cat(expected))))


@pytest.mark.parametrize("name", ["llama", "bloom", "gptj", "mistral, padded"])
def test_one_prefix_for_all_and_the_same_for_each_are_the_same_to_the_bit(name: str) -> None:
    model = made(name)
    for prefix in prefixes_of(model)[1:3]:
        for lengths in (LENGTHS, [7]):
            texts = [torch.tensor(ids(n, i)) for i, n in enumerate(lengths)]
            wanted = [torch.arange(-1, n) for n in lengths]
            once = model.backend.text_pass(prefix, texts, wanted).hidden
            each = model.backend.text_pass([prefix] * len(lengths), texts, wanted).hidden
            assert torch.equal(once, each)
            assert all(map(torch.equal, gradients([prefix], once), gradients([prefix], each)))


def learned(model: FrozenModel, length: int) -> Prefix:
    """Keys and values that no prompt made, as prefix tuning learns them; nothing predicts the first token."""
    generator = torch.Generator().manual_seed(length)
    shapes = [key[:, :, :1].shape for key in model.prefix(prompt(model, 1)).keys]

    def random_tensors() -> list[Tensor]:
        return [torch.randn(1, heads, length, size, generator=generator) for _, heads, _, size in shapes]

    return Prefix(random_tensors(), random_tensors(), None, length)


@pytest.mark.parametrize("name", ["llama", "bloom", "mistral", "falcon-alibi", "gptj"])
def test_learned_keys_and_values_stand_beside_those_of_prompts(name: str) -> None:
    model = made(name)
    prefixes = [learned(model, 4), model.prefix(prompt(model, 9)), learned(model, 13)]
    texts = [torch.tensor(ids(n, n)) for n in (6, 7, 5)]
    wanted = [torch.arange(6), torch.arange(-1, 7), torch.arange(5)]
    mixed = model.backend.text_pass(prefixes, texts, wanted).hidden
    each = [
        model.backend.text_pass(prefix, [text], [want]).hidden
        for prefix, text, want in zip(prefixes, texts, wanted, strict=True)
    ]
    assert same(mixed, torch.cat(each))
    for prefix, text, states in zip(prefixes, texts, each, strict=True):
        if prefix.last is None:
            cache = DynamicCache()
            for layer, pair in enumerate(zip(prefix.keys, prefix.values, strict=True)):
                cache.update(*pair, layer)
            mask = torch.ones(1, prefix.length + len(text), dtype=torch.long)
            expected = model.hf_model(input_ids=text[None], past_key_values=cache, attention_mask=mask).logits[0]
            assert same(model.backend.lm_head.logits(states), expected)
    with pytest.raises(ValueError, match="the prefix has no output before the first token"):
        model.backend.text_pass(prefixes, texts, [torch.tensor([-1])] * 3)


def test_members_of_an_ensemble_take_one_attention_as_one_prompt_does() -> None:
    prefixes = [Prefix(length=20), Prefix(length=20), Prefix(length=20)]
    assert len(PackedBatch(prefixes * 3, [9, 9, 9, 10, 10, 10, 12, 12, 12]).buckets) == 1
    assert len(PackedBatch([Prefix(length=20), Prefix(length=400)], [9, 9]).buckets) == 2  # most of it would be padding


def test_the_cuts_leave_little_padding_and_those_behind_one_prefix_follow_the_texts_alone() -> None:
    draw = random.Random(0)
    for _ in range(300):
        count = draw.randrange(1, 30)
        lengths = [draw.randrange(1, 40) for _ in range(count)]
        prefix_lengths = [draw.choice([0, 3, 20, 100]) for _ in range(count)]
        cuts = length_buckets(lengths, prefix_lengths)
        assert [i for begin, end in cuts for i in range(begin, end)] == list(range(count))
        for begin, end in cuts:
            texts, before = lengths[begin:end], prefix_lengths[begin:end]
            assert max(texts) <= MAX_LENGTH_RATIO * min(texts)
            assert max(texts) + max(before) <= MAX_LENGTH_RATIO * min(a + t for a, t in zip(before, texts, strict=True))
        one = length_buckets(lengths, [draw.choice([0, 7, 100])] * count)
        for begin, end in one:
            assert max(lengths[begin:end]) <= MAX_LENGTH_RATIO * min(lengths[begin:end])
            if end < count:  # one more would have been too many
                more = lengths[begin : end + 1]
                assert max(more) > MAX_LENGTH_RATIO * min(more)
