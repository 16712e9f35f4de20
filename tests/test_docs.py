"""What the documents show is what the code does: pages are generated, and commands are run."""

from __future__ import annotations

import csv
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from softprompt.cli.main import main
from softprompt.model.bundled import SMOLLM2, cached_folder, fetch
from tiny_runs import SHORT, Command

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md"))]
WITH_COMMANDS = ["README.md", "docs/tutorial.md", "docs/formats.md", "docs/guide.md", "docs/comparing.md"]
README_LINES = 130  # a front page; all else is in docs/


@pytest.mark.parametrize("name", ["commands.md", "settings.md"])
def test_reference_pages_are_up_to_date(name: str) -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == pages[name](), "run make docs"


def commands_of(page: Path) -> list[list[str]]:
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [shlex.split(line, comments=True) for line in lines]


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_a_front_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_the_list_of_decisions_has_every_decision_once() -> None:
    listed = re.findall(
        r"^\| (.*)\. \| \[.*\]\(decisions/(.*)\.md\) \|$", (ROOT / "docs/decisions.md").read_text(), re.MULTILINE
    )
    made = [
        (heading, page.stem)
        for page in (ROOT / "docs" / "decisions").glob("*.md")
        for heading in re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        if not heading.startswith("What was tried")
    ]
    assert sorted(listed) == sorted(made)


def test_the_layout_names_every_file_of_the_source() -> None:
    package = ROOT / "src" / "softprompt"
    named = set(re.findall(r"^\| `([\w/]+(?:\.py|/))` \|", (ROOT / "docs/layout.md").read_text(), re.MULTILINE))
    assert not {name for name in named if not (package / name).exists()}, "named, but not there"
    files = [file.relative_to(package) for file in package.rglob("*.py")]
    whole = {name.rstrip("/") for name in named if name.endswith("/")}  # folders that one line describes
    missing = {
        file.as_posix()
        for file in files
        if not file.name.startswith("__") and file.parts[0] not in whole and file.as_posix() not in named
    }
    assert not missing, "there, but not named"


def test_the_readme_names_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {words[1] for words in commands_of(ROOT / "README.md") if words[0] == "make"}
    assert {"install", "demo", "test"} <= used <= targets


def test_the_tutorial_is_the_same_in_both_languages() -> None:
    english, german = (ROOT / "docs" / name / "tutorial.md" for name in ("", "de"))
    assert commands_of(german) == commands_of(english)
    blocks = [
        re.findall(r"```text\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL) for page in (english, german)
    ]
    assert blocks[0] == blocks[1]
    headings = [page.read_text(encoding="utf-8").count("\n#") for page in (english, german)]
    assert headings[0] == headings[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", text):
        if target.startswith("https://"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(file), f"{target}#{anchor}"


@pytest.mark.real
@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_the_commands_of_a_page_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    """In order, in an empty folder with a third of the demo's rows; training is cut to two steps."""
    kept = cached_folder(SMOLLM2)
    fetch(SMOLLM2)
    (tmp_path / "home" / "models").mkdir(parents=True)
    (tmp_path / "home" / "models" / kept.name).symlink_to(kept)
    demo = tmp_path / "src" / "softprompt" / "demo"
    demo.mkdir(parents=True)
    for file in (ROOT / "src" / "softprompt" / "demo").glob("*.csv"):
        header, *rows = csv.reader(file.read_text(encoding="utf-8").splitlines())
        with (demo / file.name).open("w", encoding="utf-8", newline="") as copy:
            csv.writer(copy).writerows([header, *rows[::3]])
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    ours = [words[1:] for words in commands_of(ROOT / name) if words[0].endswith("softprompt")]
    assert ours
    for words in ours:
        short = ["--set", "max_steps=2", "--set", "eval_rows=10"] if words[0] in ("tune", "check", "demo") else []
        if words[0] == "compare":
            short = ["--methods", "zero-shot,prompt-tuning", "--set", "max_minutes=0.05", "--set", "eval_rows=10"]
        with pytest.raises(SystemExit) as stopped:
            main([*words, *short])
        printed = capsys.readouterr()
        assert stopped.value.code == 0, f"{words}: {printed.err}"


def test_the_json_keys_of_the_documents_are_those_that_are_printed(
    command: Command, llama_folder: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path / "home"))
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8").partition("## JSON")[2]
    told = {verb: keys.split(", ") for verb, keys in re.findall(r"^\| `([a-z ]+)` \| `([^`]+)`", text, re.MULTILINE)}
    model = ("--model", llama_folder)
    for verb, arguments in {
        "check": (reviews, *model, *SHORT),
        "tune": (reviews, *model, "--out", "run", *SHORT),
        "compare": (reviews, *model, "--out", "out", "--methods", "zero-shot", *SHORT),
        "evaluate": ("run/prompt", reviews),
        "generate": ("run/prompt", "a fine film"),
        "prompts list": (),
        "models list": (),
        "doctor": (),
    }.items():
        assert list(command(*verb.split(), *arguments, "--json").record) == told[verb], verb
    shown = list(command("prompts", "show", "run/prompt", "--json").record)
    assert shown[-2:] == ["training", "nearest_tokens"]


def test_peft_loads_a_prompt_as_the_documents_say(
    command: Command, llama_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    assert command("tune", reviews, "--model", llama_folder, "--out", "runs/support", *SHORT).code == 0
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/formats.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block.replace("BASE_MODEL", str(llama_folder)), "formats.md", "exec"), names)
    assert names["model"].active_peft_config.num_virtual_tokens == 5


@pytest.mark.parametrize("name", ["README.md", "docs/guide.md"])
def test_the_python_of_a_page_runs(
    name: str, llama_folder: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    code = block.replace('"smollm2-135m"', repr(str(llama_folder))).replace(
        "sp.TuneConfig(", "sp.TuneConfig(max_steps=2, "
    )
    code = re.sub(r'"[^"]*\.csv"', repr(str(reviews)), code)
    exec(compile(code, name, "exec"), {})


def test_the_tutorial_runs(llama_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    lines = ["act,prompt", *(f'"{i}","I want you to act as a {i} and hello world"' for i in range(60))]
    (tmp_path / "prompts.csv").write_text("\n".join(lines))
    arguments = [str(tmp_path / "prompts.csv"), "--model", str(llama_folder), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["tutorial.py", *arguments])
    runpy.run_path(str(ROOT / "examples" / "tutorial.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("I want you to act as a logistician. ") == 3
    assert printed.count("loss on 10 other rows") == 2
