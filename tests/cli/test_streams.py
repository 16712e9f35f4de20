"""Output: no encoding stops it, and a stdout that cannot be written to is one message."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from softprompt.cli.tables import print_json
from softprompt.errors import StorageError
from tiny_runs import Command

LABELS = ("جيد", "سيئ 😀")


@pytest.fixture
def arabic(tmp_path: Path) -> Path:
    path = tmp_path / "arabic.csv"
    lines = [f"a {'dull' if label == LABELS[1] else 'fine'} film {i},{label}" for i in range(10) for label in LABELS]
    path.write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    return path


def run(folder: Path, *words: object, redirected: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command as a shell does."""
    command = f'"$0" -m softprompt "$@" {redirected}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command, sys.executable, *map(str, words)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
    )


ENCODINGS = [
    {"PYTHONIOENCODING": "cp1252"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.parametrize("environment", ENCODINGS, ids=str)
def test_no_encoding_stops_the_output(
    environment: dict[str, str], arabic: Path, llama_folder: Path, tmp_path: Path
) -> None:
    words = ["evaluate", "none", arabic, "--model", llama_folder]
    done = run(tmp_path, *words, **environment)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    assert b"accuracy" in done.stdout
    predicted = [json.loads(line) for line in (tmp_path / "test-predictions.jsonl").read_text("utf-8").splitlines()]
    assert {row["label"] for row in predicted} == set(LABELS)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "utf_16"])
def test_json_is_json_in_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors="backslashreplace"))
    print_json({"labels": LABELS, "half": "\ud83d"} if encoding != "utf_16" else {"labels": LABELS})
    sys.stdout.flush()
    text = written.getvalue().decode(encoding)
    assert json.loads(text)["labels"] == list(LABELS)
    assert (LABELS[1] in text) == encoding.startswith("utf")


def test_a_dry_run_is_printed_in_any_encoding(arabic: Path, llama_folder: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "check", arabic, "--model", llama_folder, "--set", "eval_rows=0", PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    assert rb"\u062c" in done.stdout


@pytest.mark.parametrize("words", [["models", "list"], ["models", "list", "--json"], ["--help"]], ids=" ".join)
@pytest.mark.parametrize(
    ("redirected", "why"),
    [
        ("> /dev/full", "No space left on device"),
        (">&-", "Bad file descriptor"),
    ],
    ids=["full", "closed"],
)
def test_a_stdout_that_cannot_be_written_to_is_one_message(
    redirected: str, why: str, words: list[str], tmp_path: Path
) -> None:
    if not Path("/dev/full").is_char_device():
        pytest.skip("this system has no /dev/full")
    done = run(tmp_path, *words, redirected=redirected)
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[-1] == f"softprompt: cannot write to stdout: {why}"
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@pytest.mark.parametrize("words", [["models", "list"], ["models", "list", "--json"], ["--help"]], ids=" ".join)
def test_a_reader_that_has_gone_has_seen_enough(words: list[str], tmp_path: Path) -> None:
    done = run(tmp_path, *words, redirected="| (exec <&-; sleep 0)")
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_closed_stderr_stops_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "models", "list", "--json", redirected="2>&-")
    assert (done.returncode, set(json.loads(done.stdout))) == (0, {"models"})


def test_predictions_are_there_though_the_figures_cannot_be_printed(
    arabic: Path, llama_folder: Path, tmp_path: Path
) -> None:
    done = run(tmp_path, "evaluate", "none", arabic, "--model", llama_folder, redirected="> /dev/full")
    assert done.returncode == 1
    assert len((tmp_path / "test-predictions.jsonl").read_text("utf-8").splitlines()) == 20


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_figures_are_printed_though_the_predictions_cannot_be_written(
    form: list[str], command: Command, reviews: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softprompt.storage.write_records", Mock(side_effect=StorageError("the disk is full")))
    done = command("evaluate", "none", reviews, "--model", llama_folder, *form)
    assert done.code == 1
    assert "accuracy" in done.out
    assert "softprompt: the disk is full" in done.err
