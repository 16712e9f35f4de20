"""Many rows: what does not fit in memory lies in a temporary file, and a run reads what its steps take."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
import tempfile
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from softprompt import TuneConfig, load_data, tune
from softprompt.cli.settings_tables import rows_line
from softprompt.data import disk_rows
from softprompt.data.batching import batch_indices, indices_seen
from softprompt.data.disk_rows import DiskRows
from softprompt.data.encoder import Encoder
from softprompt.data.example import Example
from softprompt.data.rows import Row, Rows
from softprompt.data.split import count_duplicates, sample, split_rows
from softprompt.errors import DataError, StorageError
from softprompt.model.frozen import FrozenModel
from softprompt.training.throughput import estimate_run
from tiny_runs import SHORT, Command, prepared_run

FEW, MANY = 5_000, 25_000
ODD = ["a fine film", " Ä 日本 😀 ", "two\nlines\u2028\x85", 'a "quote", \\', "{{ x }}"]


def write_rows(path: Path, count: int) -> Path:
    """Rows of 600 letters, all different: in memory, each takes some 1000 bytes."""
    rows = ({"text": f"{i} {'a fine film ' * 50}", "label": str(i % 3)} for i in range(count))
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def growth(work: Callable[[Path], object], folder: Path, suffix: str) -> float:
    """Bytes of memory that `work` takes at its peak for each row more."""
    peaks = []
    work(write_rows(folder / f"first{suffix}", 100))  # what is made once, such as imports
    for count in (FEW, MANY):
        path = write_rows(folder / f"{count}{suffix}", count)
        tracemalloc.start()
        work(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return (peaks[1] - peaks[0]) / (MANY - FEW)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so few rows stay in memory that the figures are about all the others."""
    monkeypatch.setattr(disk_rows, "MAX_IN_MEMORY", 2**20)


@pytest.mark.usefixtures("little_memory")
def test_a_run_keeps_a_few_numbers_of_each_row_and_no_row(llama: FrozenModel, tmp_path: Path) -> None:
    config = TuneConfig(max_steps=1, batch_size=4, num_virtual_tokens=3, max_length=40, eval_rows=5, threads=1)

    def run(path: Path) -> None:
        data = load_data(path)
        tune(llama, data, config)
        assert len(sample(data, 50, 0)) == 50

    assert growth(run, tmp_path, ".jsonl") < 160


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_reading_a_file_keeps_an_offset_of_each_row(tmp_path: Path, suffix: str) -> None:
    assert growth(load_data, tmp_path, suffix) < 40


def test_rows_stay_in_memory_up_to_some_megabytes() -> None:
    short = [{"text": f"a film {i}"} for i in range(1000)]
    assert isinstance(load_data(short).rows, tuple)
    assert isinstance(load_data([{"text": "a film" * 200_000}] * 20).rows, DiskRows)
    assert isinstance(load_data(short * 60).rows, DiskRows)


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Rows]:
    """Load rows to disk, as many rows are."""

    def load(source: Any) -> Rows:
        with monkeypatch.context() as patch:
            patch.setattr(disk_rows, "MAX_IN_MEMORY", 0)
            rows = load_data(source)
        assert isinstance(rows.rows, DiskRows)
        return rows

    return load


def odd_rows(task: str, count: int = 120) -> list[Row]:
    generate = random.Random(0)
    names = {"classification": ("text", "label"), "completion": ("input", "target"), "text": ("text",)}[task]
    rows = []
    for _ in range(count):
        row = {"title": generate.choice(["", "x"]), names[0]: generate.choice(ODD) + str(generate.randrange(60))}
        rows.append({**row, **{name: generate.choice("aab") for name in names[1:]}})
    return rows


_READER = """
import pickle, sys, pathlib
rows = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
print(rows.sha256, rows.where(2), *rows.labels, type(rows.rows).__name__)
"""


def test_rows_on_disk_are_pickled_as_their_content(on_disk: Callable[[Any], Rows], tmp_path: Path) -> None:
    """A worker reads them when the process that pickled them, and its temporary file, are gone."""
    records = odd_rows("classification")
    in_memory, rows = load_data(records), on_disk(records)
    train, validation = split_rows(rows, None, 15, 0)
    assert validation is not None
    for whole, part in {
        "all": (in_memory, rows),
        "pick": (in_memory.pick([7, 3, 3, 100]), rows.pick([7, 3, 3, 100])),
        "slice": (in_memory[10:50:3], rows[10:50:3]),
        "reversed": (in_memory[::-1], rows[::-1]),
        "training": (split_rows(in_memory, None, 15, 0)[0], train),
        "pick of a pick": (in_memory.pick(range(40)).pick([5, 6]), rows.pick(range(40)).pick([5, 6])),
        "none": (in_memory[:0], rows[:0]),
    }.values():
        assert isinstance(part.rows, DiskRows)
        again: Rows = pickle.loads(pickle.dumps(part))
        assert list(again) == list(part) == list(whole)
        assert [list(row) for row in again] == [list(row) for row in part]  # columns in the same order
        assert (again.name, again.task, again.labels) == (part.name, part.task, part.labels)
        assert [again.where(i) for i in range(len(again))] == [part.where(i) for i in range(len(part))]
    (tmp_path / "rows.pickle").write_bytes(pickle.dumps(validation))
    expected = [validation.sha256, *validation.where(2).split(), *validation.labels, "tuple"]
    del rows, train, validation
    command = [sys.executable, "-c", _READER, str(tmp_path / "rows.pickle")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == expected


def test_many_rows_are_on_disk_again_after_pickling(little_memory: None, tmp_path: Path) -> None:
    rows = load_data(write_rows(tmp_path / "rows.jsonl", 5_000))
    pickled = pickle.dumps(rows)
    assert len(pickled) < (tmp_path / "rows.jsonl").stat().st_size / 5  # compressed
    assert len(pickle.dumps(rows.pick([4_000, 7]))) < 2_000  # its rows alone
    again: Rows = pickle.loads(pickled)
    assert isinstance(again.rows, DiskRows)
    assert again.sha256 == rows.sha256


@pytest.mark.parametrize("task", ["classification", "completion", "text"])
def test_rows_in_a_temporary_file_are_the_rows_in_memory(task: str, on_disk: Callable[[Any], Rows]) -> None:
    records = odd_rows(task)
    if task == "text":
        records = [{"text": row["text"]} for row in records]
    in_memory, rows = load_data(records), on_disk(records)
    assert isinstance(in_memory.rows, tuple)
    assert list(rows) == [rows[i] for i in range(len(rows))] == list(in_memory)
    assert [list(row) for row in rows] == [list(row) for row in in_memory]  # columns in the same order
    assert (rows.task, rows.labels, rows.name) == (in_memory.task, in_memory.labels, in_memory.name)
    whole = json.dumps([in_memory.task, list(in_memory)], sort_keys=True)
    assert rows.sha256 == in_memory.sha256 == hashlib.sha256(whole.encode()).hexdigest()
    for seed in range(20):
        for mine, others in zip(split_rows(rows, None, 15, seed), split_rows(in_memory, None, 15, seed), strict=True):
            assert list(mine or ()) == list(others or ())
        assert list(sample(rows, 30, seed)) == list(sample(in_memory, 30, seed))
    assert count_duplicates(rows[:60], rows[60:]) == count_duplicates(in_memory[:60], in_memory[60:]) > 0


def test_a_prepared_run_is_the_same_for_rows_in_a_temporary_file(
    llama: FrozenModel, reviews: Path, on_disk: Callable[[Any], Rows]
) -> None:
    config = TuneConfig(max_steps=3, batch_size=4, max_length=20, init="vocabulary")
    one, other = prepared_run(llama, load_data(reviews), config), prepared_run(llama, on_disk(reviews), config)
    assert list(one.examples) == list(other.examples)
    assert one.config == other.config
    assert one.length_stats == other.length_stats
    assert one.encoder.truncated == other.encoder.truncated
    assert torch.equal(one.start, other.start)


def test_a_file_that_changes_later_changes_no_rows(reviews: Path, on_disk: Callable[[Any], Rows]) -> None:
    before, rows = list(load_data(reviews)), on_disk(reviews)
    reviews.write_text("text,label\n")
    assert list(rows) == before


def test_slices_and_picks_of_a_temporary_file_are_those_of_a_tuple(on_disk: Callable[[Any], Rows]) -> None:
    generate = random.Random(0)
    records = [{"text": str(i)} for i in range(50)]
    for _ in range(200):
        rows: Rows = on_disk(records)
        expected = list(records)
        for _ in range(3):
            if generate.random() < 0.5:
                ends = [generate.choice([None, *range(-60, 60)]) for _ in range(2)]
                window = slice(*ends, generate.choice([None, 1, 2, -1]))
                rows, expected = rows[window], expected[window]
            elif expected:
                chosen = [generate.randrange(-len(expected), len(expected)) for _ in range(generate.randint(0, 9))]
                rows, expected = rows.pick(chosen), [expected[i] for i in chosen]
            assert list(rows) == expected
            assert len(rows) == len(expected)
            for beyond in (len(expected), -len(expected) - 1):
                with pytest.raises(IndexError):
                    rows[beyond]


@pytest.mark.parametrize("pread", [True, False])
def test_threads_may_read_at_once(pread: bool, on_disk: Callable[[Any], Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    if not pread:
        monkeypatch.delattr(os, "pread")  # as on Windows
    interval = sys.getswitchinterval()
    rows = on_disk([{"text": f"{i} " * (1 + i % 50)} for i in range(500)])
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            order = [random.Random(n).sample(range(500), 500) for n in range(8)]
            read = list(pool.map(lambda places: [rows[i]["text"] for i in places], order))
    finally:
        sys.setswitchinterval(interval)
    assert read == [[f"{i} " * (1 + i % 50) for i in places] for places in order]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("fault", [b"a,b,c\n", b"\xff\n"])
def test_a_range_is_read_no_further_than_it_goes(tmp_path: Path, suffix: str, fault: bytes) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", 60)
    path.write_bytes(path.read_bytes() + fault)
    assert len(load_data(f"{path}[:60]")) == 60
    with pytest.raises(DataError, match=r"line 6[12]: "):
        load_data(path)


needs_full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")


@needs_full_disk
@pytest.mark.parametrize("count", [40, 40_000])  # all of it still in the buffer, or not
def test_a_full_disk_ends_the_command_with_the_cure(
    count: int, fails: Command, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    monkeypatch.setattr(disk_rows, "MAX_IN_MEMORY", 1000)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: Path("/dev/full").open("w+b"))  # noqa: SIM115
    rows = write_rows(Path("rows.jsonl"), count)
    done = fails("tune", rows, "--model", llama_folder, "--out", "run", *SHORT, code=1)
    assert f"cannot keep the rows in a temporary file in {tempfile.tempdir}: No space left on device" in done.err
    assert "free some space, or set TMPDIR to a folder that has some" in done.err
    assert not Path("run").exists()
    gc.collect()
    assert not ignored, "what is left of the file says it again"


def test_no_folder_for_temporary_files_is_an_error_with_the_cure(
    on_disk: Callable[[Any], Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_usable() -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "TemporaryFile", none_usable)
    with pytest.raises(StorageError, match=r"No usable temporary directory .*set TMPDIR"):
        on_disk([{"text": "a"}])


def plain_split(data: Rows, wanted: int, seed: int) -> list[int]:
    """The validation rows, as first written: lists, dictionaries and whole texts."""
    same: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(data):
        same[data.normalized_input(row)].append(i)
    units = list(same.values())
    by_label: dict[str, list[list[int]]] = defaultdict(list)
    for n in np.random.default_rng(seed).permutation(len(units)).tolist():
        by_label[data[units[n][0]].get("label", "")].append(units[n])
    places = [((n + 0.5) / len(group), unit) for group in by_label.values() for n, unit in enumerate(group)]
    indices: list[int] = []
    for _, unit in sorted(places):
        if len(indices) + len(unit) <= wanted:
            indices += unit
    return sorted(indices)


def test_split_rows_splits_as_a_plain_program_does() -> None:
    generate = random.Random(0)
    for seed in range(300):
        normalized_inputs = generate.choice([5, 40, 1000])
        labels = "abcde"[: generate.randint(1, 5)]
        rows = [
            {"text": f"Question  {generate.randrange(normalized_inputs)}", "label": generate.choice(labels), "n": i}
            for i in range(generate.randint(25, 200))
        ]
        data, wanted = load_data(rows), generate.randint(5, 60)
        expected = plain_split(data, min(wanted, len(data) // 5), seed)
        if not expected:
            continue
        train, validation = split_rows(data, None, wanted, seed)
        assert [int(row["n"]) for row in validation or ()] == expected
        assert [int(row["n"]) for row in train] == [i for i in range(len(data)) if i not in expected]


@pytest.mark.parametrize(("rows", "batch_size", "steps"), [(100, 8, 5), (100, 8, 12), (100, 8, 13), (3, 8, 2)])
def test_steps_take_the_rows_of_batch_indices(rows: int, batch_size: int, steps: int) -> None:
    for seed in range(5):
        indices = [row for step in range(steps) for row in batch_indices(rows, batch_size, step, seed)]
        assert indices_seen(rows, batch_size, steps, seed).tolist() == sorted(set(indices))
        passes = [np.random.default_rng([seed, epoch]).permutation(rows) for epoch in range(len(indices) // rows + 1)]
        assert indices == np.concatenate(passes)[: len(indices)].tolist()


class Encoded:
    """Notes which rows are encoded for training, by their number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        plain = Encoder.example

        def recorded(encoder: Encoder, row: Row, where: str) -> Example:
            self.rows.append(int(row["n"]))
            return plain(encoder, row, where)

        monkeypatch.setattr(Encoder, "example", recorded)


def long_and_short(count: int, task: str = "classification") -> Rows:
    """Every third row has to be cut to fit."""
    texts: Sequence[str] = [f"{i} " + "a dull film " * (20 if i % 3 == 0 else 1) for i in range(count)]
    names = ("text", "label") if task == "classification" else ("input", "target")
    return load_data([{names[0]: text, names[1]: "ab"[i % 2], "n": i} for i, text in enumerate(texts)])


def test_prepare_run_encodes_each_sampled_row_once(llama: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = Encoded(monkeypatch)
    config = TuneConfig(max_steps=3, batch_size=5, num_virtual_tokens=3, max_length=30, eval_rows=20)
    prepared = prepared_run(llama, long_and_short(200), config)
    indices = sorted(i for step in range(3) for i in batch_indices(180, 5, step, 0))
    assert prepared.indices_seen.tolist() == indices
    assert encoded.rows == [int(prepared.train[i]["n"]) for i in indices]
    examples = [prepared.examples[i] for i in indices]
    assert prepared.length_stats.rows == 15
    assert prepared.length_stats.tokens == sum(len(e.ids) for e in examples)
    assert prepared.length_stats.targets == sum(e.targets for e in examples)
    assert prepared.length_stats.longest == max(len(e.ids) for e in examples) == 30
    assert "180 training rows (15 of them used), 20 validation rows" in rows_line(prepared)


def test_rows_that_are_cut_are_counted_once_however_often_steps_take_them(llama: FrozenModel) -> None:
    config = TuneConfig(max_steps=3, batch_size=5, num_virtual_tokens=3, max_length=30, eval_rows=20)
    prepared = prepared_run(llama, long_and_short(200), config)
    assert prepared.validation is not None
    cut = sum(int(row["n"]) % 3 == 0 for row in [*prepared.train.pick(prepared.indices_seen), *prepared.validation])
    assert prepared.encoder.truncated == cut > 0
    for step in range(9):
        _ = [prepared.examples[i] for i in batch_indices(180, 5, step, 0)]
    assert estimate_run(llama, prepared, prepared.config).truncated == prepared.encoder.truncated == cut


def test_a_target_that_is_too_long_is_said_before_the_first_step_if_a_step_takes_it(llama: FrozenModel) -> None:
    data = long_and_short(60, "completion")
    config = TuneConfig(max_steps=2, batch_size=4, num_virtual_tokens=3, max_length=30, eval_rows=0)
    indices = set(indices_seen(60, 4, 2, 0).tolist())

    def with_long_target(place: int) -> Rows:
        return load_data([{**row, "target": "the parcel " * 30} if i == place else row for i, row in enumerate(data)])

    inside, outside = min(indices), min(set(range(60)) - indices)
    with pytest.raises(DataError, match=rf"rows, row {inside + 1}: the target alone has"):
        prepared_run(llama, with_long_target(inside), config)
    prepared_run(llama, with_long_target(outside), config)
