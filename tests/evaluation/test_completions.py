"""Completion metrics, against sacrebleu itself and definitions written out."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from softprompt import evaluate, generate, load_data
from softprompt.config import GenerateConfig
from softprompt.data.encoder import Encoder
from softprompt.data.templates import make_format
from softprompt.errors import DataError
from softprompt.evaluation import completions
from softprompt.evaluation.completions import Completions, complete
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.base_model import base_model_record
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import SoftPrompt
from tiny_models import as_prompt, frozen

WORDS = ["the", "parcel", "never", "came", "and", "I", "want", "my", "money", "back"]
ROWS = [
    {"input": "one", "target": "the parcel came"},
    {"input": "two", "target": "I want my money back"},
    {"input": "one", "target": "my parcel never came back"},
]


def made(seed: int, count: int = 30) -> Completions:
    draw = random.Random(seed)

    def sentence() -> str:
        return " ".join(draw.choices([str.lower, str.title])[0](w) for w in draw.choices(WORDS, k=draw.randint(3, 9)))

    references = [[sentence() for _ in range(draw.randint(1, 4))] for _ in range(count)]
    outputs = [draw.choice([right[0], sentence(), ""]) for right in references]
    return Completions(outputs, references, list(range(count)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("name", "metric"), [("bleu", BLEU), ("chrf", CHRF)])
def test_bleu_and_chrf_are_sacrebleus(seed: int, name: str, metric: type[BLEU] | type[CHRF]) -> None:
    """Inputs have unlike numbers of right answers; sacrebleu takes one list a rank, with None where there is none."""
    completions = made(seed)
    ranks = list(itertools.zip_longest(*completions.references))
    assert len(ranks) > 1
    expected = metric().corpus_score(completions.outputs, ranks).score  # type: ignore[arg-type]
    found = completions.metrics()[name]
    assert found.value == pytest.approx(expected)
    assert found.low < found.value < found.high


def longest_common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """By trying every subsequence."""
    for size in range(len(a), 0, -1):
        for chosen in itertools.combinations(a, size):
            rest = iter(b)
            if all(word in rest for word in chosen):
                return size
    return 0


@pytest.mark.parametrize("seed", range(3))
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(seed: int) -> None:
    completions = made(seed)
    each = []
    for output, references in zip(completions.outputs, completions.references, strict=True):
        words = tuple(output.lower().split())
        rights = [tuple(right.lower().split()) for right in references]
        each.append(max(2 * longest_common(words, right) / (len(words) + len(right)) for right in rights))
    assert completions.metrics()["rouge_l"].value == pytest.approx(sum(each) / len(each))


def test_an_exact_match_is_any_of_the_right_answers() -> None:
    completions = Completions(["a b", "c", "A b"], [["x", "a b"], ["d"], ["a b"]], [0, 1, 2])
    assert completions.metrics()["exact_match"].value == pytest.approx(1 / 3)


def test_right_answers_give_the_best_figures_and_nothing_the_worst() -> None:
    rights = [["the parcel never came back"], ["I want my money back now"]]
    best = Completions([right[0] for right in rights], rights, [0, 1]).metrics()
    assert [round(best[name].value, 6) for name in ("exact_match", "bleu", "chrf", "rouge_l")] == [1, 100, 100, 1]
    worst = Completions(["", ""], rights, [0, 1]).metrics()
    assert [worst[name].value for name in ("exact_match", "bleu", "chrf", "rouge_l")] == [0, 0, 0, 0]


@pytest.fixture(scope="module")
def llama() -> FrozenModel:
    return frozen("llama")


def tiny_prompt(model: FrozenModel) -> SoftPrompt:
    record = Record(base_model=base_model_record(model), task="completion", template="{{ input }}\n")
    return SoftPrompt(model.embed([5, 6, 7, 8]).float(), record)


def test_each_input_is_written_once_and_judged_by_all_its_right_answers(llama: FrozenModel) -> None:
    data, prompt = load_data(ROWS), tiny_prompt(llama)
    done = evaluate(llama, data, prompt)
    longest = max(len(ids) for ids in llama.tokenizer([row["target"] for row in ROWS])["input_ids"])
    config = GenerateConfig(max_new_tokens=longest + 1)
    one, two = (text.strip() for text in generate(llama, ["one", "two"], prompt, config))
    assert [record["prediction"] for record in done.predictions] == [one, two, one]
    rights = [[ROWS[0]["target"], ROWS[2]["target"]], [ROWS[1]["target"]]]
    assert done.metrics["chrf"].value == pytest.approx(Completions([one, two], rights, []).metrics()["chrf"].value)
    assert done.without_prompt is not None
    assert list(done.without_prompt) == ["exact_match", "bleu", "chrf", "rouge_l", "loss", "perplexity"]
    base = evaluate(llama, data).metrics
    assert {name: m.value for name, m in done.without_prompt.items()} == {name: m.value for name, m in base.items()}


def test_the_loss_of_a_completion_counts_every_row(llama: FrozenModel) -> None:
    done = evaluate(llama, load_data(ROWS), tiny_prompt(llama))
    assert [record["tokens"] for record in done.predictions] == [
        len(llama.tokenizer(row["target"])["input_ids"]) + 1 for row in ROWS
    ]


def test_a_long_right_answer_leaves_other_inputs_whole(llama: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, given = tiny_prompt(llama), list[tuple[int, ...]]()

    def noted(model: object, prompts: object, inputs: list[tuple[int, ...]], *_: object) -> list[str]:
        given.extend(inputs)
        return ["" for _ in inputs]

    monkeypatch.setattr(completions, "continue_ids", noted)
    rows = load_data([{"input": "the parcel never came " * 4, "target": "the parcel " * 20}])
    encoder = Encoder(llama.tokenizer, prompt.format, 80)
    complete(llama, prompt, encoder, rows)
    assert [given[0]] == Encoder(llama.tokenizer, prompt.format, 80).inputs(rows)
    assert len(given[0]) + len(llama.tokenizer(rows[0]["target"])["input_ids"]) > 80
    with pytest.raises(DataError, match="positions leave none before it"):  # it has 256
        complete(llama, as_prompt(None), encoder, load_data([{"input": "the parcel", "target": "came " * 300}]))


def test_inputs_that_are_cut_to_the_same_tokens_are_not_one(llama: FrozenModel) -> None:
    prompt = tiny_prompt(llama)
    rows = load_data(
        [{"input": f"{word} " * 60 + end, "target": end} for word in ("parcel",) for end in ("one", "two")]
    )
    found = complete(llama, as_prompt(None), Encoder(llama.tokenizer, prompt.format, 12), rows)
    assert found.references == [["one"], ["two"]]
    assert found.place == [0, 1]


@pytest.mark.parametrize(
    ("template", "right", "written", "kept", "exact"),
    [
        ("{{ input }}\n", "    x = a\n    return x\n", "    x = a\n    return x\n", "    x = a\n    return x\n", 1),
        ("{{ input }}\n", "    x = a\n    return x\n", "x = a\n    return x\n", "x = a\n    return x\n", 0),
        ("{{ input }}\n", "    x = a", "    x = a\n", "    x = a", 1),
        ("{{ input }}", "\n    return a", "\n    return a", "\n    return a", 1),
        ("{{ input }}\n", "London", " London\n", "London", 1),
        ("{{ input }}:", "London", " London", "London", 1),
        ("{{ input }}:", "  London", " London", "London", 1),
    ],
)
def test_an_indentation_is_compared_as_it_is_learned(
    llama: FrozenModel, monkeypatch: pytest.MonkeyPatch, template: str, right: str, written: str, kept: str, exact: int
) -> None:
    monkeypatch.setattr(completions, "continue_ids", lambda model, prompts, inputs, *_: [written] * len(inputs))
    rows = load_data([{"input": "def f(a):", "target": right}])
    encoder = Encoder(llama.tokenizer, make_format("completion", [], template), 80)
    found = complete(llama, as_prompt(None), encoder, rows)
    assert found.outputs == [kept]
    assert found.metrics()["exact_match"].value == exact
    (example,) = encoder.examples(rows)
    learned = llama.tokenizer.decode(example.ids[example.start : -1])
    assert learned in (found.references[0][0], f" {found.references[0][0]}")


def test_demonstrations_end_before_a_blank_line_and_what_they_show_is_compared(llama: FrozenModel) -> None:
    form = make_format("completion", [])
    shown = replace(form, demonstrations=({"input": "def g(a):", "target": "    return a\n"},))
    assert shown.demonstrated == "def g(a):\n    return a\n\n"
    row = {"input": "def f(a):", "target": "    x = a\n    return x\n"}
    assert shown.target(row) == "    x = a\n    return x"
    (example,) = Encoder(llama.tokenizer, shown, 80).examples(load_data([row]))
    assert llama.tokenizer.decode(example.ids) == shown.input(row) + "    x = a\n    return x\n\n"
