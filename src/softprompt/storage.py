"""Files: written so that a reader never sees half of one, and where softprompt keeps its own."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs
from safetensors import SafetensorError

from softprompt.errors import StorageError


def home() -> Path:
    """Return the folder for what softprompt keeps between runs; SOFTPROMPT_HOME overrides the usual cache folder."""
    return Path(os.environ.get("SOFTPROMPT_HOME") or platformdirs.user_cache_dir("softprompt"))


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors about a path into one that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"cannot write {path}: {reason}; free some space, or choose another folder") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file and rename it into place."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.tmp")
        try:
            with aside.open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines and rename it into place."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill, and rename it to `path` at the end; a folder that was there is replaced.

    If filling it fails, what was at `path` stays as it was.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
        try:
            aside.chmod(0o755)  # mkdtemp's folders are for their owner alone
            yield aside
            # On the disk before the name is: a power cut leaves no half.
            for file in filter(Path.is_file, aside.iterdir()):
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            if path.exists():
                old = aside.with_name(aside.name + "-old")
                path.rename(old)
                aside.rename(path)
                shutil.rmtree(old)
            else:
                aside.rename(path)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
