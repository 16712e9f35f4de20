"""The settings that were unset, resolved from facts alone: no model, no rows."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from softprompt.config import TuneConfig
from softprompt.errors import SettingsError
from softprompt.training.settings import (
    PREFIX_TUNING_LEARNING_RATE,
    PROMPT_TUNING_LEARNING_RATE,
    Facts,
    resolve_settings,
)

FACTS = Facts(
    task="classification",
    num_train_rows=1000,
    template="{{ text }}\nLabel:",
    verbalizers={"bad": "bad", "good": "good"},
    start={"init": ("examples", "rows and their targets show more than words")},
    num_virtual_tokens=20,
    micro_batch_tokens=1024,
    threads=4,
    device="cpu",
    dtype="float32",
)


def resolved(facts: Facts = FACTS, **settings: object) -> TuneConfig:
    return resolve_settings(TuneConfig(**settings), facts).config  # type: ignore[arg-type]


def test_every_setting_is_decided_and_has_a_reason() -> None:
    settings = resolve_settings(TuneConfig(), FACTS)
    left_open = {"chat_date", "init_text", "epochs", "max_minutes", "patience", "train_rows"}
    assert {name for name, value in settings.config.model_dump().items() if value is None} == left_open
    opened = {name for name, value in TuneConfig().model_dump().items() if value in (None, "auto")}
    assert set(settings.reasons) == opened - left_open
    assert settings.reasons["init"] == "rows and their targets show more than words"


def test_what_was_given_stays_and_has_no_reason() -> None:
    given = {"learning_rate": 1.0, "batch_size": 3, "max_steps": 7, "eval_every": 2, "loss": "all", "threads": 1}
    settings = resolve_settings(TuneConfig(**given), FACTS)  # type: ignore[arg-type]
    assert {name: getattr(settings.config, name) for name in given} == given
    assert not settings.reasons.keys() & given.keys()


@pytest.mark.parametrize(
    ("method", "virtual", "rate"),
    [
        ("prompt-tuning", 5, PROMPT_TUNING_LEARNING_RATE),
        ("prompt-tuning", 20, PROMPT_TUNING_LEARNING_RATE),
        ("prompt-tuning", 80, PROMPT_TUNING_LEARNING_RATE / 2),
        ("prompt-tuning", 180, PROMPT_TUNING_LEARNING_RATE / 3),
        ("prefix-tuning", 180, PREFIX_TUNING_LEARNING_RATE),
    ],
)
def test_a_long_soft_prompt_has_a_lower_learning_rate(method: str, virtual: int, rate: float) -> None:
    found = resolved(replace(FACTS, num_virtual_tokens=virtual), method=method).learning_rate
    assert found == pytest.approx(rate, rel=0.4)
    assert (found == rate) == (method == "prefix-tuning" or virtual in (5, 20, 180))


@pytest.mark.parametrize(
    ("task", "settings", "expected"),
    [
        ("classification", {}, (16, 200, 25)),
        ("classification", {"budget": "quick"}, (16, 60, 8)),
        ("text", {"budget": "thorough"}, (8, 300, 38)),
        ("completion", {"epochs": 2}, (8, 250, 32)),
        ("completion", {"epochs": 2, "max_steps": 100}, (8, 100, 13)),
        ("completion", {"epochs": 0.5, "max_steps": 100, "batch_size": 10}, (10, 50, 7)),
    ],
)
def test_batch_size_steps_and_evaluations(task: str, settings: dict[str, object], expected: tuple[int, ...]) -> None:
    facts = replace(FACTS, task=task, verbalizers=FACTS.verbalizers if task == "classification" else {})
    found = resolved(facts, **settings)
    assert (found.batch_size, found.max_steps, found.eval_every) == expected


@pytest.mark.parametrize(
    ("labels", "method", "loss"),
    [(10, "prompt-tuning", "target"), (11, "prompt-tuning", "labels"), (11, "prefix-tuning", "target")],
)
def test_soft_prompts_of_many_labels_learn_to_tell_labels_apart(labels: int, method: str, loss: str) -> None:
    facts = replace(FACTS, verbalizers={str(n): str(n) for n in range(labels)})
    assert resolved(facts, method=method).loss == loss


def test_labels_are_for_classification_only() -> None:
    with pytest.raises(SettingsError, match="loss=labels is for classification, and text has none"):
        resolved(replace(FACTS, task="text", verbalizers={}), loss="labels")


@pytest.mark.parametrize(
    ("fits", "can", "given", "expected", "reason"),
    [
        (True, True, None, False, "the longest row fits in memory"),
        (False, True, None, True, "the longest row does not fit in memory otherwise"),
        (False, False, None, False, "not supported by the packed backend"),
        (False, True, False, False, None),
        (True, True, True, True, None),
    ],
)
def test_activation_checkpointing_is_for_rows_that_do_not_fit(
    fits: bool, can: bool, given: bool | None, expected: bool, reason: str | None
) -> None:
    facts = replace(FACTS, longest_row_fits=fits, can_checkpoint=can)
    settings = resolve_settings(TuneConfig(gradient_checkpointing=given), facts)
    assert settings.config.gradient_checkpointing is expected
    assert settings.reasons.get("gradient_checkpointing") == reason


def test_what_a_prompt_brings_is_said_to_come_from_it() -> None:
    facts = replace(FACTS, inherited_settings=frozenset({"template"}), start={})
    reasons = resolve_settings(TuneConfig(init="prompt:film"), facts).reasons
    assert (reasons["template"], reasons["verbalizers"]) == ("prompt:film", "labels stand for themselves")


def test_settings_are_decided_without_a_model_or_torch() -> None:
    code = "import sys, softprompt.training.settings; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
