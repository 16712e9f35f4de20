"""Names of earlier versions, in settings and files."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from softprompt import TuneConfig, old_names
from softprompt.config import read_settings, to_yaml
from softprompt.errors import SettingsError


@pytest.fixture(autouse=True)
def _nothing_was_warned_of() -> None:
    old_names._warn_once.cache_clear()


@pytest.mark.parametrize(("old", "new"), [("soft-prompt", "prompt-tuning"), ("deep-prefix", "prefix-tuning")])
def test_an_old_method_name_is_read_everywhere_and_warned_of_once(old: str, new: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"method: {old}\n")
    with pytest.warns(UserWarning, match=f"method {old} is called {new} now"):
        assert TuneConfig(method=old).method == new
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_settings(TuneConfig, file)[0].method == new
        assert read_settings(TuneConfig, None, [f"method={old}"])[0].method == new
        assert TuneConfig(method=new).method == new


def test_todays_names_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert old_names.current_method("prompt-tuning") == "prompt-tuning"
        assert old_names.current_method("lora") == "lora"


def test_an_ensemble_of_a_comparison_is_translated_too() -> None:
    assert old_names.current_method("soft-prompt-ensemble", quiet=True) == "prompt-tuning-ensemble"


def test_the_direct_parameterization_of_an_old_file_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("parameterization: direct\nmax_steps: 7\n")
    config, given = read_settings(TuneConfig, file)
    assert config.max_steps == 7
    assert "parameterization" not in to_yaml(config)
    assert given["max_steps"] == str(file)


@pytest.mark.parametrize("assignments", [["parameterization=residual"]])
def test_the_residual_parameterization_is_refused_by_name(assignments: list[str]) -> None:
    with pytest.raises(SettingsError, match="parameterization=residual was removed"):
        read_settings(TuneConfig, None, assignments)
