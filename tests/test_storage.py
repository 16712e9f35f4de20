"""What is written to the disk: links stay links, a kill leaves old or new, and debris goes with the next start."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from softprompt.errors import PromptError, StorageError
from softprompt.prompt import registry
from softprompt.storage import TEMPORARY_MARK, clean_up, recover, strict_json, write_folder, write_records, write_text

# Writes a folder or a file and is killed: while it is filled, or after so many renames.
_KILLED = """
import os, signal, sys
from pathlib import Path
from softprompt import storage

place, content, kind, renames = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
done = 0

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def counted(right):
    def wrapped(*arguments):
        global done
        if done == renames:
            die()
        done += 1
        return right(*arguments)
    return wrapped

Path.rename, Path.replace = counted(Path.rename), counted(Path.replace)
if kind == "file":
    storage.write_text(place, content)
else:
    with storage.write_folder(place) as aside:
        (aside / "file").write_text(content)
        if renames < 0:
            die()
die()
"""


def write(place: Path, content: str) -> None:
    with write_folder(place) as aside:
        (aside / "file").write_text(content)


def killed(place: Path, content: str, kind: str, renames: int) -> None:
    done = subprocess.run([sys.executable, "-c", _KILLED, place, content, kind, str(renames)], check=False)
    assert done.returncode == -9


def debris(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if TEMPORARY_MARK in path.name]


# After how many renames the kill comes, and what is there then: the old one, or the new one.
@pytest.mark.parametrize(("renames", "content"), [(-1, "old"), (0, "old"), (1, "new"), (2, "new")])
@pytest.mark.parametrize("by", ["a reader", "the next start", "the next writer"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_folder(
    renames: int, content: str, by: str, tmp_path: Path
) -> None:
    place = tmp_path / "prompt"
    write(place, "old")
    killed(place, "new", "folder", renames)
    assert debris(tmp_path)
    if by == "a reader":
        assert registry.find(place) == place
    elif by == "the next start":
        clean_up(tmp_path)
        assert not debris(tmp_path)
    else:
        with write_folder(place) as aside:
            assert (place / "file").read_text() == content
            assert debris(tmp_path) == [aside.name]
            (aside / "file").write_text(content)
        assert not debris(tmp_path)
    assert (place / "file").read_text() == content


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_writer_left_goes_with_the_next_one(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "one"
    killed(place, "half", kind, -1 if kind == "folder" else 0)
    assert len(debris(tmp_path)) == 1
    assert not place.exists()
    other = tmp_path / "other"
    write_text(other, "other")
    assert len(debris(tmp_path)) == 1  # of another name: not this one's to judge
    write(place, "new") if kind == "folder" else write_text(place, "new")
    assert not debris(tmp_path)


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    with write_folder(tmp_path / "prompt") as aside:
        (aside / "file").write_text("mine")
        code = f"from softprompt.storage import clean_up; from pathlib import Path; clean_up(Path({str(tmp_path)!r}))"
        subprocess.run([sys.executable, "-c", code], check=True)
        clean_up(tmp_path)
        assert (aside / "file").read_text() == "mine"
    assert (tmp_path / "prompt" / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "name", [".prompt-settings", ".prompt.tmp", ".prompt-abcd1234", ".prompt.softprompt-notes", "x"]
)
def test_what_is_not_provably_ours_stays(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    write(tmp_path / "prompt", "new")
    clean_up(tmp_path)
    recover(tmp_path / "gone")
    assert (tmp_path / name).is_dir()


def test_writers_of_one_place_do_not_mix(tmp_path: Path) -> None:
    """Each writes aside on its own: the last one stays, whole."""
    contents = [str(number) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=write_text, args=(tmp_path / "file", content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_text() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


Writing = Callable[[Path, str], None]


@pytest.mark.parametrize("writing", [write, write_text], ids=["folder", "file"])
def test_a_link_stays_one_and_its_end_is_replaced(writing: Writing, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    end, middle, link = tmp_path / "far" / "end", tmp_path / "middle", tmp_path / "link"
    writing(end, "old")
    middle.symlink_to(Path("far") / "end")  # relative, as ln makes it
    link.symlink_to(middle)
    writing(link, "new")
    assert link.is_symlink()
    assert middle.is_symlink()
    assert (end / "file" if end.is_dir() else end).read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*") if not path.is_symlink()) in (
        ["end", "far"],
        ["end", "far", "file"],
    )


@pytest.mark.parametrize("writing", [write, write_text], ids=["folder", "file"])
def test_a_link_to_what_is_to_come_is_followed_and_one_to_nowhere_refused(writing: Writing, tmp_path: Path) -> None:
    (tmp_path / "coming").symlink_to(tmp_path / "end")
    writing(tmp_path / "coming", "new")
    assert (tmp_path / "end").exists()
    (tmp_path / "nowhere").symlink_to(tmp_path / "unmounted" / "end")
    with pytest.raises(StorageError, match=r"the link leads to .*unmounted/end, which is not there"):
        writing(tmp_path / "nowhere", "new")
    assert not (tmp_path / "unmounted").exists()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(StorageError, match=r"symbolic links|the link leads"):
        writing(tmp_path / "circle", "new")


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "text")
    reader.join()
    assert read == ["text"]
    assert pipe.is_fifo()


def test_what_json_has_no_number_for_is_null(tmp_path: Path) -> None:
    record = {"loss": math.inf, "each": [-math.inf, (math.nan, 1.5)], "of": {"a": 2, "b": "Infinity", "c": None}}
    expected = {"loss": None, "each": [None, [None, 1.5]], "of": {"a": 2, "b": "Infinity", "c": None}}
    assert strict_json(record) == expected
    write_records(tmp_path / "file", [record])
    assert json.loads((tmp_path / "file").read_text(), parse_constant=pytest.fail) == expected


def test_half_of_a_surrogate_pair_is_written_as_json_has_it(tmp_path: Path) -> None:
    write_records(tmp_path / "file", [{"text": "é \ud83d"}])
    assert json.loads((tmp_path / "file").read_text(encoding="utf-8")) == {"text": "é \ud83d"}


@pytest.mark.parametrize("name", ["²", "١", "01", "0", "1" * 30, "1a"])
def test_only_numbers_as_we_write_them_are_versions(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path))
    (tmp_path / "prompts" / "film" / name).mkdir(parents=True)
    (tmp_path / "prompts" / "film" / "highest").write_bytes(name.encode() + b"\xff")
    assert registry.versions("film") == []
    assert registry.names() == []
    assert registry.new_version("film").name == "1"
    with pytest.raises(PromptError, match="no such prompt"):
        registry.find("film")
