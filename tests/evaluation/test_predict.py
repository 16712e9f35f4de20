"""Predicting whole files: every row is kept to the byte, and a run that was stopped ends with the same file."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

import softprompt as sp
from softprompt.data.templates import DEFAULT_TEMPLATE
from softprompt.errors import DataError, SettingsError
from softprompt.evaluation import predict_file
from softprompt.evaluation.evaluate import evaluate
from softprompt.evaluation.predict import AT_ONCE, predict
from softprompt.generation import generate
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.base_model import base_model_record
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import SoftPrompt
from tiny_runs import Command

LABELS = {"gut": "good", "schlecht": "bad"}
TEXTS = ["a fine film", "what a waste of time", 'it said "no", twice', "ein Satz – mit Strich", "two\nlines"]


def prompt_of(model: FrozenModel, **record: object) -> SoftPrompt:
    own = {"task": "classification", "template": DEFAULT_TEMPLATE["classification"], "verbalizers": LABELS}
    made = Record(base_model=base_model_record(model), **{**own, **record})  # type: ignore[arg-type]
    return SoftPrompt(model.embed(range(20, 27)).float().clone(), made)


@pytest.fixture
def label_prompt(llama: FrozenModel, llama_folder: Path, tmp_path: Path) -> Path:
    made = prompt_of(llama)
    base = made.record.base_model.model_copy(update={"id": str(llama_folder)})
    return SoftPrompt(made.weights, made.record.model_copy(update={"base_model": base})).save(tmp_path / "labels")


@pytest.fixture
def writing_prompt(llama: FrozenModel, llama_folder: Path, tmp_path: Path) -> Path:
    made = prompt_of(llama, task="completion", template="{{ input }}\n", verbalizers={})
    base = made.record.base_model.model_copy(update={"id": str(llama_folder)})
    return SoftPrompt(made.weights, made.record.model_copy(update={"base_model": base})).save(tmp_path / "writes")


def expected(model: FrozenModel, texts: list[str]) -> list[str]:
    rows = sp.load_data([{"text": text, "label": list(LABELS)[n % 2]} for n, text in enumerate(texts)])
    return [record["prediction"] for record in evaluate(model, rows, prompt_of(model)).predictions]


def test_predictions_are_those_of_evaluate_with_the_shares_of_all_labels(llama: FrozenModel) -> None:
    prompt = prompt_of(llama)
    made = predict(llama, TEXTS, prompt)
    assert [each.label for each in made] == expected(llama, TEXTS) == generate(llama, TEXTS, prompt)
    for each in made:
        assert each.probabilities is not None
        assert each.text is None
        assert list(each.probabilities) == list(LABELS)
        assert sum(each.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert each.probability == max(each.probabilities.values()) == each.probabilities[each.label or ""]
    assert made == predict(llama, [{"text": text, "other": 5} for text in TEXTS], prompt)
    assert made == predict(llama, [{"review": text, "text": "x"} for text in TEXTS], prompt, map={"text": "review"})
    assert predict(llama, [], prompt) == []


def test_a_prompt_that_writes_predicts_texts(llama: FrozenModel) -> None:
    prompt = prompt_of(llama, task="completion", template="{{ input }}\n", verbalizers={})
    config = sp.GenerateConfig(max_new_tokens=4)
    made = predict(llama, TEXTS[:2], prompt, config=config)
    assert [each.text for each in made] == generate(llama, TEXTS[:2], prompt, config)
    assert {(each.label, each.probability, each.probabilities) for each in made} == {(None, None, None)}
    labels = predict(llama, TEXTS[:1], prompt_of(llama), mode="write", config=config)
    assert labels[0].text == generate(llama, TEXTS[:1], prompt_of(llama), config, mode="write")[0]
    with pytest.raises(SettingsError, match="decoding settings are for writing"):
        predict(llama, TEXTS, prompt_of(llama), config=config)


def test_a_prompt_for_plain_text_continues_it(llama: FrozenModel) -> None:
    prompt = SoftPrompt(prompt_of(llama).weights, Record(base_model=base_model_record(llama)))
    config = sp.GenerateConfig(max_new_tokens=4)
    for asked in (prompt, None):
        made = predict(llama, [{"text": text, "n": 1} for text in TEXTS], asked, config=config)
        assert [each.text for each in made] == generate(llama, TEXTS, asked, config)


def test_an_instruction_needs_no_input(llama: FrozenModel) -> None:
    template = "{{ instruction }}\n{% if input|default('')|trim %}{{ input }}\n{% endif %}"
    prompt = prompt_of(llama, task="completion", template=template, verbalizers={})
    rows = [{"instruction": "a film"}, {"instruction": "a film", "input": ""}, {"instruction": "a film", "input": None}]
    config = sp.GenerateConfig(max_new_tokens=3)
    assert len({each.text for each in predict(llama, rows, prompt, config=config)}) == 1
    with pytest.raises(DataError, match="row 1: it has no column 'instruction'"):
        predict(llama, [{"input": "a film"}], prompt)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None}, "row 2: the column 'text' is empty"),
        ({"text": " "}, "row 2: the column 'text' is empty"),
        ({"text": ["a"]}, "row 2: the column 'text' holds a list"),
        ({"txt": "a", "more": "b"}, r"row 2: it has no column 'text' \(did you mean 'txt'\?\).*--map text="),
        ({"text": "\ud83d"}, "row 2: the text has half of a character"),
    ],
)
def test_a_bad_row_is_named(llama: FrozenModel, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        predict(llama, [{"text": "a"}, row], prompt_of(llama))


CSV_FILES = {
    "quotes, a line break and umlauts": 'id,text,x\n1,"a ""fine"" film",ü\n2,"two\nlines", b \n',
    "other systems' line ends": "text,x\r\na film,1\r\nb,2\r\n",
    "no line end at the end": "text,x\na film,1\nb,2",
    "quotes where none are needed": '"text","x"\n"a film","1"\n"b","2"\n',
    "a byte order mark": "\ufefftext,x\na film,1\nb,2\n",
    "blanks behind commas": "x, text\n1, a film\n2, b\n",
    "columns without names": "text,x,,\na film,1\nb,2,,\n",
}


@pytest.mark.parametrize("kind", CSV_FILES)
def test_a_csv_keeps_its_columns_to_the_byte(command: Command, label_prompt: Path, kind: str) -> None:
    Path("rows.csv").write_bytes(CSV_FILES[kind].encode())
    done = command("predict", label_prompt, "rows.csv", "--out", "out.csv")
    assert (done.code, done.out) == (0, "2 rows: out.csv\n")
    made, given = Path("out.csv").read_bytes().decode(), CSV_FILES[kind]
    columns = list(csv.reader(io.StringIO(made, newline="")))
    assert columns[0][-2:] == ["prediction", "probability"]
    assert {len(row) for row in columns} == {len(columns[0])}
    assert all(row[-2] in LABELS and 0.5 <= float(row[-1]) <= 1 for row in columns[1:])
    rest = made
    for row in columns:  # what is not added is what was given
        rest = rest.replace(f",{row[-2]},{row[-1]}", "", 1)
    assert rest.removesuffix("\n") == given.replace("a film,1\nb,2,,", "a film,1,,\nb,2,,").removesuffix("\n")
    assert command("predict", label_prompt, "rows.csv").out.encode().decode() == made


def test_json_lines_keep_their_values_to_the_byte(command: Command, label_prompt: Path) -> None:
    lines = ['{"n": 1.50, "text":"a film" , "tags": ["x", {"y": null}]}', '{"text": "\\u00fc b"}', '  {"text": "c"}\t']
    Path("rows.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    made = command("predict", label_prompt, "rows.jsonl", "--probabilities").out.splitlines()
    for line, given in zip(made, lines, strict=True):
        record = json.loads(line)
        assert line.startswith(given.rstrip().removesuffix("}").rstrip())
        assert list(record)[-3:] == ["prediction", "probability", "probabilities"]
        assert record["probability"] == record["probabilities"][record["prediction"]]


def test_parquet_keeps_its_columns_and_types(command: Command, label_prompt: Path) -> None:
    table = pa.table({"n": pa.array([1, None, 3], pa.int16()), "text": ["a film", "b", "c"], "t": [[1], [], [2, 3]]})
    parquet.write_table(table, "rows.parquet")
    done = command("predict", label_prompt, "rows.parquet[1:]", "--out", "out.parquet", "--json")
    assert done.record["rows"] == 2
    made = parquet.read_table("out.parquet")
    assert made.select(["n", "text", "t"]).equals(table.slice(1))
    assert made.column_names[-2:] == ["prediction", "probability"]
    assert sorted(path.name for path in Path().iterdir() if path.name.startswith((".", "out"))) == ["out.parquet"]
    assert "Parquet file, which no terminal can show" in command("predict", label_prompt, "rows.parquet").err


@pytest.mark.parametrize("out", ["out.csv", "out.jsonl", "out.parquet"])
@pytest.mark.parametrize("given", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_rows_of_one_kind_can_be_written_as_another(
    command: Command, label_prompt: Path, llama: FrozenModel, given: str, out: str
) -> None:
    Path("rows.csv").write_text("n,text\n1,a film\n2,b\n")
    Path("rows.jsonl").write_text('{"n": "1", "text": "a film"}\n{"n": "2", "text": "b"}\n')
    parquet.write_table(pa.table({"n": ["1", "2"], "text": ["a film", "b"]}), "rows.parquet")
    assert command("predict", label_prompt, given, "--out", out).code == 0
    read = [dict(row) for row in sp.load_data(out, map={"text": "text"}, task="text")]
    assert [(row["n"], row["text"]) for row in read] == [("1", "a film"), ("2", "b")]
    assert [row["prediction"] for row in read] == expected(llama, ["a film", "b"])


def test_a_column_of_the_same_name_is_kept_and_ours_called_otherwise(command: Command, label_prompt: Path) -> None:
    Path("rows.csv").write_text("text,prediction,probability\na film,mine,0\n")
    assert command("predict", label_prompt, "rows.csv").out.splitlines()[0] == (
        "text,prediction,probability,softprompt_prediction,softprompt_probability"
    )
    done = command("predict", label_prompt, "-", stdin='{"text": "a film", "prediction": "mine"}\n{"text": "b"}\n')
    one, two = (json.loads(line) for line in done.out.splitlines())
    assert (one["prediction"], one["softprompt_prediction"] in LABELS) == ("mine", True)
    assert two["prediction"] in LABELS


def test_lines_of_stdin_give_a_line_each(command: Command, label_prompt: Path, llama: FrozenModel) -> None:
    done = command("predict", label_prompt, "-", stdin="\ufeffa fine film\r\nwhat a waste of time\r\n")
    assert done.out.splitlines() == expected(llama, TEXTS[:2])


def test_what_a_prompt_writes_stays_in_its_line(command: Command, writing_prompt: Path) -> None:
    rules = ["--set", "max_new_tokens=30"]
    done = command("predict", writing_prompt, "-", *rules, stdin="a film\nb\n")
    assert len(done.out.splitlines()) == 2
    Path("rows.jsonl").write_text('{"input": "a film"}\n')
    record = json.loads(command("predict", writing_prompt, "rows.jsonl", *rules).out)
    assert set(record) == {"input", "prediction"}
    assert done.out.splitlines()[0] == record["prediction"].replace("\\", "\\\\").replace("\n", "\\n").replace(
        "\r", "\\r"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["rows.csv", "--out", "rows.csv"], "is the file that is read"),
        (["rows.csv", "--out", "nowhere/out.csv"], "no such folder: nowhere"),
        (["rows.csv", "--out", "out.txt"], "ends in '.txt'; allowed are .csv, .jsonl, .ndjson, .parquet"),
        (["rows.csv", "--resume"], "--resume continues a file"),
        (["rows.csv", "--resume", "--out", "out.csv"], "not the beginning of a file that was stopped"),
        (["rows.csv", "--json"], "give it with --out"),
        (["nowhere.csv"], "no such file: nowhere.csv"),
        (["rows.csv", "--set", "seed=1"], "decoding settings are for writing"),
        (["rows.csv", "--mode", "write", "--probabilities"], "this prompt writes"),
        (["rows.csv", "--map", "text=txt"], "row 1: it has no column 'txt'"),
        (["rows.csv", "--map", "label=x"], "--map label=x: the prompt reads text"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    fails: Command, label_prompt: Path, options: list[str], message: str
) -> None:
    Path("rows.csv").write_text("text,x\na,1\n")
    assert message in fails("predict", label_prompt, *options).err


def many(path: Path, rows: int, bad: int | None = None) -> None:
    records = [{"n": n, "text": "" if n == bad else f"{TEXTS[n % 5]} {n}"} for n in range(rows)]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_bad_row_stops_behind_those_before_it_and_can_be_gone_on_with(
    command: Command, fails: Command, label_prompt: Path, ending: str
) -> None:
    rows, bad = AT_ONCE + 40, AT_ONCE + 20
    many(Path("rows.jsonl"), rows)
    whole, out = f"whole.{ending}", f"out.{ending}"
    command("predict", label_prompt, "rows.jsonl", "--out", whole)
    many(Path("rows.jsonl"), rows, bad)
    done = fails("predict", label_prompt, "rows.jsonl", "--out", out)
    assert f"rows.jsonl, row {bad + 1}: the column 'text' is empty" in done.err
    assert f"{bad} rows are in {out}; the same command with --resume goes on" in done.err
    assert len(sp.load_data(out, task="text")) == bad
    assert (
        "was begun and not finished; --resume continues it"
        in fails("predict", label_prompt, "rows.jsonl", "--out", out).err
    )
    other = fails("predict", label_prompt, "rows.jsonl", "--out", out, "--resume", "--probabilities")
    assert "begun with another prompt, precision or settings" in other.err
    many(Path("rows.jsonl"), rows)
    assert command("predict", label_prompt, "rows.jsonl", "--out", out, "--resume").out == f"{rows} rows: {out}\n"
    assert Path(out).read_bytes() == Path(whole).read_bytes()
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_row_that_was_written_by_half_is_written_again(
    command: Command, label_prompt: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(predict_file, "AT_ONCE", 4)
    lines = [f'"text {n}\nof two lines",{n}' for n in range(11)]
    given = f"rows.{ending}"
    if ending == "csv":
        Path(given).write_text("text,n\n" + "\n".join(lines) + "\n")
    else:
        many(Path(given), 11)
    out = f"out.{ending}"
    command("predict", label_prompt, given, "--out", out)
    whole = Path(out).read_bytes()

    class Killed(BaseException):
        pass

    def stopped(*_: Any, **__: Any) -> Any:
        raise Killed

    for cut in range(0, len(whole) + 1, 97):
        Path(out).unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(predict_file, "predict_inputs", stopped)
            with pytest.raises(Killed):
                command("predict", label_prompt, given, "--out", out)
        Path(out).write_bytes(whole[:cut])
        assert command("predict", label_prompt, given, "--out", out, "--resume").code == 0
        assert Path(out).read_bytes() == whole


def test_a_process_that_is_killed_can_be_gone_on_with(label_prompt: Path, tmp_path: Path, command: Command) -> None:
    many(Path("rows.jsonl"), 5 * AT_ONCE)
    words = [sys.executable, "-m", "softprompt", "predict", str(label_prompt), "rows.jsonl", "--out", "out.jsonl"]
    process = subprocess.Popen(words, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    out = tmp_path / "out.jsonl"
    while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < AT_ONCE):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert AT_ONCE <= out.read_bytes().count(b"\n") < 5 * AT_ONCE
    assert command("predict", label_prompt, "rows.jsonl", "--out", "out.jsonl", "--resume").code == 0
    command("predict", label_prompt, "rows.jsonl", "--out", "whole.jsonl")
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
