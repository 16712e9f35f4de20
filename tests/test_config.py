"""Settings: where a value comes from, what is kept as it was typed, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from softprompt.config import GenerateConfig, TuneConfig, make_config, read_settings, to_yaml
from softprompt.errors import SettingsError


def settings_file(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_later_of_defaults_file_command_and_set_wins(tmp_path: Path) -> None:
    file = settings_file(tmp_path, "seed: 1\nbatch_size: 1\nmax_length: 100\nbudget: quick\n")
    config, origins = read_settings(TuneConfig, file, ["seed=3", "max_steps=7"], batch_size=2, seed=2, budget=None)
    assert (config.seed, config.batch_size, config.max_length, config.max_steps) == (3, 2, 100, 7)
    assert config.budget == "quick"
    assert config.warmup_ratio == TuneConfig().warmup_ratio
    assert origins == {
        "seed": "--set",
        "batch_size": "command",
        "max_length": str(file),
        "budget": str(file),
        "max_steps": "--set",
    }


def test_nothing_given_is_the_defaults() -> None:
    assert read_settings(TuneConfig) == (TuneConfig(), {})
    assert read_settings(GenerateConfig) == (GenerateConfig(), {})


def test_an_empty_settings_file_sets_nothing(tmp_path: Path) -> None:
    assert read_settings(TuneConfig, settings_file(tmp_path, "# nothing\n")) == (TuneConfig(), {})


def test_the_last_of_two_assignments_wins() -> None:
    assert read_settings(TuneConfig, assignments=["seed=1", "seed=2"])[0].seed == 2


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("learning_rate", "1e-3", 0.001),
        ("learning_rate", "1E-3", 0.001),
        ("learning_rate", ".5", 0.5),
        ("weight_decay", "0", 0.0),
        ("max_steps", "12", 12),
        ("max_steps", "null", None),
        ("batch_size", "", None),
        ("init", "labels", "labels"),
        ("schedule", "linear", "linear"),
    ],
)
def test_a_value_means_the_same_on_the_command_line_and_in_yaml(
    tmp_path: Path, name: str, typed: str, value: Any
) -> None:
    from_command, _ = read_settings(TuneConfig, assignments=[f"{name}={typed}"])
    from_file, _ = read_settings(TuneConfig, settings_file(tmp_path, f"{name}: {typed}\n"))
    assert getattr(from_command, name) == getattr(from_file, name) == value
    assert type(getattr(from_command, name)) is type(value)


TEXTS = [
    "yes",
    "null",
    "1e-3",
    "12",
    "",
    " a ",
    "{{ text }}\nX: ",
    "a=b",
    "[1, 2",
    "# no comment",
    "été ☕",
    "a: b",
    "'q'",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["template", "init_text", "device"])
def test_text_settings_are_kept_as_they_were_typed(name: str, text: str) -> None:
    config, _ = read_settings(TuneConfig, assignments=[f"{name}={text}"])
    assert getattr(config, name) == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_config_file_reads_back_as_it_was_written(tmp_path: Path, text: str) -> None:
    config = TuneConfig(template=text, init_text=text, verbalizers={text: "x", "1": text}, learning_rate=1e-5, seed=3)
    again, origins = read_settings(TuneConfig, settings_file(tmp_path, to_yaml(config)))
    assert again == config
    assert set(origins) == set(TuneConfig.model_fields)


def test_verbalizers_are_json_on_the_command_line_and_a_mapping_in_yaml(tmp_path: Path) -> None:
    typed = '{"1": "bad", "yes": "good = fine"}'
    from_command, _ = read_settings(TuneConfig, assignments=[f"verbalizers={typed}"])
    from_file, _ = read_settings(
        TuneConfig, settings_file(tmp_path, "verbalizers:\n  '1': bad\n  'yes': good = fine\n")
    )
    assert from_command.verbalizers == from_file.verbalizers == {"1": "bad", "yes": "good = fine"}


def test_spaces_around_a_name_are_not_part_of_it() -> None:
    config, origins = read_settings(TuneConfig, assignments=[" seed =4"])
    assert (config.seed, origins) == (4, {"seed": "--set"})


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("learning_rte=0.1", r"unknown setting 'learning_rte' \(did you mean 'learning_rate'\?\); known are dtype, "),
        ("xyz=1", r"unknown setting 'xyz'; known are"),
        ("=1", "unknown setting ''"),
        ("learning_rate", "write NAME=VALUE"),
        ("learning_rate=fast", r"setting learning_rate = fast: .*number"),
        ("learning_rate=0", "setting learning_rate = 0: .*greater than 0"),
        ("learning_rate=-1e-3", "setting learning_rate = -1e-3: .*greater than 0"),
        ("learning_rate=1e38", "setting learning_rate = 1e38: .*less than or equal to 1000000"),
        ("learning_rate=.nan", "setting learning_rate = .nan"),
        ("warmup_ratio=1.5", "setting warmup_ratio = 1.5: .*less than or equal to 1"),
        ("num_virtual_tokens=0", "setting num_virtual_tokens = 0: .*greater than or equal to 1"),
        ("num_virtual_tokens=1001", "setting num_virtual_tokens = 1001: .*less than or equal to 1000"),
        ("max_steps=1.5", "setting max_steps = 1.5: .*integer"),
        ("max_steps=[1, 2]", r"setting max_steps = \[1, 2\]"),
        ("init=txt", r"setting init = txt: unknown \(did you mean 'text'\?\); allowed are auto, random"),
        ("dtype=float8", "setting dtype = float8: .*'bfloat16'"),
        ("verbalizers={1: bad}", "verbalizers: write JSON"),
        ("verbalizers=[1]", "setting verbalizers"),
        ('verbalizers={"a": 1}', "setting verbalizers.a = 1"),
        # Not even YAML:
        ("max_steps=[3", "max_steps"),
        ("learning_rate=@1", "learning_rate"),
        ("seed=*", "seed"),
        ("batch_size={", "batch_size"),
    ],
)
def test_a_wrong_assignment_is_named(assignment: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_settings(TuneConfig, assignments=[assignment])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 0.1", r"unknown setting 'learning_rte' \(did you mean 'learning_rate'\?\)"),
        ("max_steps: many", "setting max_steps = many"),
        ("- seed", "must hold NAME: VALUE lines"),
        ("just text", "must hold NAME: VALUE lines"),
        ("seed: [1", "is not YAML"),
        ("seed: 1\n\tepochs: 2", "is not YAML"),
        ("seed: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("1: 2", "unknown setting"),
        ("yes: 2", "unknown setting"),
    ],
)
def test_a_wrong_settings_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_settings(TuneConfig, settings_file(tmp_path, text))


def test_a_settings_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no such settings file: .*nowhere\.yaml"):
        read_settings(TuneConfig, tmp_path / "nowhere.yaml")
    with pytest.raises(SettingsError, match="cannot read the settings file"):
        read_settings(TuneConfig, tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("init_text: café".encode("latin-1"))
    with pytest.raises(SettingsError, match=r"cannot read the settings file .*latin\.yaml"):
        read_settings(TuneConfig, latin)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokns": 1}, r"unknown setting 'max_new_tokns' \(did you mean 'max_new_tokens'\?\)"),
        ({"learning_rate": 0.1}, "unknown setting 'learning_rate'"),
        ({"top_p": 0}, "setting top_p = 0"),
        ({"top_p": 1.1}, "setting top_p = 1.1"),
        ({"top_k": 0}, "setting top_k = 0"),
        ({"temperature": 0}, "setting temperature = 0"),
        ({"max_new_tokens": 0}, "setting max_new_tokens = 0"),
    ],
)
def test_decoding_settings_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_config(GenerateConfig, values)


def test_settings_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TuneConfig().seed = 3  # type: ignore[misc]


def test_a_line_break_can_be_typed_in_a_shell() -> None:
    config, _ = read_settings(TuneConfig, assignments=[r"template={{ text }}\nLabel:\t"])
    assert config.template == "{{ text }}\nLabel:\t"


@pytest.mark.parametrize("name", ["quantization", "device_map", "calibration"])
def test_none_is_a_value_where_it_is_one_of_those_allowed(name: str) -> None:
    class Settings(BaseModel):
        quantization: Literal["none", "8bit"] = "8bit"
        device_map: Literal["none", "auto"] = "auto"
        calibration: Literal["none", "contextual"] = "contextual"

    assert getattr(read_settings(Settings, assignments=[f"{name}=none"])[0], name) == "none"
    assert read_settings(TuneConfig, assignments=["quantization=none"])[0] == TuneConfig()


def test_labels_that_yaml_takes_for_something_else(tmp_path: Path) -> None:
    file = settings_file(tmp_path, "verbalizers: {0: bad, 1: good, 2.5: 3}\n")
    assert read_settings(TuneConfig, file)[0].verbalizers == {"0": "bad", "1": "good", "2.5": "3"}
    for text in ("verbalizers: {yes: good, no: bad}\n", "verbalizers: {a: on, b: off}\n"):
        with pytest.raises(SettingsError, match="truth values; put them in quotes"):
            read_settings(TuneConfig, settings_file(tmp_path, text))


@pytest.mark.parametrize("line_break", ["\x85", "\u2028", "\n", "\r\n"])
def test_a_run_reads_back_the_template_that_it_wrote(tmp_path: Path, line_break: str) -> None:
    config = TuneConfig(template=f"{{{{ text }}}}{line_break}Größe:")
    assert read_settings(TuneConfig, settings_file(tmp_path, to_yaml(config)))[0] == config
    assert "Größe" in to_yaml(TuneConfig(template="{{ text }} Größe"))
