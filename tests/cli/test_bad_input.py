"""Bad rows, by the command: one message with the place, what is allowed and the cure; nothing half-written.

Bad settings, models, prompts and folders are in `test_cli.py`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tiny_runs import SHORT, Command
from tiny_tokenizers import tiny_tokenizer

GOOD = "".join(f"a fine film {i},positive\na dull film {i},negative\n" for i in range(20))

# The file's name, what is in it, what the command is told besides, and what it says.
FILES: dict[str, tuple[str, str | bytes, list[str], list[str]]] = {
    "empty": ("rows.csv", "", [], ["rows.csv has no rows; give at least one"]),
    "a header alone": ("rows.csv", "text,label\n", [], ["rows.csv has no rows"]),
    "no rows in the range": ("rows.csv[40:50]", f"text,label\n{GOOD}", [], ["rows.csv[40:50] has no rows"]),
    "a row of three values": ("rows.csv", f"text,label\n{GOOD}a,b,c\n", [], ["rows.csv, line 42: 3 values", "quotes"]),
    "an open quote": ("rows.csv", f'text,label\n{GOOD}"a film,positive\n', [], ["line 42", "check the quotes"]),
    "semicolons": ("rows.csv", "text;label\na;b\n", [], ["separated by ';'; save it with commas"]),
    "a column twice": ("rows.csv", "text,text\na,b\n", [], ["names a column twice: text"]),
    "broken JSON": ("rows.jsonl", '{"text": "a"}\n{"text": "b"\n', [], ["rows.jsonl, line 2: not JSON", "column"]),
    "a JSON list": ("rows.jsonl", '{"text": "a"}\n["b"]\n', [], ['line 2: must be an object such as {"text": …}']),
    "Latin-1": ("rows.csv", "text,label\na,b\ncafé,b\n".encode("latin-1"), [], ["line 3: not UTF-8; save the file as"]),
    "not Parquet": ("rows.parquet", "text,label\n", [], ["rows.parquet is not a Parquet file"]),
    "another ending": ("rows.xlsx", "PK", [], ["ends in '.xlsx'; allowed are .csv, .jsonl, .ndjson, .parquet"]),
    "no known column": ("rows.csv", "a,b\n1,2\n", [], ["rows.csv has the columns a, b", "--map text=… --map label=…"]),
    "an empty value": ("rows.csv", f"text,label\n{GOOD} ,positive\n", [], ["row 41: the column 'text' is empty"]),
    "half a character": (
        "rows.jsonl",
        '{"text": "a", "label": "b"}\n{"text": "fine \\ud83d", "label": "c"}\n',
        [],
        ["rows.jsonl, row 2: the text has half of a character, or a byte that is not UTF-8 ('\\ud83d')"],
    ),
    "a single class": (
        "rows.csv",
        "text,label\n" + "".join(f"a {i},b\n" for i in range(40)),
        [],
        ["one label only (b); two are needed"],
    ),
    "one row": ("rows.csv", "text,label\na,b\n", [], ["1 rows, too few to hold any out", "--eval-data"]),
    "a target longer than allowed": (
        "rows.jsonl",
        '{"input": "a", "target": "' + "the parcel " * 30 + '"}\n',
        ["--set", "max_length=20", "--set", "eval_rows=0"],
        ["rows.jsonl, row 1: the target alone has", "max_length is 20; raise max_length, or shorten the target"],
    ),
    "a long target among rows of which some are held out": (
        "rows.jsonl",
        "".join(f'{{"input": "a {n}", "target": "{"the parcel " * (30 if n == 40 else 1)}"}}\n' for n in range(60)),
        ["--set", "max_length=20", "--set", "max_steps=20"],  # all rows are taken
        ["rows.jsonl, row 41: the target alone has"],
    ),
    "a target longer than the context": (
        "rows.jsonl",
        '{"input": "a", "target": "' + "the parcel " * 300 + '"}\n',
        ["--set", "eval_rows=0"],
        ["rows.jsonl, row 1: the target alone has", "tokens, but max_length is 251"],  # 256 less five virtual tokens
    ),
    "a template longer than allowed": (
        "rows.csv",
        f"text,label\n{GOOD}",
        ["--set", "max_length=8", "--set", "template=Say whether this is good or bad: {{ text }}\\nLabel:"],
        ["the template's own text does not fit in max_length 8"],
    ),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("verb", ["tune", "check"])
def test_bad_rows_are_named_with_their_place(fails: Command, llama_folder: Path, verb: str, kind: str) -> None:
    name, content, options, messages = FILES[kind]
    file = Path(name.partition("[")[0])
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = fails(verb, name, "--model", llama_folder, "--out", "run", *SHORT, *options)
    for message in messages:
        assert message in done.err
    assert sorted(path.name for path in Path().iterdir()) == [file.name]


def test_unknown_label_in_the_validation_rows_is_named(fails: Command, llama_folder: Path) -> None:
    Path("rows.csv").write_text(f"text,label\n{GOOD}")
    Path("held.csv").write_text("text,label\nanother,positive\nb,positiv\n")
    done = fails("tune", "rows.csv", "--eval-data", "held.csv", "--model", llama_folder, "--out", "run", *SHORT)
    assert "held.csv, row 2: the label 'positiv' is not one that was learned: negative, positive" in done.err
    assert "(did you mean 'positive'?)" in done.err
    assert not Path("run").exists()


def test_a_text_that_is_not_utf_8_is_refused(fails: Command, llama_folder: Path) -> None:
    done = fails("generate", "none", "fine", "caf\udce9", "--model", llama_folder)
    assert "text 2: the text has half of a character, or a byte that is not UTF-8 ('\\udce9')" in done.err


def test_a_loss_that_is_not_finite_stops_the_run_and_says_what_to_try(fails: Command, llama_folder: Path) -> None:
    Path("rows.csv").write_text(f"text,label\n{GOOD}")
    settings = ("dtype=float16", "learning_rate=30000", "schedule=constant", "save_every=1", "eval_rows=0")
    huge = [word for setting in settings for word in ("--set", setting)]  # too much for float16 after three steps
    done = fails(
        "tune", "rows.csv", "--model", llama_folder, "--out", "run", *SHORT, *huge, "--set", "max_steps=9", code=1
    )
    assert "the loss is not finite at step" in done.err
    assert "the state of the last saved step is kept. Try a lower learning_rate, or dtype=float32" in done.err
    assert list(Path("run/state").glob("step-*/state.safetensors"))
    assert not Path("run/prompt").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v is Linux's")
def test_a_row_that_memory_does_not_suffice_for_ends_the_run_with_one_message(tmp_path: Path) -> None:
    """For real: 20,000 tokens attend to each other in 2 GB of address space beside what PyTorch takes for itself."""
    program = (
        "import psutil, softprompt.cli.progress, softprompt.training.tune; print(psutil.Process().memory_info().vms)"
    )
    taken = int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    shape = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=40_000)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": "the parcel never came " * 4000}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-c", "from softprompt.cli.main import main; main()", "tune", "rows.jsonl"]
    command += ["--model", "model", "--out", "run", "--set", "max_length=30000", "--set", "eval_rows=0", *SHORT]
    done = subprocess.run(
        ["bash", "-c", f"ulimit -v {taken // 1024 + 2_000_000}; {shlex.join(command)}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "warning: the longest row alone needs about" in done.stderr
    assert "softprompt: out of memory at one row of 20000 tokens or less" in done.stderr
    assert "try a smaller --set max_length" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "prompt").exists()


@pytest.fixture
def grown_folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A model folder whose tokenizer has a token that the model has no embedding of."""
    folder = tmp_path / "grown"
    folder.mkdir()
    for file in llama_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.add_tokens([f"<new-{i}>" for i in range(400 - len(tokenizer) + 1)])
    tokenizer.save_pretrained(folder)
    last = tokenizer.decode([400])
    (tmp_path / "r.csv").write_text(f"text,label\n{GOOD}{last},negative\n")
    return folder


@pytest.mark.parametrize("init", ["auto", "text", "examples", "labels", "vocabulary"])
def test_a_run_that_meets_a_token_without_an_embedding_does_not_begin(
    init: str, fails: Command, grown_folder: Path, tmp_path: Path
) -> None:
    settings = ["--set", f"init={init}", "--set", "max_steps=20", "--set", "eval_rows=0"]
    done = fails("tune", "r.csv", "--model", grown_folder, "--out", "run", *settings)
    assert re.search(r"r\.csv, row 41: the token '<new-\d+>' has the id 400, and the model has emb", done.err)
    assert "resize_token_embeddings" in done.err
    assert not (tmp_path / "run").exists()


def test_every_verb_tells_of_a_token_without_an_embedding(fails: Command, grown_folder: Path, tmp_path: Path) -> None:
    typed = (tmp_path / "r.csv").read_text().splitlines()[-1].removesuffix(",negative")
    for verb in (["check", "r.csv"], ["evaluate", "none", "r.csv"], ["compare", "r.csv", "--out", "compared"]):
        assert ", row 41: the token '<new-" in fails(*verb, "--model", grown_folder).err
    assert not (tmp_path / "compared").exists()
    assert "text 1: the token '<new-" in fails("generate", "none", typed, "--model", grown_folder).err
    start = ["--set", "init=text", "--set", f"init_text={typed}"]
    (tmp_path / "s.csv").write_text(f"text,label\n{GOOD}")
    done = fails("tune", "s.csv", "--model", grown_folder, "--out", "run", *start)
    assert "init_text: the token '<new-" in done.err
