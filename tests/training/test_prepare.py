"""What is decided before the first step: where a prompt starts, and what is said about the rows and the memory."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model

from softprompt import SoftPrompt, TuneConfig, load_data, tune
from softprompt.data.encoder import Encoder
from softprompt.data.lazy_examples import LazyExamples
from softprompt.data.rows import Rows
from softprompt.data.templates import make_format
from softprompt.errors import DataError, InputError, PromptError, SettingsError
from softprompt.model.backends.verify import freeze
from softprompt.model.frozen import FrozenModel
from softprompt.prompt import initialization as starting
from softprompt.prompt import registry
from softprompt.prompt.base_model import base_model_record
from softprompt.prompt.nearest_tokens import nearest_tokens
from softprompt.prompt.record import Record
from tiny_models import as_prompt, frozen, tiny_model, with_memory
from tiny_runs import prepared_run
from tiny_tokenizers import tiny_tokenizer

SHORT = {"max_steps": 4, "batch_size": 4, "num_virtual_tokens": 3}


def short(**settings: object) -> TuneConfig:
    return TuneConfig(**{**SHORT, **settings})  # type: ignore[arg-type]


@pytest.fixture
def source(llama: FrozenModel, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SoftPrompt:
    """A prompt for the reviews with a template and verbalizers of its own, in `source` and registered as `film`."""
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = short(
        template="Review: {{ text }}\nIs it good?", verbalizers={"positive": "yes", "negative": "no"}, eval_rows=0
    )
    made = tune(llama, load_data(reviews), config).prompt
    made.save("source")
    registry.register(made, "film")
    return made


@pytest.mark.parametrize("name", ["source", "film", "film@1"])
def test_a_prompt_goes_on_from_another_and_reads_rows_as_it_did(
    name: str, source: SoftPrompt, llama: FrozenModel, reviews: Path
) -> None:
    prepared = prepared_run(llama, load_data(reviews), TuneConfig(init=f"prompt:{name}"))
    assert torch.equal(prepared.start, source.weights)
    assert prepared.config.num_virtual_tokens == 3
    assert prepared.encoder.format.template == "Review: {{ text }}\nIs it good?"
    assert prepared.encoder.format.verbalizers == {"negative": "no", "positive": "yes"}
    assert prepared.reasons["template"] == f"prompt:{name}"


def test_going_on_continues_where_the_other_stood(
    source: SoftPrompt, llama: FrozenModel, reviews: Path, tmp_path: Path
) -> None:
    rows = load_data(reviews)
    # The first evaluation of the new run, before any step, is the old prompt's.
    tune(llama, rows, TuneConfig(init="prompt:film", max_steps=1, batch_size=4), out=tmp_path / "run")
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["validation"]
    from_film = prepared_run(llama, rows, TuneConfig(init="prompt:film"))
    assert from_film.scorer is not None
    assert first["loss"] == pytest.approx(from_film.scorer.score(llama, as_prompt(source.weights)).loss())


def test_what_is_given_wins_over_the_other_prompts(source: SoftPrompt, llama: FrozenModel, reviews: Path) -> None:
    config = TuneConfig(init="prompt:film", template="{{ text }} ->", num_virtual_tokens=5)
    prepared = prepared_run(llama, load_data(reviews), config)
    assert prepared.encoder.format.template == "{{ text }} ->"
    assert torch.equal(prepared.start, torch.cat([source.weights, source.weights[:2]]))


def test_labels_of_the_other_prompt_that_these_rows_lack_stay(
    source: SoftPrompt, llama: FrozenModel, reviews: Path
) -> None:
    del source
    wider = [{"text": "x", "label": "neutral"}, *load_data(reviews)]
    tune(llama, load_data(wider), short(eval_rows=0)).prompt.save("wider")
    prepared = prepared_run(llama, load_data(reviews), TuneConfig(init="prompt:wider"))
    assert list(prepared.encoder.format.verbalizers) == ["negative", "neutral", "positive"]


def test_rows_of_another_kind_take_the_virtual_tokens_alone(source: SoftPrompt, llama: FrozenModel) -> None:
    """As SPoT does (Vu et al. 2022): a source task may have other labels."""
    other = load_data([{"text": f"a text {i}", "label": "abc"[i % 3]} for i in range(60)])
    prepared = prepared_run(llama, other, TuneConfig(init="prompt:film"))
    assert torch.equal(prepared.start, source.weights)
    assert list(prepared.encoder.format.verbalizers) == ["a", "b", "c"]
    assert prepared.encoder.format.template == "{{ text }}\nLabel:"


def test_a_prompt_of_pefts_is_gone_on_with(llama: FrozenModel, reviews: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4))
    theirs.save_pretrained(tmp_path / "peft")
    with pytest.warns(UserWarning, match="cannot be checked"):
        prepared = prepared_run(llama, load_data(reviews), TuneConfig(init=f"prompt:{tmp_path / 'peft'}"))
    assert torch.equal(prepared.start, theirs.prompt_encoder["default"].embedding.weight.detach())
    assert prepared.encoder.format.template == "{{ text }}\nLabel:"


def test_a_prompt_of_another_model_cannot_be_gone_on_with(source: SoftPrompt, reviews: Path) -> None:
    del source
    with pytest.raises(PromptError, match="is another model"):
        prepared_run(frozen("qwen2"), load_data(reviews), TuneConfig(init="prompt:film"))


@pytest.mark.parametrize("init", ["random", "labels", "vocabulary", "prompt:film"])
def test_a_text_to_start_from_is_not_ignored(init: str, source: SoftPrompt, llama: FrozenModel, reviews: Path) -> None:
    del source
    with pytest.raises(SettingsError, match="init_text is read with init=text only"):
        prepared_run(llama, load_data(reviews), TuneConfig(init=init, init_text="Is this film good?"))


def test_validation_rows_that_were_trained_on_are_reported(llama: FrozenModel, reviews: Path) -> None:
    rows = load_data(reviews)
    other = load_data([{"text": f"no such text {i}", "label": "positive"} for i in range(7)])
    both = Rows((*rows.rows[:5], *other.rows), rows.task, "both")
    with pytest.warns(UserWarning, match="5 of 12 validation rows have the same input as a training row"):
        prepared_run(llama, rows, short(), both)
    # Rows that softprompt holds out itself share no input with those it trains on: a warning would fail this test.
    twice = Rows((*rows.rows, *rows.rows), rows.task, "twice")
    prepared_run(llama, twice, short())


def test_a_row_that_will_not_fit_in_memory_is_said_before_the_first_step(llama: FrozenModel, reviews: Path) -> None:
    with pytest.warns(UserWarning, match=r"the longest row alone needs about .* GB are free: lower max_length"):
        prepared_run(with_memory(llama, lambda: 1000), load_data(reviews), short())


@pytest.mark.filterwarnings("ignore:the longest row alone needs about")
@pytest.mark.parametrize(("free", "expected"), [(10**12, range(1024, 1025)), (0, range(1, 2)), (10**6, range(9, 100))])
def test_what_is_run_at_once_follows_from_the_free_memory(
    free: int, expected: range, llama: FrozenModel, reviews: Path
) -> None:
    prepared = prepared_run(with_memory(llama, lambda: free), load_data(reviews), short())
    assert prepared.config.micro_batch_tokens in expected
    assert prepared.reasons["micro_batch_tokens"].startswith("free memory")


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_shows_what_the_metrics_file_holds(llama: FrozenModel, reviews: Path, tmp_path: Path) -> None:
    tune(llama, load_data(reviews), short(tensorboard=True, eval_every=2), out=tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shown = events(tmp_path / "run" / "tensorboard")
    losses = [(r["step"], r["loss"]) for r in records if "loss" in r]
    accuracies = [(r["step"], r["validation"]["accuracy"]) for r in records if "validation" in r]
    assert shown["training/loss"] == [(step, pytest.approx(value)) for step, value in losses]
    assert shown["validation/accuracy"] == [(step, pytest.approx(value)) for step, value in accuracies]


def test_a_resumed_run_shows_every_step_once(llama: FrozenModel, reviews: Path, tmp_path: Path) -> None:
    rows, run = load_data(reviews), tmp_path / "run"
    tune(llama, rows, short(tensorboard=True, save_every=2, eval_rows=0), out=run)
    for file in (run / "state" / "step-4").iterdir():
        file.unlink()
    tune(llama, rows, None, out=run, resume=True)
    assert [step for step, _ in events(run / "tensorboard")["training/loss"]] == [1, 2, 3, 4]


def test_tensorboard_that_is_not_installed_is_named(
    llama: FrozenModel, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(InputError, match=r"pip install 'softprompt\[tensorboard\]'"):
        tune(llama, load_data(reviews), short(tensorboard=True))


@pytest.mark.parametrize("architecture", ["llama", "gemma", "gpt2", "bloom"])
def test_a_virtual_token_that_is_a_word_is_read_as_that_word(architecture: str) -> None:
    model = frozen(architecture)
    ids = model.tokenizer("a fine film")["input_ids"]
    prompt = SoftPrompt(model.embed(ids).float() * 2.5, Record(base_model=base_model_record(model)))
    near = nearest_tokens(model, prompt, 3)
    assert [row[0][0] for row in near] == [model.tokenizer.decode([i]) for i in ids]
    assert [row[0][1] for row in near] == [pytest.approx(1, abs=1e-4)] * len(ids)
    for row in near:
        assert [cosine for _, cosine in row] == sorted((cosine for _, cosine in row), reverse=True)


def test_the_nearest_tokens_are_those_of_the_whole_table(llama: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    table = llama.hf_model.get_input_embeddings().weight.detach()[: len(llama.tokenizer)]
    prompt = SoftPrompt(torch.randn(4, 32), Record(base_model=base_model_record(llama)))
    similarity = torch.cosine_similarity(prompt.weights[:, None], table[None], dim=2)
    expected = [[llama.tokenizer.decode([i]) for i in row] for row in similarity.topk(5).indices.tolist()]
    for at_once in (8192, 64, 7):
        monkeypatch.setattr("softprompt.prompt.nearest_tokens.CHUNK", at_once)
        assert [[token for token, _ in row] for row in nearest_tokens(llama, prompt)] == expected


def test_prefix_starts_from_a_text_that_lists_all_labels_while_they_fit(llama: FrozenModel) -> None:
    """From the labels' mean embeddings a prompt learned 77 labels at half the pace: benchmarks/results/choices.md."""
    names = [f"team_{n}" for n in range(12)]
    rows = load_data([{"text": f"a parcel {n}", "label": names[n % 12]} for n in range(120)])
    config = TuneConfig(max_length=64, method="prefix-tuning")
    prepared = prepared_run(llama, rows, config)
    assert prepared.config.init == "text"
    assert prepared.config.init_text is not None
    assert all(name.replace("_", " ") in prepared.config.init_text for name in names)
    ids = llama.tokenizer(prepared.config.init_text)["input_ids"]
    assert torch.equal(prepared.start, llama.prefix(llama.embed(ids)).stacked())
    many = [f"a team of the name of {n}" for n in range(60)]
    rows = load_data([{"text": f"a parcel {n}", "label": many[n % 60]} for n in range(600)])
    prepared = prepared_run(llama, rows, config)
    assert prepared.config.init == "labels"
    assert prepared.config.num_virtual_tokens == prepared.start.shape[-2] == 60


@pytest.mark.parametrize(("words", "rows"), [(2, 9), (20, 5), (40, 5), (110, 0)])
def test_a_soft_prompt_of_many_labels_starts_from_rows_of_some(words: int, rows: int) -> None:
    model = freeze(tiny_model("llama", max_position_embeddings=2048), tiny_tokenizer(), "tiny")
    records = [{"text": f"parcel {n}" + " never" * words, "label": f"team {n % 40}"} for n in range(200)]
    prepared = prepared_run(model, load_data(records), TuneConfig(max_length=200))
    text = model.tokenizer.decode(
        [int((model.embed(range(400)) - token).norm(dim=1).argmin()) for token in prepared.start]
    )
    shown = [part.partition("Label: ")[2] for part in text.split("\n\n") if "Label: " in part]
    assert prepared.config.init == ("examples" if rows else "text")
    assert text.startswith("Classify the text:\n" if rows else "Classify the text as")
    assert len(set(shown)) == len(shown) == rows
    prefix_run = prepared_run(model, load_data(records), TuneConfig(max_length=200, method="prefix-tuning"))
    assert prefix_run.config.init == "text"


@pytest.mark.parametrize(("labels", "loss"), [(3, "target"), (10, "target"), (11, "labels"), (40, "labels")])
def test_loss_labels_is_the_default_of_many_labels(llama: FrozenModel, labels: int, loss: str) -> None:
    rows = load_data([{"text": f"a parcel {n}", "label": f"team {n % labels}"} for n in range(max(60, 4 * labels))])
    prepared = prepared_run(llama, rows, TuneConfig(max_length=64))
    assert prepared.config.loss == loss
    assert all(bool(prepared.examples[i].candidate_ids) == (loss == "labels") for i in prepared.indices_seen)
    plain = prepared_run(llama, rows, TuneConfig(max_length=64, loss="target"))
    assert not any(plain.examples[i].candidate_ids for i in plain.indices_seen)
    assert prepared_run(llama, rows, TuneConfig(max_length=64, loss="labels")).examples[0].candidate_ids
    assert prepared_run(llama, rows, TuneConfig(max_length=64, method="prefix-tuning")).config.loss == "target"


def test_loss_labels_is_refused_for_a_task_without_labels(llama: FrozenModel) -> None:
    rows = load_data([{"input": f"{i} and {i}", "target": str(2 * i)} for i in range(30)])
    with pytest.raises(SettingsError, match="loss=labels is for classification, and completion has none"):
        prepared_run(llama, rows, TuneConfig(max_length=64, loss="labels"))


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_a_prompt_for_completions_starts_from_examples_if_one_is_short_enough(llama: FrozenModel, method: str) -> None:
    rows = load_data([{"input": f"{i} and {i}", "target": str(2 * i)} for i in range(30)])
    prepared = prepared_run(llama, rows, TuneConfig(method=method, max_length=64))  # type: ignore[arg-type]
    same = prepared_run(llama, rows, TuneConfig(method=method, max_length=64, init="examples"))  # type: ignore[arg-type]
    assert prepared.config.init == "examples"
    assert torch.equal(prepared.start, same.start)
    long = load_data([{"input": f"{i} and {i} " * 60, "target": str(2 * i)} for i in range(30)])
    assert prepared_run(llama, long, TuneConfig(method=method, max_length=64)).config.init == "text"  # type: ignore[arg-type]
    said = TuneConfig(method=method, max_length=64, init_text="Add:")  # type: ignore[arg-type]
    assert prepared_run(llama, rows, said).config.init == "text"


def test_a_soft_prompt_starts_from_examples_if_one_of_every_label_is_short_enough(
    llama: FrozenModel, reviews: Path
) -> None:
    def init(text: str = "", **settings: object) -> str:
        rows = (
            load_data(reviews)
            if not text
            else load_data([{"text": f"{text}{i}", "label": str(i % 2)} for i in range(30)])
        )
        return prepared_run(llama, rows, TuneConfig(max_length=64, **settings)).config.init  # type: ignore[arg-type]

    assert init() == "examples"
    assert init(method="prefix-tuning") == "text"
    assert init(num_virtual_tokens=20) == "text"
    assert init(num_virtual_tokens=80) == "examples"
    assert init(text="a film " * 40) == "text"
    assert init(init_text="Good or bad?") == "text"


def test_where_rows_are_long_one_of_every_label_is_shown(llama: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = load_data([{"text": f"a film {i}", "label": str(i % 3)} for i in range(30)])

    def start(usual: int, longest: int = 512) -> tuple[str, int]:
        monkeypatch.setattr("softprompt.prompt.initialization.MAX_EXAMPLES_TOKENS", usual)
        monkeypatch.setattr("softprompt.prompt.initialization.MAX_TEXT_TOKENS", longest)
        prepared = prepared_run(llama, rows, TuneConfig(max_length=64))
        ids = [int((llama.embed(range(400)) - token).norm(dim=1).argmin()) for token in prepared.start]
        assert len(ids) == prepared.start.shape[0] == prepared.config.num_virtual_tokens
        return prepared.config.init, llama.tokenizer.decode(ids).count("Label:")

    init, as_many_as_fit = start(usual=120)
    assert init == "examples"
    assert as_many_as_fit > 3
    assert start(usual=40) == ("examples", 3)
    assert start(usual=40, longest=45) == ("text", 0)


def test_a_prompt_starts_from_examples_of_every_label_in_turn(llama: FrozenModel, reviews: Path) -> None:
    rows = load_data(reviews)
    prepared = prepared_run(llama, rows, TuneConfig(init="examples", seed=3, max_length=64))
    text = llama.tokenizer.decode(
        [int((llama.embed(range(400)) - token).norm(dim=1).argmin()) for token in prepared.start]
    )
    assert text.startswith("Classify the text as")
    shown = [line.removeprefix("Label: ") for line in text.splitlines() if line.startswith("Label: ")]
    assert set(shown[:2]) == {"positive", "negative"}
    assert len(prepared.start) <= 128  # half of the model's positions
    assert all(f"{row['text']}\nLabel: {row['label']}" in text or row["text"] not in text for row in rows)
    validation_texts = [row["text"] for row in prepared.validation or ()]
    assert not any(normalized_input in text.splitlines() for normalized_input in validation_texts)
    again = prepared_run(llama, rows, TuneConfig(init="examples", seed=3, max_length=64))
    other = prepared_run(llama, rows, TuneConfig(init="examples", seed=4, max_length=64))
    assert torch.equal(prepared.start, again.start)
    assert prepared.start.shape != other.start.shape or not torch.equal(prepared.start, other.start)
    assert len(prepared_run(llama, rows, TuneConfig(init="examples", num_virtual_tokens=30)).start) == 30


def test_of_a_large_file_that_is_sorted_by_label_every_label_is_shown(
    llama: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "MAX_CANDIDATE_ROWS", 8)
    rows = load_data([{"text": "film", "label": label} for label in ("good", "bad", "dull") for _ in range(20)])
    prepared = prepared_run(llama, rows, TuneConfig(init="examples", eval_rows=0, max_steps=20, max_length=64))
    text = llama.tokenizer.decode(
        [int((llama.embed(range(400)) - token).norm(dim=1).argmin()) for token in prepared.start]
    )
    assert {label for label in ("good", "bad", "dull") if f"Label: {label}" in text} == {"good", "bad", "dull"}


@pytest.mark.parametrize(
    ("method", "tokens", "rate"),
    [
        ("prompt-tuning", 5, 0.03),
        ("prompt-tuning", 20, 0.03),
        ("prompt-tuning", 180, 0.01),
        ("prefix-tuning", 180, 0.03),
    ],
)
def test_a_long_soft_prompt_learns_at_a_lower_rate(
    llama: FrozenModel, reviews: Path, method: str, tokens: int, rate: float
) -> None:
    prepared = prepared_run(llama, load_data(reviews), TuneConfig(method=method, num_virtual_tokens=tokens))
    assert prepared.config.learning_rate == rate
    given = prepared_run(
        llama, load_data(reviews), TuneConfig(method=method, num_virtual_tokens=tokens, learning_rate=1)
    )
    assert given.config.learning_rate == 1


def test_without_tensorboard_nothing_is_begun(
    llama: FrozenModel, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(InputError, match="tensorboard=true needs the package tensorboard"):
        tune(llama, load_data(reviews), short(tensorboard=True), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_text_of_one_token_that_nothing_comes_before_is_named() -> None:
    tokenizer = deepcopy(tiny_tokenizer())  # it is shared by all tests
    tokenizer.bos_token = None
    rows = load_data([{"text": text} for text in ("a", *("a fine film",) * 9)])
    examples = LazyExamples(Encoder(tokenizer, make_format("text", []), 20), rows, learn_all=True, first=1)
    assert examples[1].targets > 0
    assert not examples.encoder.bos_ids
    with pytest.raises(DataError, match="row 1: one token alone"):
        examples[0]
