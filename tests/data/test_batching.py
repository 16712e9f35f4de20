"""Batches: which rows a step takes, how they are cut, and which rows are for validation."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from softprompt.data.batching import batch_indices, micro_batches
from softprompt.data.example import Example
from softprompt.data.rows import Rows, load_data
from softprompt.data.split import count_duplicates, sample, split_rows
from softprompt.errors import DataError


def indices(rows: int, batch_size: int, steps: int, seed: int = 0) -> list[int]:
    return [row for step in range(steps) for row in batch_indices(rows, batch_size, step, seed)]


@pytest.mark.parametrize(("rows", "batch_size"), [(12, 4), (10, 4), (7, 3), (5, 5), (3, 8), (1, 4), (100, 16)])
def test_every_row_is_seen_once_a_pass(rows: int, batch_size: int) -> None:
    order = indices(rows, batch_size, steps=4 * rows)
    assert len(order) == 4 * rows * batch_size
    for begin in range(0, len(order), rows):
        assert sorted(order[begin : begin + rows]) == list(range(rows))


def test_a_batch_is_full_even_where_it_crosses_into_the_next_pass() -> None:
    assert [len(batch_indices(10, 4, step, 0)) for step in range(20)] == [4] * 20
    third = batch_indices(10, 4, 2, 0)
    assert set(third[:2]) == set(range(10)) - set(batch_indices(10, 4, 0, 0)) - set(batch_indices(10, 4, 1, 0))


def test_a_batch_depends_on_its_arguments_only() -> None:
    forwards = [batch_indices(50, 8, step, 3) for step in range(30)]
    assert [batch_indices(50, 8, step, 3) for step in reversed(range(30))] == forwards[::-1]


def test_each_pass_and_each_seed_has_its_own_order() -> None:
    order = indices(40, 8, steps=25, seed=1)
    passes = {tuple(order[begin : begin + 40]) for begin in range(0, 200, 40)}
    assert len(passes) == 5
    assert indices(40, 8, steps=25, seed=2) != order


def examples_of(lengths: list[int]) -> list[Example]:
    return [Example(tuple(range(length)), length - 1) for length in lengths]


@pytest.mark.parametrize("padded", [True, False])
def test_micro_batches_are_a_partition_in_order_of_length_within_the_budget(padded: bool) -> None:
    generate = random.Random(0)
    alone = 0
    for _ in range(500):
        shared_text_len = generate.randint(0, 5)
        lengths = [shared_text_len + generate.randint(1, 40) for _ in range(generate.randint(1, 20))]
        budget = generate.randint(1, 100)
        cut = micro_batches(examples_of(lengths), budget, shared_text_len, padded)
        flat = [index for part in cut for index in part]
        assert sorted(flat) == list(range(len(lengths)))
        assert [lengths[i] for i in flat] == sorted(lengths)
        assert all(cut)

        def used(part: list[int], lengths: list[int] = lengths, shared_text_len: int = shared_text_len) -> int:
            """Where rows are padded, every text takes as much as the longest."""
            own = [lengths[i] - shared_text_len for i in part]
            return len(own) * max(own) if padded else sum(own)

        for part in cut:
            assert used(part) <= budget or len(part) == 1
            alone += used(part) > budget
        for part, following in itertools.pairwise(cut):
            assert used([*part, following[0]]) > budget, "a cut that was not needed"
    assert alone > 100


def test_tokens_that_the_prefix_holds_are_not_counted() -> None:
    examples = examples_of([10] * 6)
    assert [len(part) for part in micro_batches(examples, 20)] == [2, 2, 2]
    assert [len(part) for part in micro_batches(examples, 20, shared_text_len=8)] == [6]


def labelled(**counts: int) -> Rows:
    rows = [{"text": f"{label} {i}", "label": label} for label, count in counts.items() for i in range(count)]
    random.Random(0).shuffle(rows)
    return load_data(rows)


def texts(rows: Rows | None) -> list[str]:
    return [row["text"] for row in rows or ()]


@pytest.mark.parametrize("seed", range(5))
def test_training_and_validation_rows_are_disjoint_and_together_all(seed: int) -> None:
    data = labelled(a=30, b=50)
    train, validation = split_rows(data, None, 200, seed)
    assert set(texts(train)).isdisjoint(texts(validation))
    assert sorted([*texts(train), *texts(validation)]) == sorted(texts(data))
    assert len(texts(validation)) == 16


def test_every_label_keeps_its_share_to_within_a_row() -> None:
    generate = random.Random(0)
    for seed in range(200):
        counts = {label: generate.randint(5, 200) for label in "abcde"[: generate.randint(1, 5)]}
        total = sum(counts.values())
        wanted = generate.randint(5, 60)
        if total < 25:
            continue
        _, validation = split_rows(labelled(**counts), None, wanted, seed)
        assert validation is not None
        assert len(validation) == min(wanted, total // 5)
        by_label = Counter(row["label"] for row in validation)
        for label, count in counts.items():
            assert abs(by_label[label] - len(validation) * count / total) <= 1


@pytest.mark.parametrize("task", ["classification", "text"])
def test_seed_decides_which_rows_validate(task: str) -> None:
    data = labelled(a=40, b=60) if task == "classification" else load_data([{"text": str(i)} for i in range(100)])
    validation = [texts(split_rows(data, None, 10, seed)[1]) for seed in (0, 0, 1, 2)]
    assert validation[0] == validation[1]
    assert len({tuple(rows) for rows in validation}) == 3
    assert len(validation[0]) == 10


def test_given_validation_rows_are_used_and_no_others_split_off() -> None:
    data, given = labelled(a=20, b=20), labelled(a=100, b=3)
    assert split_rows(data, given, 200, 0) == (data, given)
    train, validation = split_rows(data, given, 50, 0)
    assert train == data
    assert len(set(texts(validation))) == 50
    assert set(texts(validation)) <= set(texts(given))
    assert split_rows(data, given, 50, 0)[1] == validation
    assert split_rows(data, given, 50, 1)[1] != validation


def test_no_validation_rows_are_split_off_where_none_are_wanted() -> None:
    data = labelled(a=2)
    assert split_rows(data, None, 0, 0) == (data, None)
    assert split_rows(data, labelled(a=9), 0, 0) == (data, None)


@pytest.mark.parametrize("rows", [1, 24])
def test_too_few_rows_to_hold_any_back_is_an_error_with_both_cures(rows: int) -> None:
    with pytest.raises(DataError, match=rf"{rows} rows, too few .*--eval-data, or --set eval_rows=0"):
        split_rows(labelled(a=rows), None, 200, 0)


def test_many_rows_are_never_called_too_few() -> None:
    data = labelled(a=500, b=500)
    try:
        _, validation = split_rows(data, None, 3, 0)
    except DataError as error:
        assert "too few" not in str(error)
    else:
        assert len(texts(validation)) == 3


def test_validation_rows_for_another_task_are_refused() -> None:
    other = load_data([{"input": "a", "target": "b"}])
    with pytest.raises(DataError, match="is for completion, rows for classification"):
        split_rows(labelled(a=9), other, 200, 0)


def test_rows_with_one_input_stay_on_one_side() -> None:
    """Several right answers to one question: with one of them in training, the others are no test."""
    generate = random.Random(0)
    for seed in range(100):
        normalized_inputs = [f"question {generate.randrange(30)}" for _ in range(generate.randint(60, 200))]
        data = load_data([{"input": q, "target": str(i)} for i, q in enumerate(normalized_inputs)])
        train, validation = split_rows(data, None, generate.randint(5, 50), seed)
        assert validation is not None
        assert not {row["input"] for row in train} & {row["input"] for row in validation}
        assert sorted([*(r["target"] for r in train), *(r["target"] for r in validation)], key=int) == [
            r["target"] for r in data
        ]


def test_one_question_in_all_rows_cannot_be_split() -> None:
    data = load_data([{"input": "what?", "target": str(i)} for i in range(100)])
    with pytest.raises(DataError, match=r"1 different inputs, each in too many rows .*--eval-data"):
        split_rows(data, None, 10, 0)


def test_validation_rows_that_ask_what_training_rows_ask_are_counted() -> None:
    train = load_data([{"text": t, "label": "x"} for t in ("a film", "b", "c")])
    validation = load_data([{"text": t, "label": "y"} for t in ("A  film", "d", "c ", "c")])
    assert count_duplicates(train, validation) == 3
    assert count_duplicates(train, train.pick([])) == 0


def test_a_sample_keeps_the_shares_and_the_order() -> None:
    data = labelled(a=90, b=10)
    drawn_rows = sample(data, 20, 0)
    assert Counter(row["label"] for row in drawn_rows) == {"a": 18, "b": 2}
    places = [texts(data).index(text) for text in texts(drawn_rows)]
    assert places == sorted(places)
    assert sample(data, 100, 0) == data
