"""Columns: which hold what, what a map may hide, and what may be empty."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from softprompt import Ensemble, Rows, TuneConfig, compare, evaluate, load_data, load_prompt, tune
from softprompt.data.rows import as_rows
from softprompt.data.split import split_rows
from softprompt.errors import DataError, InputError
from softprompt.model.frozen import FrozenModel
from softprompt.training.ensemble import tune_ensemble
from tiny_runs import SHORT, Command

ALPACA = {"instruction": "Name it", "input": "sky", "output": "blue"}
QUICK = TuneConfig(max_steps=2, num_virtual_tokens=3, batch_size=4, threads=1, eval_rows=5)


def alpaca(count: int = 40) -> list[dict[str, Any]]:
    """Every other row has no input."""
    return [{"instruction": f"Name {i}", "input": "sky" if i % 2 else "", "output": f"blue {i}"} for i in range(count)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_alpacas_columns_are_read_as_they_are(llama: FrozenModel) -> None:
    rows = load_data(alpaca())
    assert rows.task == "completion"
    assert rows[0] == {"instruction": "Name 0", "input": "", "output": "blue 0", "target": "blue 0"}
    assert len({rows.normalized_input(row) for row in rows}) == 40, "the instruction is a part of the question"
    prompt = tune(llama, rows, QUICK).prompt
    assert prompt.format.input(rows[0]) == "Name 0\n"
    assert prompt.format.input(rows[1]) == "Name 1\nsky\n"
    done = evaluate(llama, alpaca(6), prompt)
    assert (done.task, done.rows) == ("completion", 6)
    assert evaluate(llama, alpaca(3)).rows == 3


def test_alpacas_columns_by_the_command(command: Command, fails: Command, llama_folder: Path) -> None:
    rows = write_jsonl(Path("rows.jsonl"), alpaca())
    done = command("check", rows, "--model", llama_folder, *SHORT)
    assert done.code == 0, done.err
    assert r"\n'" in done.out
    template = ("--set", r"template={{ instruction }}\n{{ input }}\n")
    for more in ((), template):
        done = fails(
            "check", rows, "--model", llama_folder, "--map", "input=instruction", "--map", "target=output", *more
        )
        assert "rows.jsonl has a column 'input' of its own, which --map input=instruction would hide" in done.err
        assert "leave the map out: the columns instruction, input and output are read as they are" in done.err
    done = command("check", rows, "--model", llama_folder, "--map", "target=output", *template, *SHORT)
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    "rows",
    [
        [{"instruction": "a", "output": "b"}, ALPACA],  # the first has no input
        [ALPACA, {"instruction": "a", "output": "b"}],
        [{**ALPACA, "input": None}],
        [{**ALPACA, "input": float("nan"), "id": 1}],
        [{**ALPACA, "input": "\u200b"}],
    ],
)
@pytest.mark.parametrize("mapping", [{}, {"target": "output"}])
def test_alpacas_input_may_be_missing(rows: list[dict[str, Any]], mapping: dict[str, str]) -> None:
    read = load_data(rows, mapping)
    assert read.task == "completion"
    assert all({"instruction", "input", "target"} <= row.keys() for row in read)
    read.require_inputs(["instruction", "input"])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({**ALPACA, "instruction": "", "input": " "}, "row 2: the columns instruction, input are empty"),
        ({**ALPACA, "output": ""}, "row 2: the column 'output' is empty"),
        ({**ALPACA, "output": None}, "row 2: the column 'output' is empty"),
        ({"instruction": "a"}, "row 2: the column 'output' is empty"),
        ({**ALPACA, "input": ["sky"]}, "row 2: the column 'input' holds a list"),
    ],
)
def test_alpacas_other_columns_may_not_be_empty(row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        load_data([ALPACA, row])


@pytest.mark.parametrize(
    ("columns", "mapping", "hidden"),
    [
        ("text review label", {"text": "review"}, "text"),
        ("text label stars", {"label": "stars"}, "label"),
        ("input question target", {"input": "question"}, "input"),
        ("input target answer", {"target": "answer"}, "target"),
        ("text review", {"text": "review"}, "text"),
    ],
)
def test_a_map_that_hides_a_column_is_refused(columns: str, mapping: dict[str, str], hidden: str) -> None:
    with pytest.raises(DataError, match=f"rows has a column '{hidden}' of its own, .* would hide; rename the column"):
        load_data([dict.fromkeys(columns.split(), "a")], mapping)


def test_a_column_that_only_a_later_row_has_is_hidden_too() -> None:
    with pytest.raises(DataError, match="a column 'text' of its own"):
        load_data([{"review": "a", "label": "b"}, {"text": "c", "review": "a", "label": "b"}], {"text": "review"})


@pytest.mark.parametrize(
    ("columns", "mapping"),
    [
        ("text label", {"text": "label", "label": "text"}),
        ("text label answer", {"input": "text", "target": "answer"}),
        ("input output", {"text": "input", "label": "output"}),
        ("instruction output", {"input": "instruction", "target": "output"}),
    ],
)
def test_a_map_that_hides_nothing_is_none(columns: str, mapping: dict[str, str]) -> None:
    row = {name: f"a {name}" for name in columns.split()}
    read = load_data([row], mapping)[0]
    assert {name: read[name] for name in mapping} == {name: row[column] for name, column in mapping.items()}


def test_other_columns_beside_alpacas_say_what_they_said() -> None:
    assert load_data([{**ALPACA, "text": "all of it"}]).task == "text"
    assert load_data([{**ALPACA, "text": "all of it"}], task="completion")[0]["target"] == "blue"
    assert load_data([{**ALPACA, "target": "green"}])[0]["target"] == "green"
    with pytest.raises(DataError, match="say what is in them"):
        load_data([{"instruction": "a", "response": "b"}])


def test_an_empty_input_is_refused_where_the_template_makes_no_text(llama: FrozenModel) -> None:
    rows = [{"title": f"title {i}", "text": "" if i == 7 else f"a {i}", "label": "xy"[i % 2]} for i in range(40)]
    data = load_data(rows)
    with pytest.raises(DataError, match="rows, row 8: the column 'text' is empty, and the template names no other"):
        tune(llama, data, QUICK)
    with pytest.raises(DataError, match="rows, row 8: the column 'text' is empty"):
        evaluate(llama, data)
    with pytest.raises(DataError, match="rows, row 8: the column 'text' is empty"):
        compare(llama, rows[8:], test_data=data, methods=["zero-shot"], config=QUICK)
    both = "{{ title }}: {{ text }}\nLabel:"
    tune(llama, data, QUICK.model_copy(update={"template": both}))
    assert evaluate(llama, data, template=both).rows == 40
    with pytest.raises(DataError, match="rows, row 8: the columns text, title are empty"):
        evaluate(llama, [{**row, "title": "", "id": 1} for row in rows], template=both)
    with pytest.raises(DataError, match="rows, row 1: the column 'text' is empty"):
        load_data([{"text": "", "label": "a"}])


@pytest.mark.parametrize(
    ("rows", "mapping", "says"),
    [
        ([{"text": "a"}, {"text": "b", "label": 0}], {}, "no 'label', which row 2 has.*--task text"),
        ([{"text": "a"}, {"text": "b", "label": False}], {}, "no 'label', which row 2 has"),
        ([{"text": "a"}, {"text": "b"}, {"text": "c", "label": 0.0}], {}, "no 'label', which row 3 has"),
        (
            [{"review": "a"}, {"review": "b", "stars": 0}],
            {"text": "review", "label": "stars"},
            "no 'stars', which row 2",
        ),
        ([{"label": 1}, {"text": "b", "label": 0}], {}, "no 'text', which row 2 has"),
        ([{"input": "a"}, {"input": "b", "target": 0}], {}, "no 'target', which row 2 has"),
        ([{"prompt": "a"}, {"prompt": "b", "completion": "c"}], {}, "no 'completion', which row 2 has"),
        ([{"instruction": "a", "input": "b"}, ALPACA], {}, "no 'output', which row 2 has"),
        ([{"output": "a", "id": "b"}, ALPACA], {}, "no 'instruction', which row 2 has"),
        ([{"text": "a", "label": None}, {"text": "b", "label": 0}], {}, "the column 'label' is empty"),
    ],
)
def test_a_column_is_there_if_any_row_has_it(rows: list[dict[str, Any]], mapping: dict[str, str], says: str) -> None:
    with pytest.raises(DataError, match=f"rows, row 1: .*{says}"):
        load_data(rows, mapping)


def test_nought_and_false_are_values_and_an_empty_column_is_none(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": False}]
    assert load_data(write_jsonl(tmp_path / "rows.jsonl", rows)).labels == ["0", "false"]
    assert load_data(pd.DataFrame(rows)).labels == ["0", "false"]
    assert load_data([{"text": "a"}, {"text": "b", "label": None}]).task == "text"
    assert load_data([{"text": "a"}, {"text": "b", "label": 0}], task="text").task == "text"
    assert load_data([{"text": "a"}, {"text": "b", "id": 5}]).task == "text"


@pytest.mark.parametrize("mapping", [{"text": "a", "label": "a"}, {"input": "a", "target": "a"}])
def test_one_column_for_two_things_is_warned_of(mapping: dict[str, str]) -> None:
    with pytest.warns(UserWarning, match="rows: the column 'a' is both .*map another one"):
        load_data([{"a": "x", "b": "y"}], mapping)


def test_two_columns_for_one_thing_are_refused(fails: Command, llama_folder: Path) -> None:
    Path("rows.csv").write_text("a,b,label\nx,y,z\n")
    done = fails("check", "rows.csv", "--model", llama_folder, "--map", "text=a", "--map", "text=b")
    assert "--map text is given twice" in done.err


def labelled(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"text": f"a film {i}", "label": "xy"[i % 2]} for i in range(start, start + count)]


def test_rows_that_a_prompt_was_learned_from_are_warned_of(llama: FrozenModel, tmp_path: Path) -> None:
    rows, held = labelled(40), labelled(10, 40)
    learned = tune(llama, rows, QUICK).prompt
    with pytest.warns(UserWarning, match="rows: the prompt was learned from these very rows") as caught:
        evaluate(llama, rows, load_prompt(learned.save(tmp_path / "prompt")))
    assert {Path(warning.filename) for warning in caught} == {Path(__file__)}
    chosen = tune(llama, rows, QUICK, eval_data=held).prompt
    with pytest.warns(UserWarning, match="rows: the prompt was chosen by these very rows"):
        evaluate(llama, held, chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        evaluate(llama, held, learned)


def test_rows_that_an_ensemble_was_learned_from_are_warned_of(llama: FrozenModel, tmp_path: Path) -> None:
    rows = labelled(40)
    made = tune_ensemble(llama, rows, QUICK, members=2).prompt
    loaded = load_prompt(made.save(tmp_path / "ensemble"))
    assert isinstance(loaded, Ensemble)
    with pytest.warns(UserWarning, match="rows: the prompt was learned from these very rows"):
        evaluate(llama, rows, loaded)


def test_a_path_dictionaries_and_tables_are_rows_everywhere(llama: FrozenModel, tmp_path: Path) -> None:
    rows, held = labelled(40), labelled(12, 40)
    path, other = write_jsonl(tmp_path / "rows.jsonl", rows), write_jsonl(tmp_path / "held.jsonl", held)
    expected = tune(llama, load_data(rows), QUICK, eval_data=load_data(held)).prompt
    for data, eval_data in ((str(path), str(other)), (path, other), (rows, held), (pd.DataFrame(rows), iter(held))):
        made = tune(llama, data, QUICK, eval_data=eval_data).prompt
        assert made.record.data == expected.record.data
        assert made.weights.equal(expected.weights)
        assert evaluate(llama, data if not isinstance(eval_data, list) else path, None).rows == 40
    assert evaluate(llama, f"{other}[:7]", expected).rows == 7
    assert tune_ensemble(llama, str(path), QUICK, members=2, eval_data=held).prompt.members
    done = compare(llama, str(path), test_data=held, methods=["zero-shot"], config=QUICK)
    assert len(done.rows) == 12
    data = load_data(rows)
    assert as_rows(data) is data


def test_rows_are_read_for_the_prompts_task(llama: FrozenModel) -> None:
    prompt = tune(llama, [{"text": f"a film {i}"} for i in range(40)], QUICK).prompt
    assert evaluate(llama, labelled(6), prompt).task == "text"


@pytest.mark.parametrize("source", [None, 5, {"text": ["a"]}, [None], [5], ["a"], "nowhere.csv", [], [{}]])
def test_what_is_no_rows_is_refused(llama: FrozenModel, source: Any) -> None:
    for use in (tune, evaluate):
        with pytest.raises(InputError):
            use(llama, source)  # type: ignore[operator]


def test_given_validation_rows_are_sampled_by_the_share_of_their_labels() -> None:
    data = load_data(labelled(40))
    held = load_data([{"text": f"a {i}", "label": "y" if i % 10 == 0 else "x"} for i in range(200)])
    for seed in range(20):
        train, drawn = split_rows(data, held, 50, seed)
        assert isinstance(drawn, Rows)
        assert train is data
        assert sum(row["label"] == "y" for row in drawn) == 5
        assert len(drawn) == 50
        places = [int(row["text"].split()[1]) for row in drawn]
        assert places == sorted(set(places))
        assert drawn.where(0) == f"rows, row {places[0] + 1}"
    assert split_rows(data, held, 200, 0)[1] is held


def test_without_labels_the_draw_is_what_it_was() -> None:
    import numpy as np

    data, held = load_data([{"text": f"b {i}"} for i in range(9)]), load_data([{"text": f"a {i}"} for i in range(70)])
    for seed in range(10):
        before = sorted(np.random.default_rng(seed).permutation(70)[:20].tolist())
        assert [row["text"] for row in split_rows(data, held, 20, seed)[1] or ()] == [f"a {i}" for i in before]
