"""From text to tokens: input and target are tokenized together, split where they meet, and cut only in the input."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from softprompt.data.encoder import Encoder, bos_token_ids
from softprompt.data.example import Example, common_start, shared_text
from softprompt.data.rows import Rows, load_data
from softprompt.data.templates import Format, make_format
from softprompt.errors import DataError, ModelError, SettingsError
from tiny_data import random_text
from tiny_tokenizers import TOKENIZERS, bos_tokenizer, straddling_tokenizer, tiny_tokenizer

LONG = 10_000


@pytest.fixture(params=list(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


class Counted:
    """A tokenizer that gives up after a number of calls: a loop without end becomes a failure."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, most: int) -> None:
        self._tokenizer, self._left = tokenizer, most

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._left -= 1
        assert self._left >= 0, "the text is tokenized again and again"
        return self._tokenizer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def plain_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def boundary(tokenizer: PreTrainedTokenizerFast, text: str, target: str) -> int:
    """How many tokens of the whole text lie within the input, found by decoding token by token, without offsets."""
    ids, inside = plain_ids(tokenizer, text + target), 0
    for count in range(len(ids) + 1):
        begun = tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)
        if len(begun) <= len(text) and text.startswith(begun):
            inside = count
    return inside


def labelled(*pairs: tuple[str, str]) -> Rows:
    return load_data([{"text": text, "label": label} for text, label in pairs])


def label_format(labels: list[str], template: str = "{{ text }}\nLabel:") -> Format:
    return make_format("classification", labels, template)


@pytest.mark.parametrize("template", ["{{ input }}\nLabel:", "{{ input }}\n", "{{ input }}", "say {{ input }} = "])
def test_input_and_target_are_tokenized_together_and_split_where_they_meet(
    tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    draw = random.Random(1)
    rows = load_data(
        [{"input": "x" + random_text(draw, 5), "target": random_text(draw, 3) + "y"} for _ in range(40)],
        task="completion",
    )
    made = make_format("completion", [], template)
    bos_ids = list(bos_token_ids(tokenizer))
    for row, example in zip(rows, Encoder(tokenizer, made, LONG).examples(rows), strict=True):
        text = template.replace("{{ input }}", row["input"]).rstrip(" ")
        words = row["target"].lstrip()
        kept = text[-1].isspace() or "\n" in row["target"].removesuffix(words)
        target = row["target"] if kept else f" {words}"
        assert list(example.ids) == [*bos_ids, *plain_ids(tokenizer, text + target), tokenizer.eos_token_id]
        assert example.start == len(bos_ids) + boundary(tokenizer, text, target)
        assert example.targets == len(example.ids) - example.start


def test_a_token_that_straddles_the_border_counts_as_target() -> None:
    tokenizer = straddling_tokenizer()
    whole = "a film\nLabel: good"
    (example,) = Encoder(tokenizer, label_format(["good", "bad"]), LONG).examples(labelled(("a film", "good")))
    assert list(example.ids) == plain_ids(tokenizer, whole)
    first = tokenizer.decode([example.ids[example.start]])
    inside = tokenizer.decode(list(example.ids[: example.start]))
    assert len(inside) < len("a film\nLabel:") < len(inside + first)


def test_bos_stands_before_every_text_once() -> None:
    tokenizer = bos_tokenizer()
    rows = labelled(("a film", "good"), ("x", "bad"))
    encoder = Encoder(tokenizer, label_format(["good", "bad"]), LONG)
    text = Encoder(tokenizer, make_format("text", []), LONG)
    found = [
        *(example.ids for example in encoder.examples(rows)),
        *(choice.input_ids for choice in encoder.choices(rows)),
        *encoder.inputs(rows),
        *(example.ids for example in text.examples(load_data([{"text": "a film"}]))),
    ]
    assert len(found) == 7
    for ids in found:
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
    assert list(found[0]) == list(tokenizer("a film\nLabel: good")["input_ids"])


def test_a_tokenizer_that_adds_no_bos_gets_none() -> None:
    assert bos_token_ids(tiny_tokenizer()) == ()
    (example,) = Encoder(tiny_tokenizer(), label_format(["good"]), LONG).examples(labelled(("a film", "good")))
    assert tiny_tokenizer().bos_token_id not in example.ids


def test_plain_text_is_learned_from_its_first_real_token_on(tokenizer: PreTrainedTokenizerFast) -> None:
    (example,) = Encoder(tokenizer, make_format("text", []), LONG).examples(load_data([{"text": "a fine film \n"}]))
    bos_ids = bos_token_ids(tokenizer)
    assert list(example.ids) == [*bos_ids, *plain_ids(tokenizer, "a fine film \n")]
    assert example.start == len(bos_ids)


@pytest.mark.parametrize(
    ("labels", "template", "ends"),
    [
        (["good", "bad"], "{{ text }}\nLabel:", False),
        (["good", "good film"], "{{ text }}\nLabel:", True),
        (["good", "bad", "bad film"], "{{ text }}\nLabel:", True),
        (["good film", "bad film"], "{{ text }}\nLabel:", False),
        (["good", "good film"], "{{ text }}\n", True),
        # "bad" is one token after a space; after a line break it is the three letters, and so does "b" begin it.
        (["b", "bad"], "{{ text }}\n", True),
    ],
)
def test_labels_end_with_the_end_of_text_token_if_one_begins_another(
    labels: list[str], template: str, ends: bool
) -> None:
    tokenizer = tiny_tokenizer()
    rows = labelled(*(("a film", label) for label in labels))
    encoder = Encoder(tokenizer, label_format(labels, template), LONG)
    assert [example.ids[-1] == tokenizer.eos_token_id for example in encoder.examples(rows)] == [ends] * len(labels)
    for choice in encoder.choices(rows):
        assert [tail[-1] == tokenizer.eos_token_id for tail in choice.tails] == [ends] * len(labels)


@pytest.mark.parametrize("template", ["{{ text }}\nLabel:", "{{ text }}\n"])
def test_no_label_begins_another_in_the_tokens_that_are_compared(
    tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    pieces = ["a", "b", "ba", "bad", "badly", "good", "goodness", "good film", "1", "10", "neg", "negative"]
    for first in pieces:
        for second in pieces:
            if first == second:
                continue
            rows = labelled(("a film", first), ("a film", second))
            choice = Encoder(tokenizer, label_format([first, second], template), LONG).choices(rows)[0]
            short, long = sorted(choice.tails, key=len)
            assert long[: len(short)] != short, (first, second)


def test_stem_and_tail_are_the_whole_text_for_every_label(tokenizer: PreTrainedTokenizerFast) -> None:
    draw = random.Random(2)
    labels = ["good", "bad", "goodness", "want my money back"]
    rows = labelled(*(("x" + random_text(draw, 4), draw.choice(labels)) for _ in range(20)))
    encoder = Encoder(tokenizer, label_format(labels), LONG)
    bos_ids = list(bos_token_ids(tokenizer))
    for row, choice in zip(rows, encoder.choices(rows), strict=True):
        for label, tail in zip(labels, choice.tails, strict=True):
            whole = [*bos_ids, *plain_ids(tokenizer, f"{row['text']}\nLabel: {label}")]
            assert [*choice.input_ids, *tail] == [*whole, tokenizer.eos_token_id][: len(whole) + encoder.ends]
            assert tail
        borders = [boundary(tokenizer, f"{row['text']}\nLabel:", f" {label}") for label in labels]
        assert len(choice.input_ids) == len(bos_ids) + min(borders)


@pytest.mark.parametrize("template", ["{{ text }}\nLabel:", "{{ text }}\n", "{{ text }}"])
def test_candidate_ids_are_what_other_labels_continue_with(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    draw = random.Random(4)
    labels = ["card lost", "card stolen", "card lost abroad", "top up", "want my money back"]
    rows = labelled(*(("x" + random_text(draw, draw.randint(2, 40)), draw.choice(labels)) for _ in range(40)))
    encoder = Encoder(tokenizer, label_format(labels, template), 30)
    examples = encoder.examples(rows)
    cut = encoder.truncated
    told = [encoder.with_candidates(row, example) for row, example in zip(rows, examples, strict=True)]
    assert encoder.truncated == cut > 0
    whole = Encoder(tokenizer, encoder.format, LONG)
    for row, example, uncut, choice in zip(rows, told, whole.examples(rows), whole.choices(rows), strict=True):
        own = choice.tails[labels.index(row["label"])]
        assert len(example.candidate_ids) == example.targets
        if example.ids[example.start :] != uncut.ids[uncut.start :]:  # behind a cut column a space can fall away
            assert template == "{{ text }}"
            continue
        for place in range(1, example.targets + 1):
            known = own[: len(own) - place]
            goes_on = {tail[len(known)] for tail in choice.tails if tail[: len(known)] == known}
            assert set(example.candidate_ids[-place]) == goes_on
            assert example.ids[-place] in goes_on


def test_inputs_are_how_the_examples_begin() -> None:
    rows = labelled(("a film", "good"), ("the parcel never came", "bad"))
    for tokenizer in (tiny_tokenizer(), bos_tokenizer()):
        encoder = Encoder(tokenizer, label_format(["good", "bad"]), LONG)
        assert encoder.inputs(rows) == [example.ids[: example.start] for example in encoder.examples(rows)]


@pytest.mark.parametrize("room", [0, 1, 2, 5, 12, 28])
def test_a_long_input_is_cut_and_nothing_else(tokenizer: PreTrainedTokenizerFast, room: int) -> None:
    draw = random.Random(room)
    labels = ["good", "goodness", "bad"]
    max_length = len(tokenizer("say: \nLabel: goodness")["input_ids"]) + 1 + room
    rows = labelled(*(("x" + random_text(draw, draw.randint(0, 25)), draw.choice(labels)) for _ in range(120)))
    made = label_format(labels, "say: {{ text }}\nLabel:")
    whole = Encoder(tokenizer, made, LONG).examples(rows)
    encoder = Encoder(Counted(tokenizer, most=120 * 40), made, max_length)
    cut = encoder.examples(rows)
    assert encoder.truncated == sum(len(example.ids) > max_length for example in whole) > 0
    for row, before, after in zip(rows, whole, cut, strict=True):
        assert len(after.ids) <= max_length
        if len(before.ids) <= max_length:
            assert after == before
            continue
        text = tokenizer.decode(list(after.ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ending = f"\nLabel: {row['label']}"
        assert text.startswith("say:")
        assert text.endswith(ending)
        # A cut leaves a beginning of the text, but for a letter that the last token held a part of only.
        assert row["text"].startswith(text.removeprefix("say:").removesuffix(ending).strip("\ufffd").lstrip(" "))
        target = tokenizer.decode(list(after.ids[after.start :]), clean_up_tokenization_spaces=False)
        assert f" {row['label']}" in target


def test_a_cut_takes_no_more_than_it_must() -> None:
    tokenizer = tiny_tokenizer()
    rows = labelled(("the parcel never came and " * 20, "good"))
    for max_length in range(20, 60):
        (example,) = Encoder(tokenizer, label_format(["good", "bad"]), max_length).examples(rows)
        assert max_length - 3 <= len(example.ids) <= max_length


def test_the_longest_column_is_cut_and_the_others_stay() -> None:
    tokenizer = tiny_tokenizer()
    rows = load_data([{"title": "a fine film", "text": "the parcel never came " * 20, "label": "good"}])
    encoder = Encoder(tokenizer, label_format(["good", "bad"], "{{ text }} | {{ title }} ="), 30)
    (example,) = encoder.examples(rows)
    assert len(example.ids) <= 30
    assert tokenizer.decode(list(example.ids)).endswith(" | a fine film = good")


def test_every_row_that_is_cut_counts_once_however_many_labels_there_are() -> None:
    rows = labelled(*(("the parcel never came " * 20, label) for label in ("good", "bad", "dull")), ("a", "good"))
    encoder = Encoder(tiny_tokenizer(), label_format(["good", "bad", "dull"]), 20)
    encoder.choices(rows)
    assert encoder.truncated == 3


@pytest.mark.parametrize("room", [0, 1, 4, 9, 20])
def test_a_cut_row_has_one_input_for_all_labels(tokenizer: PreTrainedTokenizerFast, room: int) -> None:
    labels = ["good", "I want my money back"]
    rows = labelled(*((f"the parcel never came {i} " * 20, labels[i % 2]) for i in range(6)))
    max_length = len(tokenizer(f"\nLabel: {labels[1]}")["input_ids"]) + room
    for choice in Encoder(Counted(tokenizer, most=2000), label_format(labels), max_length).choices(rows):
        input_ids = tokenizer.decode(list(choice.input_ids), skip_special_tokens=True)
        written = [tokenizer.decode(list(tail), skip_special_tokens=True) for tail in choice.tails]
        ends = [f"\nLabel: {label}" for label in labels]
        assert all((input_ids + tail).endswith(end) for tail, end in zip(written, ends, strict=True))
        # What is scored is the label, not what is left of the input.
        inputs = {(input_ids + tail).removesuffix(end) for tail, end in zip(written, ends, strict=True)}
        assert len(inputs) == 1
        assert max(len(choice.input_ids) + len(tail) for tail in choice.tails) <= max_length


def test_a_long_plain_text_is_cut_at_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = load_data([{"text": "the parcel never came " * 20}, {"text": "a film"}])
    encoder = Encoder(tokenizer, make_format("text", []), 12)
    long, short = encoder.examples(rows)
    assert list(long.ids) == [*bos_token_ids(tokenizer), *plain_ids(tokenizer, rows[0]["text"])][:12]
    assert len(short.ids) < 12
    assert encoder.truncated == 1


def test_a_target_that_does_not_fit_is_an_error_with_its_row() -> None:
    rows = load_data([{"input": "a", "target": "b"}, {"input": "a", "target": "the parcel never came " * 5}])
    with pytest.raises(DataError, match=r"row 2: the target alone has \d+ tokens, but max_length is 10"):
        Encoder(tiny_tokenizer(), make_format("completion", []), 10).examples(rows)


def test_a_template_that_does_not_fit_is_an_error() -> None:
    made = label_format(["good", "bad"], "please classify this text as good or bad: {{ text }}\nLabel:")
    with pytest.raises(DataError, match="row 1: the template's own text does not fit in max_length 8"):
        Encoder(tiny_tokenizer(), made, 8).examples(labelled(("a fine film", "good")))


def test_an_unknown_label_is_named_with_the_nearest() -> None:
    encoder = Encoder(tiny_tokenizer(), label_format(["good", "bad"]), LONG)
    rows = labelled(("a", "good"), ("b", "goood"))
    for read in (encoder.examples, encoder.choices):
        with pytest.raises(DataError, match=r"row 2: the label 'goood' .*good, bad \(did you mean 'good'\?\)"):
            read(rows)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="fast tokenizer"):
        Encoder(Slow(), make_format("text", []), LONG)  # type: ignore[arg-type]


def naive_common_start(sequences: list[tuple[int, ...]]) -> tuple[int, ...]:
    common: list[int] = []
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return tuple(common)


def test_the_common_start_is_what_a_plain_comparison_finds() -> None:
    draw = random.Random(3)
    lengths = set()
    for _ in range(2000):
        lead = tuple(draw.choices(range(3), k=draw.randint(0, 4)))
        sequences = [
            (*lead, *draw.choices(range(3), k=draw.randint(0, 4))) for _ in range(draw.choice([1, 2, 2, 3, 5]))
        ]
        found = common_start(sequences)
        assert found == naive_common_start(sequences)
        lengths.add(len(found))
        starts = [draw.randint(0, len(ids)) for ids in sequences]
        examples = [Example(ids, start) for ids, start in zip(sequences, starts, strict=True)]
        expected = naive_common_start([ids[:start] for ids, start in zip(sequences, starts, strict=True)])
        assert shared_text(examples) == expected
    assert len(lengths) > 4
    assert common_start([]) == shared_text([]) == ()


def test_two_labels_of_the_same_tokens_are_named() -> None:
    lowered = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    lowered.normalizer = normalizers.Lowercase()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=lowered, eos_token="<eos>")
    encoder = Encoder(tokenizer, label_format(["bad", "Good", "good"]), LONG)
    with pytest.raises(SettingsError, match=r"the labels 'Good' and 'good' have the same tokens .*; give one of them"):
        encoder.choices(labelled(("a", "bad"), ("b", "good")))


def test_a_token_without_an_embedding_is_told_with_its_row() -> None:
    grown = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str()), eos_token="<eos>"
    )
    size = len(grown)
    grown.add_tokens(["<product>", "<brand>"])
    rows = labelled(("a film", "good"), ("a <brand>", "bad"))
    for labels, text in ((["bad", "good"], "{{ text }}"), (["bad", "good", "<brand>"], "{{ text }}<product>")):
        encoder = Encoder(grown, label_format(labels, text), LONG, size)
        for read in (encoder.examples, encoder.choices):
            with pytest.raises(
                DataError, match=rf"row \d: the token '<(brand|product)>' has the id ({size}|{size + 1}),"
            ):
                read(rows)
    for form in (make_format("text", []), make_format("text", [], "{{ text }} <brand>")):
        with pytest.raises(DataError, match=r"row 2: the token '<brand>' has the id .*resize_token_embeddings"):
            Encoder(grown, form, LONG, size).examples(load_data([{"text": "a"}, {"text": "<brand>"}])[1:])
    plain = Encoder(grown, label_format(["bad", "good"]), LONG, size)
    assert plain.examples(labelled(("a", "good"), ("b", "bad")))
    assert plain.inputs([{"text": "a film"}])
    with pytest.raises(DataError, match="text 1: the token '<brand>'"):
        plain.inputs([{"text": "<brand>"}])
