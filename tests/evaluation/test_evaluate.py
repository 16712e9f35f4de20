"""Evaluation: the same figures as the plainest computation gives, row by row and label by label."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import confusion_matrix, f1_score

from references import token_losses
from softprompt.data.encoder import Encoder
from softprompt.data.rows import load_data
from softprompt.data.templates import make_format
from softprompt.errors import DataError, PromptError, SettingsError
from softprompt.evaluation.calibration import make_scorer
from softprompt.evaluation.evaluate import evaluate
from softprompt.evaluation.intervals import bootstrap, proportion
from softprompt.evaluation.label_scorer import LabelScorer
from softprompt.evaluation.scores import LabelScores
from softprompt.evaluation.token_scorer import TokenScorer
from softprompt.model.frozen import FrozenModel
from tiny_data import ONE_TOKEN, SEVERAL_TOKENS, TEXTS, labelled
from tiny_models import ARCHITECTURES, as_prompt, frozen, soft_prompt, tiny_prompt

BACKENDS = {"llama": "packed", "gptj": "padded", "gpt2": "packed"}
ONE_BEGINS_ANOTHER = ["good", "good film", "bad"]


@pytest.fixture(scope="module", params=list(BACKENDS))
def model(request: pytest.FixtureRequest) -> FrozenModel:
    made = frozen(request.param)
    assert made.backend.name == BACKENDS[request.param]
    return made


@pytest.mark.parametrize("with_prompt", [True, False])
@pytest.mark.parametrize("labels", [ONE_TOKEN, SEVERAL_TOKENS, ONE_BEGINS_ANOTHER])
def test_label_scores_are_those_of_one_plain_pass_a_row_and_label(
    model: FrozenModel, labels: list[str], with_prompt: bool
) -> None:
    rows = labelled(labels)
    encoder = Encoder(model.tokenizer, make_format("classification", labels), 512)
    prompt = tiny_prompt(model) if with_prompt else None
    scores = LabelScorer(encoder, rows).score(model, as_prompt(prompt))
    end = "<eos>" if labels is ONE_BEGINS_ANOTHER else ""
    losses = [
        [token_losses(model, prompt, f"{row['text']}\nLabel:", f" {label}{end}") for label in labels] for row in rows
    ]
    expected = np.array([[-float(each.sum()) for each in row] for row in losses])
    assert scores.log_likelihoods == pytest.approx(expected, abs=2e-4)
    lengths = {len(model.tokenizer(f" {label}")["input_ids"]) for label in labels}
    assert (lengths == {1}) == (labels is ONE_TOKEN)

    gold = [labels.index(row["label"]) for row in rows]
    assert [scores.labels[i] for i in scores.predicted] == [labels[i] for i in expected.argmax(axis=1)]
    assert scores.losses == pytest.approx([-expected[i, g] for i, g in enumerate(gold)], abs=2e-4)
    assert list(scores.tokens) == [len(losses[i][g]) for i, g in enumerate(gold)]
    assert scores.loss() == pytest.approx(float(torch.cat([losses[i][g] for i, g in enumerate(gold)]).mean()), abs=1e-4)
    shares = np.exp(expected) / np.exp(expected).sum(axis=1, keepdims=True)
    assert scores.probabilities() == pytest.approx(shares, abs=1e-4)
    assert scores.values()["accuracy"] == np.mean(expected.argmax(axis=1) == gold)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_labels_that_begin_alike_are_run_as_a_tree(architecture: str) -> None:
    """The tokens that labels share are run once a row, and give what one plain pass a label gives."""
    model, labels = frozen(architecture), ["a good film", "a good waste", "a dull film", "money", "a good"]
    rows = labelled(labels, [*TEXTS, "what a waste of time and money and time again"])
    scorer = LabelScorer(Encoder(model.tokenizer, make_format("classification", labels), 512), rows)
    prompt = tiny_prompt(model)
    expected = [
        [
            -float(token_losses(model, prompt, f"{row['text']}\nLabel:", f" {label}<eos>").sum().detach())
            for label in labels
        ]
        for row in rows
    ]
    assert scorer.score(model, as_prompt(prompt)).log_likelihoods == pytest.approx(np.array(expected), abs=3e-4)
    choice = scorer.choices[0]
    assert len(choice.ids) < len(choice.input_ids) + sum(len(tail) - 1 for tail in choice.tails)


def test_more_rows_than_are_run_at_once_keep_their_order(model: FrozenModel) -> None:
    texts = [f"{text} {i} " * (1 + i % 3) + "!" for i in range(60) for text in TEXTS[:3]]
    encoder = Encoder(model.tokenizer, make_format("classification", SEVERAL_TOKENS), 512)
    rows = labelled(SEVERAL_TOKENS, texts)
    assert sum(len(choice.input_ids) for choice in encoder.choices(rows)) > 2048
    prompt = tiny_prompt(model)
    scores = LabelScorer(encoder, rows).score(model, as_prompt(prompt))
    for i in (0, 1, 77, 179):
        alone = LabelScorer(encoder, rows.pick([i])).score(model, as_prompt(prompt))
        assert scores.log_likelihoods[i] == pytest.approx(alone.log_likelihoods[0], abs=2e-4)


@pytest.mark.parametrize("opening", ["", "please classify this text as good or bad: "])
def test_rows_that_begin_alike_are_scored_like_others(model: FrozenModel, opening: str) -> None:
    made = make_format("classification", SEVERAL_TOKENS, opening + "{{ text }} =")
    prompt = tiny_prompt(model)
    rows = labelled(SEVERAL_TOKENS, ["a film", "a film", "a", "a film and more"])
    scores = LabelScorer(Encoder(model.tokenizer, made, 512), rows).score(model, as_prompt(prompt))
    expected = [
        [
            -float(token_losses(model, prompt, f"{opening}{row['text']} =", f" {label}").sum())
            for label in SEVERAL_TOKENS
        ]
        for row in rows
    ]
    assert scores.log_likelihoods == pytest.approx(np.array(expected), abs=2e-4)


def test_a_row_that_was_cut_is_scored_on_its_labels_alone(model: FrozenModel) -> None:
    rows = labelled(SEVERAL_TOKENS, ["the parcel never came " * 20])
    encoder = Encoder(model.tokenizer, make_format("classification", SEVERAL_TOKENS), 24)
    scores = LabelScorer(encoder, rows).score(model, as_prompt(None))
    # Wherever the input was cut, it was cut there for every label.
    text = model.tokenizer.decode(list(encoder.choices(rows)[0].input_ids))
    expected = [-float(token_losses(model, None, text, f" {label}").sum()) for label in SEVERAL_TOKENS]
    assert text.endswith("\nLabel:")
    assert scores.log_likelihoods[0] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("with_prompt", [True, False])
def test_the_loss_of_completions_is_transformers_own(model: FrozenModel, with_prompt: bool) -> None:
    records = [
        {"input": text, "target": target}
        for text, target in zip(
            TEXTS, ["good", "I want my money back", "12", "a b c", "very bad", "ok ☕"], strict=True
        )
    ]
    rows = load_data(records)
    prompt = tiny_prompt(model) if with_prompt else None
    scores = TokenScorer(Encoder(model.tokenizer, make_format("completion", []), 512), rows).score(
        model, as_prompt(prompt)
    )
    losses = [token_losses(model, prompt, f"{r['input']}\n", f"{r['target']}<eos>") for r in records]
    assert scores.losses == pytest.approx([float(each.sum()) for each in losses], abs=2e-4)
    assert list(scores.tokens) == [len(each) for each in losses]
    mean = float(torch.cat(losses).mean())
    assert scores.values() == pytest.approx({"loss": mean, "perplexity": math.exp(mean)}, rel=1e-4)


def test_the_loss_of_plain_text_is_transformers_own(model: FrozenModel) -> None:
    rows = load_data([{"text": text} for text in TEXTS])
    scores = TokenScorer(Encoder(model.tokenizer, make_format("text", []), 512), rows).score(model, as_prompt(None))
    for i, row in enumerate(rows):
        ids = model.tokenizer(row["text"], return_tensors="pt")["input_ids"]
        if ids.shape[1] > 1:
            expected = float(model.hf_model(input_ids=ids, labels=ids).loss)
            assert scores.losses[i] / scores.tokens[i] == pytest.approx(expected, abs=1e-4)
            assert scores.tokens[i] == ids.shape[1] - 1


def test_the_same_tokens_of_plain_text_count_with_a_prompt_and_without(model: FrozenModel) -> None:
    rows = load_data([{"text": text} for text in TEXTS])
    scorer = TokenScorer(Encoder(model.tokenizer, make_format("text", []), 512), rows)
    prompt = tiny_prompt(model)
    assert list(scorer.score(model, as_prompt(prompt)).tokens) == list(scorer.score(model, as_prompt(None)).tokens)
    first = model.tokenizer.decode(model.tokenizer(TEXTS[0])["input_ids"][:1])
    expected = token_losses(model, prompt, first, TEXTS[0].removeprefix(first))
    assert scorer.score(model, as_prompt(prompt)).losses[0] == pytest.approx(float(expected.sum()), abs=2e-4)


@pytest.mark.parametrize("texts", [["a", "the film"], ["a", "a fine film"], ["a"]])
def test_a_text_of_one_token_has_nothing_to_predict_and_does_no_harm(llama: FrozenModel, texts: list[str]) -> None:
    assert len(llama.tokenizer("a")["input_ids"]) == 1
    done = evaluate(llama, load_data([{"text": text} for text in [*texts, "what a waste"]]))
    alone = evaluate(llama, load_data([{"text": text} for text in [*texts[1:], "what a waste"]]))
    assert done.metrics["loss"].value == pytest.approx(alone.metrics["loss"].value, abs=1e-4)
    assert "NaN" not in json.dumps([done.predictions, [metric.model_dump() for metric in done.metrics.values()]])


def scores_of(gold: list[int], predicted: list[int], labels: int) -> LabelScores:
    names = [str(i) for i in range(labels)]
    rows = load_data([{"text": "x", "label": names[g]} for g in gold])
    likelihoods = np.log(np.full((len(gold), labels), 0.1))
    likelihoods[np.arange(len(gold)), predicted] = 0
    count = len(gold)
    return LabelScores(rows, np.ones(count), np.ones(count, dtype=np.int64), likelihoods, names, np.array(gold))


def test_macro_f1_is_scikit_learns() -> None:
    generate = np.random.default_rng(0)
    for _ in range(200):
        labels, count = int(generate.integers(2, 6)), int(generate.integers(1, 30))
        gold, predicted = generate.integers(labels, size=(2, count)).tolist()
        expected = f1_score(gold, predicted, average="macro", zero_division=0)
        scores = scores_of(gold, predicted, labels)
        assert scores.macro_f1() == pytest.approx(expected)
        some = generate.integers(count, size=count)
        expected = f1_score(np.array(gold)[some], np.array(predicted)[some], average="macro", zero_division=0)
        assert scores.macro_f1(some) == pytest.approx(expected)


def test_the_confusion_is_scikit_learns() -> None:
    generate = np.random.default_rng(0)
    for _ in range(50):
        labels, count = int(generate.integers(2, 6)), int(generate.integers(1, 30))
        gold, predicted = generate.integers(labels, size=(2, count)).tolist()
        confusion = scores_of(gold, predicted, labels).confusion()
        assert confusion.counts == confusion_matrix(gold, predicted, labels=range(labels)).tolist()
        assert len(confusion.labels) == labels


def test_an_evaluation_shows_the_prompts_confusion(model: FrozenModel) -> None:
    rows = labelled(["good", "bad"])
    done = evaluate(model, rows, soft_prompt(model, ["bad", "good"]))
    assert done.confusion is not None
    assert done.confusion.labels == ["bad", "good"]
    for i, right in enumerate(done.confusion.labels):
        for j, predicted in enumerate(done.confusion.labels):
            same = [p for p in done.predictions if (p["label"], p["prediction"]) == (right, predicted)]
            assert done.confusion.counts[i][j] == len(same)
    assert sum(map(sum, done.confusion.counts)) == len(rows)


@pytest.mark.parametrize(("right", "rows"), [(0, 10), (10, 10), (7, 10), (1, 1), (0, 1), (150, 200), (872, 1000)])
def test_the_interval_of_a_share_is_wilsons(right: int, rows: int) -> None:
    metric = proportion(np.array([True] * right + [False] * (rows - right)))
    z, share = stats.norm.ppf(0.975), right / rows
    centre = (share + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z / (1 + z**2 / rows) * math.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
    assert metric.value == pytest.approx(share)
    assert (metric.low, metric.high) == pytest.approx((centre - half, centre + half), abs=1e-9)
    assert 0 <= metric.low <= metric.value <= metric.high <= 1


@pytest.mark.parametrize("rows", [20, 200])
def test_the_bootstrap_interval_is_scipys(rows: int) -> None:
    values = np.random.default_rng(1).exponential(size=rows)
    metric = bootstrap(lambda chosen: float(values[chosen].mean()), rows)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", random_state=np.random.default_rng(2)
    ).confidence_interval
    width = expected.high - expected.low
    assert metric.value == pytest.approx(values.mean())
    assert metric.low == pytest.approx(expected.low, abs=0.06 * width)
    assert metric.high == pytest.approx(expected.high, abs=0.06 * width)


def test_the_bootstrap_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generate = np.random.default_rng(3)
    held = 0
    for _ in range(100):
        values = generate.normal(size=60)
        metric = bootstrap(lambda chosen, values=values: float(values[chosen].mean()), 60)
        held += metric.low <= 0 <= metric.high
    assert 87 <= held <= 99


def test_an_interval_over_equal_rows_has_no_width_and_is_repeatable() -> None:
    same = bootstrap(lambda chosen: float(np.full(5, 2.5)[chosen].mean()), 5)
    assert (same.low, same.value, same.high) == (2.5, 2.5, 2.5)
    values = np.arange(30.0)
    assert bootstrap(lambda c: float(values[c].mean()), 30) == bootstrap(lambda c: float(values[c].mean()), 30)


def test_a_prompt_is_evaluated_next_to_the_same_template_without_it(llama: FrozenModel) -> None:
    rows = labelled(ONE_TOKEN, TEXTS * 3)
    prompt = soft_prompt(llama, ONE_TOKEN)
    with_prompt, without = evaluate(llama, rows, prompt), evaluate(llama, rows)
    assert with_prompt.without_prompt == without.metrics
    assert without.without_prompt is None
    assert with_prompt.metrics != without.metrics
    assert set(with_prompt.metrics) == {"accuracy", "macro_f1", "loss"}
    assert (with_prompt.task, with_prompt.rows, with_prompt.truncated) == ("classification", 18, 0)
    right = [record["prediction"] == record["label"] for record in with_prompt.predictions]
    assert with_prompt.metrics["accuracy"].value == np.mean(right)
    for record in with_prompt.predictions:
        assert sum(record["probabilities"].values()) == pytest.approx(1)
        assert max(record["probabilities"], key=record["probabilities"].get) == record["prediction"]


def test_rows_may_lack_labels_that_were_learned(llama: FrozenModel) -> None:
    done = evaluate(llama, labelled(["bad"]), soft_prompt(llama, ONE_TOKEN))
    assert set(done.predictions[0]["probabilities"]) == set(ONE_TOKEN)


def test_evaluate_takes_a_template_and_verbalizers_for_the_base_model(llama: FrozenModel) -> None:
    rows = labelled(["1", "5"])
    verbalizers = {"1": "bad", "5": "good"}
    done = evaluate(llama, rows, template="say: {{ text }} =", verbalizers=verbalizers)
    losses = [
        token_losses(llama, None, f"say: {row['text']} =", f" {verbalizers[row['label']]}").mean() for row in rows
    ]
    assert done.metrics["loss"].value == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)
    with pytest.raises(SettingsError, match="names the column 'txt'"):
        evaluate(llama, rows, template="{{ txt }}")


def test_cut_rows_are_counted_once(llama: FrozenModel) -> None:
    rows = labelled(ONE_TOKEN, ["the parcel never came " * 10, "a film", "what a waste of time " * 10])
    assert evaluate(llama, rows, max_length=20).truncated == 2


@pytest.mark.parametrize("task", ["classification", "text"])
def test_evaluate_cuts_rows_longer_than_the_base_model_reads(task: str) -> None:
    model = frozen("gpt2")
    assert model.context_length == 256
    records = [{"text": "the parcel never came " * 100, "label": "good"}, {"text": "a film", "label": "bad"}]
    done = evaluate(model, load_data(records, task=task))  # type: ignore[arg-type]
    assert done.truncated == 1
    assert math.isfinite(done.metrics["loss"].value)


def test_an_unknown_label_is_named(llama: FrozenModel) -> None:
    rows = labelled(["good", "goood"])
    with pytest.raises(DataError, match=r"rows, row 2: the label 'goood' .*good, bad, dull \(did you mean 'good'\?\)"):
        evaluate(llama, rows, soft_prompt(llama, ONE_TOKEN))


def test_rows_for_another_task_are_refused(llama: FrozenModel) -> None:
    with pytest.raises(DataError, match="rows is for completion, the prompt was trained for classification"):
        evaluate(llama, load_data([{"input": "a", "target": "b"}]), soft_prompt(llama, ONE_TOKEN))


def test_a_prompt_for_another_model_is_refused(llama: FrozenModel) -> None:
    with pytest.raises(PromptError, match="trained on tiny-llama; tiny-gpt2 is another model"):
        evaluate(frozen("gpt2"), labelled(ONE_TOKEN), soft_prompt(llama, ONE_TOKEN))


def test_the_scorer_is_the_tasks(llama: FrozenModel) -> None:
    rows = labelled(ONE_TOKEN)
    assert isinstance(
        make_scorer(Encoder(llama.tokenizer, make_format("classification", ONE_TOKEN), 99), rows), LabelScorer
    )
    texts = load_data([{"text": "a film"}])
    assert isinstance(make_scorer(Encoder(llama.tokenizer, make_format("text", []), 99), texts), TokenScorer)


def test_the_better_of_two_prompts_is_the_one_with_the_lower_loss() -> None:
    gold = [0, 0, 1, 1]
    sure = replace(scores_of(gold, [0, 0, 0, 1], 2), losses=np.full(4, 0.1))
    unsure = replace(scores_of(gold, gold, 2), losses=np.full(4, 0.2))
    assert sure.better_than(unsure)
    assert not unsure.better_than(sure)
    assert not sure.better_than(sure)


def test_evaluate_takes_labels_for_the_base_model_that_no_row_has(llama: FrozenModel) -> None:
    texts = {"a": "bad", "b": "good", "c": "a film"}
    with pytest.warns(UserWarning, match="no row has the label 'c'"):
        some, every = evaluate(llama, labelled(["a", "b"]), verbalizers=texts), labelled(["a", "b", "c"])
    assert set(some.predictions[0]["probabilities"]) == set(texts)
    both = {row["text"]: row["probabilities"] for row in evaluate(llama, every, verbalizers=texts).predictions}
    for record in some.predictions:
        assert record["probabilities"] == pytest.approx(both[record["text"]], abs=1e-5)
    rows = labelled(["good"])
    with pytest.warns(UserWarning, match=r"no row has the label 'goood' \(did you mean 'good'"):
        assert evaluate(llama, rows, verbalizers={"goood": "bad"}).rows == len(rows)


def test_a_rows_own_columns_stay_in_the_predictions_and_ours_are_called_otherwise(model: FrozenModel) -> None:
    own = {"prediction": "mine", "probabilities": "p", "loss": "l", "tokens": "t"}
    rows = load_data([{"text": text, "label": ONE_TOKEN[i % 3], **own} for i, text in enumerate(TEXTS)])
    done = evaluate(model, rows, soft_prompt(model, ONE_TOKEN))
    for record, row in zip(done.predictions, rows, strict=True):
        assert {name: record[name] for name in row} == row
        assert record["softprompt_prediction"] in ONE_TOKEN
        assert set(record) - set(row) == {"softprompt_prediction", "softprompt_probabilities"}
    texts = load_data([{"text": text, **own} for text in TEXTS[:2]], task="text")
    record = evaluate(model, texts).predictions[0]
    assert (record["loss"], record["tokens"]) == ("l", "t")
    assert record["softprompt_loss"] > 0
    completions = load_data([{"input": text, "target": "good", "prediction": "mine"} for text in TEXTS[:2]])
    record = evaluate(model, completions).predictions[0]
    assert record["prediction"] == "mine"
    assert isinstance(record["softprompt_prediction"], str)
