"""Fixtures: a tiny model, forty rows, and the command run in an empty folder."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: tests never wait for a hub
os.environ.pop("COLUMNS", None)  # readline, which pytest imports, sets it for the processes that share the tests

import pytest
from transformers.utils import logging

from softprompt.cli.main import main
from softprompt.model.frozen import FrozenModel
from tiny_models import frozen
from tiny_runs import Command, Done

logging.set_verbosity_error()
logging.disable_progress_bar()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that run the real model: they take longest, and two processes are to end together."""
    long = {item.path for item in items if item.get_closest_marker("real")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session")
def llama() -> FrozenModel:
    return frozen("llama")


@pytest.fixture(scope="session")
def llama_folder(llama: FrozenModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    llama.hf_model.save_pretrained(folder)
    llama.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Forty labelled rows."""
    good = ["a fine film", "what a fine time", "I want this film", "good text"]
    bad = ["a dull film", "what a waste of time", "I want my money back", "the parcel never came"]
    lines = ["text,label"]
    for i in range(20):
        lines += [f'"{good[i % 4]} {i}",positive', f'"{bad[i % 4]} {i}",negative']
    path = tmp_path / "reviews.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Run `softprompt` in an empty folder and return its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert isinstance(exit_.value.code, int)
        return Done(exit_.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def fails(command: Command) -> Command:
    """Run a command that has to fail with one message: no result, no traceback."""

    def run(*arguments: object, code: int = 2, **kwargs: Any) -> Done:
        done = command(*arguments, **kwargs)
        assert (done.code, done.out) == (code, "")
        assert "Traceback" not in done.err
        return done

    return run
