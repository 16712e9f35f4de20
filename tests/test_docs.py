"""What the documents show is what the code does: pages are generated, and the README's commands are run."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from softprompt.cli.main import main

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["commands.md", "settings.md"])
def test_reference_pages_are_up_to_date(name: str) -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == pages[name](), "run make docs"


def commands_of(page: Path) -> list[list[str]]:
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [shlex.split(line, comments=True) for line in lines]


def test_the_readme_names_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {words[1] for words in commands_of(ROOT / "README.md") if words[0] == "make"}
    assert {"install", "demo", "test"} <= used <= targets


@pytest.mark.real
def test_the_readmes_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    """In order, in an empty folder with the project's files; training is cut to two steps."""
    (tmp_path / "src").symlink_to(ROOT / "src")
    monkeypatch.chdir(tmp_path)
    ours = [words[1:] for words in commands_of(ROOT / "README.md") if words[0].endswith("softprompt")]
    assert {words[0] for words in ours} >= {"tune", "check", "evaluate", "generate"}
    for words in ours:
        short = ["--set", "max_steps=2", "--set", "eval_rows=10"] if words[0] in ("tune", "check", "demo") else []
        with pytest.raises(SystemExit) as stopped:
            main([*words, *short])
        printed = capsys.readouterr()
        assert stopped.value.code == 0, f"{words}: {printed.err}"


def test_the_readmes_python_runs(llama_folder: Path, reviews: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = block.replace('"smollm2-135m"', repr(str(llama_folder))).replace(
        "sp.TuneConfig(", "sp.TuneConfig(max_steps=2, "
    )
    code = re.sub(r'"[^"]*\.csv"', repr(str(reviews)), code)
    exec(compile(code, "README.md", "exec"), {})


def test_the_tutorial_runs(llama_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    lines = ["act,prompt", *(f'"{i}","I want you to act as a {i} and hello world"' for i in range(60))]
    (tmp_path / "prompts.csv").write_text("\n".join(lines))
    arguments = [str(tmp_path / "prompts.csv"), "--model", str(llama_folder), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["tutorial.py", *arguments])
    runpy.run_path(str(ROOT / "examples" / "tutorial.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("I want you to act as a logistician. ") == 3
    assert printed.count("loss on 10 other rows") == 2
