"""Contextual calibration: what the model makes of each label behind texts that say nothing is taken off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conftest import SHORT, Command, frozen
from softprompt.data.examples import Encoder
from softprompt.data.rows import Rows, load_data
from softprompt.data.templates import make_format
from softprompt.errors import SettingsError
from softprompt.evaluation.calibration import CalibratedScorer, CalibratedScores, calibrated_or_plain, content_free
from softprompt.evaluation.evaluate import evaluate
from softprompt.evaluation.scoring import LabelScorer, LabelScores, TextScorer
from softprompt.model.frozen import FrozenModel
from test_evaluation import ONE_TOKEN, SEVERAL_TOKENS, TEXTS, labelled, prompt_for, soft_prompt, token_losses
from test_work import counted


def encoder(model: FrozenModel, labels: list[str], template: str | None = None) -> Encoder:
    return Encoder(model.tokenizer, make_format("classification", labels, template), 512)


def calibrated(model: FrozenModel, rows: Rows, labels: list[str]) -> CalibratedScores:
    scores = CalibratedScorer(encoder(model, labels), rows, 1024).score(model, None)
    assert isinstance(scores, CalibratedScores)
    return scores


@pytest.mark.parametrize("with_prompt", [True, False])
@pytest.mark.parametrize("labels", [ONE_TOKEN, SEVERAL_TOKENS])
@pytest.mark.parametrize("architecture", ["llama", "gptj"])
def test_likelihoods_are_less_their_mean_behind_texts_without_content(
    architecture: str, labels: list[str], with_prompt: bool
) -> None:
    model, rows = frozen(architecture), labelled(labels)
    prompt = prompt_for(model) if with_prompt else None

    def plain(text: str) -> list[float]:
        losses = [token_losses(model, prompt, f"{text}\nLabel:", f" {label}").sum() for label in labels]
        return [-float(loss) for loss in losses]

    raw = np.array([plain(row["text"]) for row in rows])
    free = np.array([plain("N/A"), plain("[MASK]"), plain("")])
    scores = CalibratedScorer(encoder(model, labels), rows, 1024).score(model, prompt)
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
    scores = CalibratedScorer(encoder(llama, ONE_TOKEN, "{{ text }}"), rows, 1024).score(llama, None)
    assert isinstance(scores, LabelScores)
    assert scores.log_likelihoods.shape == (len(rows), len(ONE_TOKEN))


def test_the_prompt_and_a_common_beginning_are_run_once_for_rows_and_texts_without_content(llama: FrozenModel) -> None:
    made, rows = encoder(llama, ONE_TOKEN, "please classify this text: {{ text }} ="), labelled(ONE_TOKEN)
    with counted(llama) as work:
        CalibratedScorer(made, rows, 1024).score(llama, prompt_for(llama))
    with counted(llama) as plain:
        LabelScorer(made, rows, 1024).score(llama, prompt_for(llama))
    assert len(work.passes) == len(plain.passes) == 2
    assert work.passes[0] == plain.passes[0] > len(prompt_for(llama)) + 4
    assert plain.passes[1] < work.passes[1] < plain.passes[1] + 30


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
    assert type(calibrated_or_plain(encoder(llama, ONE_TOKEN), labelled(ONE_TOKEN), 99, "none")) is LabelScorer
    texts = Encoder(llama.tokenizer, make_format("text", []), 99)
    assert type(calibrated_or_plain(texts, load_data([{"text": "a film"}]), 99, "none")) is TextScorer


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
