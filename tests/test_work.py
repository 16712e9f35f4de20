"""The causes of the speed, without a clock: what is run once, what is run at all, and what is never in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from counting import LargestTensor, counted
from softprompt import Rows, TuneConfig, load_data
from softprompt.data.batching import batch_indices
from softprompt.data.encoder import Encoder
from softprompt.data.example import Example
from softprompt.data.templates import make_format
from softprompt.evaluation.label_scorer import LabelScorer
from softprompt.evaluation.scorer import Scorer
from softprompt.generation import generate
from softprompt.model import lm_head
from softprompt.model.backends.verify import freeze
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.training.prepare import PreparedRun
from softprompt.training.prompt_trainer import PromptTrainer
from softprompt.training.run_log import RunLog
from tiny_models import ARCHITECTURES, as_prompt
from tiny_runs import prepared_run
from tiny_tokenizers import tiny_tokenizer

BACKENDS = {"llama": "packed", "bloom": "packed", "falcon-alibi": "padded"}
VOCABULARY = 12_000
VIRTUAL = 5
WHAT = ["the parcel never came", "a fine film", "what a waste of time, I want my money back", "hello world", "a text"]
# Their first three tokens are one beginning, and one of them has a token more.
LABELS = ["delivery and billing", "delivery and returns", "delivery and money back"]


@pytest.fixture(scope="module", params=list(BACKENDS))
def model(request: pytest.FixtureRequest) -> FrozenModel:
    """A tiny model whose vocabulary is far wider than the rest of it."""
    config = ARCHITECTURES[request.param][1]()
    config.vocab_size = VOCABULARY
    torch.manual_seed(0)
    made = freeze(AutoModelForCausalLM.from_config(config), tiny_tokenizer())
    assert made.backend.name == BACKENDS[request.param]
    return made


def rows_of(task: str) -> Rows:
    if task == "text":
        return load_data([{"text": f"please classify {WHAT[i % 5]} {i}"} for i in range(40)])
    return load_data([{"text": f"{WHAT[i % 5]} {i}", "label": LABELS[i % 3]} for i in range(40)])


def common(texts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all begin with."""
    return next(i for i, column in enumerate(zip(*texts, strict=False)) if len(set(column)) > 1)


def plan_of(model: FrozenModel, task: str, micro_batch_tokens: int) -> PreparedRun:
    settings = TuneConfig(
        num_virtual_tokens=VIRTUAL,
        template="please classify this text as good or bad or fine: {{ text }}\nlabel"
        if task == "classification"
        else None,
        batch_size=6,
        micro_batch_tokens=micro_batch_tokens,
        max_steps=4,
        eval_rows=8,
    )
    prepared = prepared_run(model, rows_of(task), settings)
    assert prepared.config.loss == ("all" if task == "text" else "target")
    return prepared


def step(model: FrozenModel, prepared: PreparedRun, folder: Path) -> list[Example]:
    """Take a run's first step, and return its examples."""
    PromptTrainer(model, prepared, RunLog(folder)).step()
    return [prepared.examples[i] for i in batch_indices(len(prepared.examples), 6, 0, prepared.config.seed)]


@pytest.mark.parametrize("task", ["classification", "text"])
@pytest.mark.parametrize("at_once", [10_000, 30], ids=["one micro-batch", "several micro-batches"])
def test_a_step_runs_the_prompt_once_and_of_the_texts_what_is_needed(
    model: FrozenModel, task: str, at_once: int, tmp_path: Path
) -> None:
    prepared = plan_of(model, task, at_once)
    with counted(model) as work:
        batch = step(model, prepared, tmp_path)
    # Of plain text, what all begin with is a target, and needs logits of its own.
    shared = 0 if task == "text" else common([prepared.examples[i].ids for i in range(len(prepared.examples))])
    assert (shared > 4) == (task == "classification")
    if model.backend.can_fuse and at_once == 10_000:  # all in one pass
        (whole,) = work.passes
        prompt, texts = VIRTUAL + shared, [whole - VIRTUAL - shared]
    else:
        prompt, *texts = work.passes
    assert prompt == VIRTUAL + shared
    assert len(texts) == 1 if at_once == 10_000 else len(texts) > 2
    # What follows a text's last token is nobody's question.
    true = sum(len(example.ids) - shared - 1 for example in batch)
    longest = max(len(example.ids) for example in batch) - shared - 1
    if not model.backend.pads:
        assert sum(texts) == true
    elif len(texts) == 1:
        assert texts == [len(batch) * longest]
    else:  # texts of like length stand together
        assert true <= sum(texts) < len(batch) * longest
    assert work.logits == sum(example.targets for example in batch)


def scorer_of(model: FrozenModel, task: str) -> Scorer:
    scorer = plan_of(model, task, 60).scorer
    assert scorer is not None
    return scorer


def test_of_the_labels_each_common_token_is_run_once_a_row(model: FrozenModel) -> None:
    scorer = scorer_of(model, "classification")
    assert isinstance(scorer, LabelScorer)
    prompt = model.embed(range(VIRTUAL))
    with counted(model) as work:
        scorer.score(model, as_prompt(prompt))
    # A token is run for the first time after what stands before it in the row; a label's last one is never run.
    needed = separate = predicted = 0
    for choice in scorer.choices:
        paths = [choice.input_ids + tail for tail in choice.tails]
        needed += len({path[:end] for path in paths for end in range(1, len(path))})
        separate += sum(len(path) - 1 for path in paths)
        predicted += len({path[:end] for path in paths for end in range(len(choice.input_ids), len(path))})
    assert needed < separate / 2
    prompt_pass, shared_pass, *texts = work.passes
    shared = common([choice.input_ids for choice in scorer.choices])
    assert (prompt_pass, shared_pass) == (VIRTUAL, shared)
    needed -= shared * len(scorer.choices)
    if model.backend.pads:  # the ends of a row's labels are padded to the longest of them
        assert needed <= sum(texts) < 1.2 * needed
    else:
        assert sum(texts) == needed
        assert len(texts) > 1
    assert work.logits == predicted


@pytest.mark.parametrize("labels", [2, 77])
def test_a_second_request_for_a_label_runs_its_text_and_the_labels_tree_and_nothing_else(
    model: FrozenModel, labels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefix, tokens of the template and memory estimate are found once, for the model and the prompt."""
    verbalizers = {f"team_{n}": f"delivery and team {n}" for n in range(labels)}
    record = Record.of(model, make_format("classification", list(verbalizers), None, verbalizers), 128)
    prompt = SoftPrompt(model.embed(range(VIRTUAL)), record)
    generate(model, [WHAT[0]], prompt)
    calls: list[int] = []
    encode = type(model.tokenizer).__call__

    def counting(self: Any, text: Any, **options: Any) -> Any:
        calls.append(1)
        return encode(self, text, **options)

    monkeypatch.setattr(type(model.tokenizer), "__call__", counting)
    with counted(model) as work:
        generate(model, [WHAT[2]], prompt)
    monkeypatch.undo()
    row = load_data([{"text": WHAT[2], "label": "team_0"}, {"text": WHAT[2], "label": "team_1"}]).pick([0])
    (choice,) = LabelScorer(Encoder(model.tokenizer, prompt.format, 128), row).choices
    if model.backend.pads:  # the text, then every label's own tokens behind it
        assert len(work.passes) <= 2
        assert len(choice.ids) <= sum(work.passes) < 4 * len(choice.ids)
    else:
        assert work.passes == [len(choice.ids)]
    assert work.logits == 1 + len(choice.tree.ids)
    assert len(calls) <= 2


def test_of_plain_texts_what_all_begin_with_is_run_once_an_evaluation(model: FrozenModel) -> None:
    scorer = scorer_of(model, "text")
    with counted(model) as work:
        scored = scorer.score(model, as_prompt(model.embed(range(VIRTUAL))))
    prompt, *texts = work.passes
    assert prompt == VIRTUAL + 1  # a text's first token is not scored, and here it is the same for all
    assert len(texts) > 1
    true = sum(scored.tokens - 1)
    assert true <= sum(texts) < 1.5 * true if model.backend.pads else sum(texts) == true
    assert work.logits == sum(scored.tokens)


@pytest.mark.parametrize("task", ["classification", "text"])
def test_several_prompts_at_once_run_the_sum_of_what_each_runs(model: FrozenModel, task: str) -> None:
    scorer = scorer_of(model, task)
    prompts = [model.embed(range(length)) for length in (VIRTUAL, VIRTUAL, 2 * VIRTUAL)]
    alone = []
    for prompt in prompts:
        with counted(model) as work:
            scorer.score(model, as_prompt(prompt))
        alone.append(work)
    with counted(model) as together:
        scorer.score_members(
            model, as_prompt(*(prompt.clone() for prompt in prompts))
        )  # prompts that are not known yet
    assert together.logits == sum(work.logits for work in alone)
    assert together.passes[:3] == [work.passes[0] for work in alone]  # each prompt once
    # What all texts begin with is run behind each prompt: of labels in a pass of its own.
    first = 2 if task == "classification" else 1
    texts, each = together.passes[3 + first - 1 :], [work.passes[first:] for work in alone]
    if model.backend.pads:  # micro-batches of another cut have other padding
        assert sum(texts) == pytest.approx(sum(map(sum, each)), rel=0.1)
    else:
        assert sum(texts) == sum(map(sum, each))
        assert max(texts) <= scorer.micro_batch_tokens
        assert len(texts) < sum(map(len, each))  # fuller: texts of all prompts are in them


@pytest.mark.parametrize("task", ["classification", "text"])
@pytest.mark.parametrize("what", ["training", "evaluation"])
def test_no_tensor_of_tokens_by_vocabulary_is_made(
    model: FrozenModel, task: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are made a piece at a time, and nothing else is as wide: not even a loss over all tokens."""
    at_once = 2 * VOCABULARY
    monkeypatch.setattr(lm_head, "MAX_LOGITS", at_once)
    prepared = plan_of(model, task, 10_000)
    assert prepared.scorer is not None
    with LargestTensor(model) as made, counted(model) as work:
        if what == "training":
            step(model, prepared, tmp_path)
        else:
            prepared.scorer.score(model, as_prompt(prepared.start))
    assert work.logits > 8  # rows of logits that one tensor could have held
    assert made.most == at_once
