"""Calibration: what makes a label more likely whatever the text says is taken off."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from counting import counted
from references import token_losses
from softprompt.config import GenerateConfig, TuneConfig
from softprompt.data.encoder import Encoder
from softprompt.data.rows import Rows, load_data
from softprompt.data.templates import make_format
from softprompt.errors import PromptError, SettingsError
from softprompt.evaluation.calibration import (
    CalibratedScorer,
    CalibratedScores,
    content_free,
    is_clearly_better,
    make_scorer,
    prior_matching,
)
from softprompt.evaluation.evaluate import evaluate
from softprompt.evaluation.label_scorer import LabelScorer
from softprompt.evaluation.scores import LabelScores, add_label_bias, average_scores
from softprompt.evaluation.token_scorer import TokenScorer
from softprompt.generation import generate
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.ensemble import make_ensemble
from softprompt.prompt.loading import load_prompt, load_soft_prompt
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.training.tune import tune
from tiny_data import ONE_TOKEN, SEVERAL_TOKENS, TEXTS, labelled
from tiny_models import as_prompt, frozen, soft_prompt, tiny_prompt
from tiny_runs import SHORT, Command


def encoder(model: FrozenModel, labels: list[str], template: str | None = None) -> Encoder:
    return Encoder(model.tokenizer, make_format("classification", labels, template), 512)


def calibrated(model: FrozenModel, rows: Rows, labels: list[str]) -> CalibratedScores:
    scores = CalibratedScorer(encoder(model, labels), rows, 1024).score(model, as_prompt(None))
    assert isinstance(scores, CalibratedScores)
    return scores


@pytest.mark.parametrize("with_prompt", [True, False])
@pytest.mark.parametrize("labels", [ONE_TOKEN, SEVERAL_TOKENS])
@pytest.mark.parametrize("architecture", ["llama", "gptj"])
def test_likelihoods_are_less_their_mean_behind_texts_without_content(
    architecture: str, labels: list[str], with_prompt: bool
) -> None:
    model, rows = frozen(architecture), labelled(labels)
    prompt = tiny_prompt(model) if with_prompt else None

    def plain(text: str) -> list[float]:
        losses = [token_losses(model, prompt, f"{text}\nLabel:", f" {label}").sum() for label in labels]
        return [-float(loss) for loss in losses]

    raw = np.array([plain(row["text"]) for row in rows])
    free = np.array([plain("N/A"), plain("[MASK]"), plain("")])
    scores = CalibratedScorer(encoder(model, labels), rows, 1024).score(model, as_prompt(prompt))
    assert isinstance(scores, CalibratedScores)
    expected = raw - free.mean(axis=0)
    assert scores.log_likelihoods == pytest.approx(expected, abs=3e-4)
    assert scores.predicted.tolist() == expected.argmax(axis=1).tolist()
    # The loss is still that of the target's tokens.
    assert scores.losses == pytest.approx([-raw[i, labels.index(row["label"])] for i, row in enumerate(rows)], abs=3e-4)
    assert scores.plain.log_likelihoods == pytest.approx(raw, abs=3e-4)
    assert scores.rows == rows


def test_a_model_that_always_says_one_label_says_all_of_them_again() -> None:
    model, rows = frozen("gptj"), labelled(ONE_TOKEN, TEXTS * 2)
    before = calibrated(model, rows, ONE_TOKEN)
    (dull,) = model.tokenizer(" dull")["input_ids"]
    model.hf_model.get_output_embeddings().bias.data[dull] += 30
    biased = calibrated(model, rows, ONE_TOKEN)
    assert {biased.labels[i] for i in biased.plain.predicted} == {"dull"}
    # What is added to a token's logit is added to its log-likelihood everywhere, but for what normalizes a row.
    assert len(set(biased.predicted)) > 1
    assert biased.predicted.tolist() == before.predicted.tolist()
    assert biased.probabilities() == pytest.approx(before.probabilities(), abs=1e-3)


@pytest.mark.parametrize(
    ("template", "texts"),
    [
        (None, ["N/A\nLabel:", "[MASK]\nLabel:", "\nLabel:"]),
        ("{{ text }}", ["N/A", "[MASK]"]),  # of the empty one nothing would be left to predict a label from
        ("{{ text }}|{{ title }}", ["N/A|N/A", "[MASK]|[MASK]", "|"]),
    ],
)
def test_texts_without_content_fill_every_column_of_the_template(template: str | None, texts: list[str]) -> None:
    form = make_format("classification", ONE_TOKEN, template)
    assert [form.input(row) for row in content_free(form)] == texts


def test_a_template_of_nothing_but_its_column_can_be_calibrated(llama: FrozenModel) -> None:
    rows = labelled(ONE_TOKEN)
    scores = CalibratedScorer(encoder(llama, ONE_TOKEN, "{{ text }}"), rows, 1024).score(llama, as_prompt(None))
    assert isinstance(scores, LabelScores)
    assert scores.log_likelihoods.shape == (len(rows), len(ONE_TOKEN))


def test_the_prompt_and_a_common_beginning_are_run_once_for_rows_and_texts_without_content(llama: FrozenModel) -> None:
    template = "please classify this text as good or bad or fine or dull: {{ text }} ="
    made, rows = encoder(llama, ONE_TOKEN, template), labelled(ONE_TOKEN)
    with counted(llama) as work:
        CalibratedScorer(made, rows, 1024).score(llama, as_prompt(tiny_prompt(llama)))
    with counted(llama) as plain:
        LabelScorer(made, rows, 1024).score(llama, as_prompt(tiny_prompt(llama)))
    assert len(work.passes) == len(plain.passes) == 3
    assert work.passes[:2] == plain.passes[:2]
    assert work.passes[0] == len(tiny_prompt(llama))
    assert plain.passes[2] < work.passes[2] < plain.passes[2] + 30


def test_an_evaluation_calibrates_both_sides_and_keeps_the_loss(llama: FrozenModel) -> None:
    rows = labelled(ONE_TOKEN, TEXTS * 3)
    prompt = soft_prompt(llama, ONE_TOKEN)
    done, plain = (evaluate(llama, rows, prompt, calibration=c) for c in ("contextual", "none"))  # type: ignore[arg-type]
    assert done.without_prompt == evaluate(llama, rows, calibration="contextual").metrics
    assert done.metrics["loss"].value == pytest.approx(plain.metrics["loss"].value, abs=1e-4)
    assert done.metrics["accuracy"] != plain.metrics["accuracy"]
    assert done.rows == len(done.predictions) == len(rows)
    for record in done.predictions:
        assert max(record["probabilities"], key=record["probabilities"].get) == record["prediction"]


def test_what_cannot_be_calibrated_is_refused(llama: FrozenModel) -> None:
    for records, task in (([{"text": "a film"}], "text"), ([{"input": "a", "target": "b"}], "completion")):
        with pytest.raises(SettingsError, match=f"for labels, and {task} has none; leave calibration out"):
            evaluate(llama, load_data(records), calibration="contextual")
    with pytest.raises(SettingsError, match="calibration 'context' is unknown; allowed are none, contextual"):
        evaluate(llama, labelled(ONE_TOKEN), calibration="context")  # type: ignore[arg-type]


def test_the_scorer_without_calibration_is_the_tasks(llama: FrozenModel) -> None:
    assert type(make_scorer(encoder(llama, ONE_TOKEN), labelled(ONE_TOKEN), 99, "none")) is LabelScorer
    texts = Encoder(llama.tokenizer, make_format("text", []), 99)
    assert type(make_scorer(texts, load_data([{"text": "a film"}]), 99, "none")) is TokenScorer


def test_the_command_calibrates_with_a_prompt_and_without(
    command: Command, fails: Command, llama: FrozenModel, llama_folder: Path, reviews: Path
) -> None:
    settings = ("--set", "calibration=contextual")
    record = command("evaluate", "none", reviews, "--model", llama_folder, *settings, "--json").record
    expected = evaluate(llama, load_data(reviews), calibration="contextual")
    assert record["confusion"] == expected.confusion.model_dump()  # type: ignore[union-attr]
    assert record["confusion"] != evaluate(llama, load_data(reviews)).confusion.model_dump()  # type: ignore[union-attr]

    assert command("tune", reviews, "--model", llama_folder, "--out", "run", *SHORT).code == 0
    tuned = command("evaluate", "run/prompt", reviews, *settings, "--json").record
    assert tuned["without_prompt"]["accuracy"] == record["metrics"]["accuracy"]
    plain = command("evaluate", "run/prompt", reviews, "--json").record
    assert plain["without_prompt"]["accuracy"] != tuned["without_prompt"]["accuracy"]

    assert (
        "the prompt brings its own template"
        in fails("evaluate", "run/prompt", reviews, *settings, "--set", "template={{ text }}").err
    )
    assert (
        "unknown setting 'calibration'"
        in fails("tune", reviews, "--model", llama_folder, "--out", "other", *settings).err
    )
    assert (
        "calibration = always: Input should be 'none' or 'contextual'"
        in fails("evaluate", "none", reviews, "--model", llama_folder, "--set", "calibration=always").err
    )


def likelihoods(rows: int, labels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=2.0, size=(rows, labels))


def scores_of(log_likelihoods: np.ndarray, labels: list[str]) -> LabelScores:
    count = len(log_likelihoods)
    rows = load_data([{"text": f"a parcel {n}", "label": labels[n % len(labels)]} for n in range(count)])
    gold = np.arange(count) % len(labels)
    return LabelScores(rows, np.ones(count), np.ones(count, dtype=np.int64), log_likelihoods, labels, gold)


def test_prior_matching_makes_labels_as_likely_as_they_are_frequent() -> None:
    labels = ["a", "b", "c"]
    train = load_data([{"text": str(n), "label": "aaaaabbc"[n % 8]} for n in range(800)])
    scores = scores_of(likelihoods(300, 3) + np.array([4.0, 0.0, -3.0]), labels)
    bias = prior_matching(scores, train)
    shares = add_label_bias(scores, bias).probabilities().mean(axis=0)
    assert shares == pytest.approx([501 / 803, 201 / 803, 101 / 803], abs=0.01)
    assert sum(bias.values()) == pytest.approx(0)


def test_prior_matching_takes_off_what_is_added_to_a_label_everywhere() -> None:
    labels = [f"label {n}" for n in range(20)]
    train = load_data([{"text": str(n), "label": labels[n % 20]} for n in range(200)])
    fair = scores_of(likelihoods(400, 20), labels)
    fair = add_label_bias(fair, prior_matching(fair, train))
    added = dict(zip(labels, np.linspace(-2, 2, 20).tolist(), strict=True))
    bias = prior_matching(add_label_bias(fair, added), train)
    assert [bias[label] + added[label] for label in labels] == pytest.approx([0.0] * 20, abs=0.1)


def test_prior_matching_does_not_read_the_rows_own_labels() -> None:
    labels = ["a", "b", "c"]
    train = load_data([{"text": str(n), "label": labels[n % 3]} for n in range(30)])
    scores = scores_of(likelihoods(50, 3), labels)
    other = replace(scores, gold=(scores.gold + 1) % 3)
    assert prior_matching(scores, train) == prior_matching(other, train)


def test_prior_matching_bounds_the_bias_of_a_label_that_is_never_predicted() -> None:
    labels = ["a", "b", "c"]
    train = load_data([{"text": str(n), "label": labels[n % 3]} for n in range(30)])
    never = likelihoods(50, 3)
    never[:, 2] = -1e4
    bias = prior_matching(scores_of(never, labels), train)
    assert all(np.isfinite(list(bias.values())))
    assert bias["c"] < 10 * np.log(51) + 1


def test_label_bias_is_used_where_clearly_more_rows_are_right() -> None:
    wrong, right = np.eye(2)[np.arange(20) % 2][:, ::-1], np.eye(2)[np.arange(20) % 2]

    def scores(won: int, lost: int) -> tuple[LabelScores, LabelScores]:
        after = np.concatenate([right[:won], wrong[won : won + lost], right[won + lost :]])
        before = np.concatenate([wrong[:won], right[won:]])
        return scores_of(after, ["a", "b"]), scores_of(before, ["a", "b"])

    # McNemar's statistic, (won - lost)² / (won + lost), has to be more than 1.
    assert [is_clearly_better(*scores(won, 0)) for won in (0, 1, 2)] == [False, False, True]
    assert [is_clearly_better(*scores(won, 3)) for won in (2, 3, 5, 6, 7)] == [False, False, False, False, True]


MANY = [f"team_{name}" for name in "abcdefghijkl"]


def parcels(first: int, behind: int, labels: int) -> Rows:
    return load_data([{"text": f"a parcel for {n}", "label": MANY[n % labels]} for n in range(first, behind)])


@pytest.mark.parametrize("labels", [3, 12])  # a few are scored at each evaluation, many once
@pytest.mark.parametrize("matched", [True, False])
@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_a_prompt_of_labels_keeps_its_bias_and_is_evaluated_with_it(
    llama: FrozenModel, tmp_path: Path, method: str, matched: bool, labels: int
) -> None:
    """The bias is taken where clearly more of the validation rows are right with it."""
    rows, held_back = parcels(0, 120, labels), parcels(120, 180, labels)
    config = TuneConfig(method=method, max_length=64, max_steps=1, learning_rate=1e-9)  # type: ignore[arg-type]
    first = tune(llama, rows, config, eval_data=held_back).prompt
    scorer = make_scorer(Encoder(llama.tokenizer, first.format, 64), held_back, 1024)
    plain = scorer.score(llama, as_prompt(first.weights))
    assert isinstance(plain, LabelScores)
    found = prior_matching(plain, rows)
    right = (add_label_bias(plain, found) if matched else plain).predicted
    assert add_label_bias(plain, found).predicted.tolist() != plain.predicted.tolist()
    held_back = load_data([{**row, "label": MANY[i]} for row, i in zip(held_back, right, strict=True)])
    result = tune(llama, rows, config, eval_data=held_back, out=tmp_path / "run")
    prompt = load_soft_prompt(tmp_path / "run" / "prompt")
    assert prompt.record.label_bias == (pytest.approx(found, abs=1e-3) if matched else {})
    assert result.metrics["accuracy"] == prompt.record.metrics["accuracy"] == 1
    done = evaluate(llama, held_back, prompt)
    assert {name: value.value for name, value in done.metrics.items()} == pytest.approx(result.metrics, rel=1e-4)
    assert [record["prediction"] for record in done.predictions] == [MANY[i] for i in right]
    # Without the prompt there is no bias, and another calibration takes its place.
    unbiased = SoftPrompt(prompt.weights, prompt.record.model_copy(update={"label_bias": {}}))
    assert done.without_prompt == evaluate(llama, held_back, unbiased).without_prompt
    contextual = [evaluate(llama, held_back, p, calibration="contextual").metrics for p in (prompt, unbiased)]
    assert contextual[0] == contextual[1]
    # Beside the base, which has no bias, the prompt is shown without its own too.
    assert done.without_bias == (evaluate(llama, held_back, unbiased).metrics if matched else None)
    if matched:  # what is generated is chosen so, too, but not where it writes
        texts = [row["text"] for row in held_back]
        assert generate(llama, texts, prompt) == [MANY[i] for i in right]
        rules = GenerateConfig(max_new_tokens=3)
        assert generate(llama, texts, prompt, rules, mode="write") == generate(
            llama, texts, unbiased, rules, mode="write"
        )
        assert generate(llama, texts, prompt, virtual_tokens=False) == generate(
            llama, texts, unbiased, virtual_tokens=False
        )


def test_the_base_gets_a_bias_by_the_same_rule_where_validation_rows_are_at_hand(llama: FrozenModel) -> None:
    train, asked = parcels(0, 120, 3), parcels(120, 180, 3)
    prompt = soft_prompt(llama, MANY[:3])
    scorer = make_scorer(Encoder(llama.tokenizer, prompt.format, 512), asked, 1024)
    plain = scorer.score(llama, as_prompt(None))
    assert isinstance(plain, LabelScores)
    matched = add_label_bias(plain, prior_matching(plain, train))
    assert matched.predicted.tolist() != plain.predicted.tolist()
    for right, has_bias in ((matched, True), (plain, False)):
        rows = load_data([{**row, "label": MANY[i]} for row, i in zip(asked, right.predicted, strict=True)])
        rows = replace(rows, known_labels=tuple(MANY[:3]))
        done = evaluate(llama, rows, prompt, bias_rows=(train, rows))
        assert done.without_prompt is not None
        assert done.without_prompt["accuracy"].value == 1
        unhelped = evaluate(llama, rows, prompt).without_prompt
        assert unhelped is not None
        assert (unhelped["accuracy"].value < 1) == has_bias


def test_without_validation_rows_there_is_no_bias(llama: FrozenModel) -> None:
    config = TuneConfig(max_length=64, max_steps=2, eval_rows=0)
    assert not tune(llama, parcels(0, 60, 12), config).prompt.record.label_bias


def test_every_member_of_an_ensemble_has_its_own_bias(llama: FrozenModel, tmp_path: Path) -> None:
    plain = soft_prompt(llama, MANY)
    biases = [dict(zip(MANY, bias, strict=True)) for bias in likelihoods(2, 12).tolist()]
    weights = [plain.weights, plain.weights.flip(0)]
    members = [
        SoftPrompt(w, plain.record.model_copy(update={"label_bias": bias}))
        for w, bias in zip(weights, biases, strict=True)
    ]
    ensemble = make_ensemble(members, {})
    assert not ensemble.record.label_bias
    rows = parcels(0, 60, 12)
    scorer = make_scorer(Encoder(llama.tokenizer, ensemble.format, 64), rows, 1024)
    expected = average_scores(
        [add_label_bias(scorer.score(llama, as_prompt(w)), bias) for w, bias in zip(weights, biases, strict=True)]
    )
    assert isinstance(expected, LabelScores)
    loaded = load_prompt(ensemble.save(tmp_path / "ensemble"))
    done = evaluate(llama, rows, loaded)
    assert [record["prediction"] for record in done.predictions] == [MANY[i] for i in expected.predicted]
    assert generate(llama, [row["text"] for row in rows], loaded) == [MANY[i] for i in expected.predicted]
    assert (
        done.without_bias
        == evaluate(llama, rows, make_ensemble([plain, SoftPrompt(weights[1], plain.record)], {})).metrics
    )
    without = make_ensemble([plain, SoftPrompt(weights[1], plain.record)], {})
    assert [r["prediction"] for r in evaluate(llama, rows, without).predictions] != [
        r["prediction"] for r in done.predictions
    ]


@pytest.mark.parametrize("bias", [{"team_a": "much"}, {"team_a": float("nan")}, ["team_a"], {"team_z": 1.0}])
def test_a_damaged_bias_is_refused(llama: FrozenModel, tmp_path: Path, bias: object) -> None:
    folder = soft_prompt(llama, MANY).save(tmp_path / "prompt")
    record = json.loads((folder / "softprompt.json").read_text())
    (folder / "softprompt.json").write_text(json.dumps({**record, "label_bias": bias}))
    with pytest.raises(PromptError, match="is damaged: "):
        load_soft_prompt(folder)
