"""Few-shot prompting: demonstrations before the input, and the search that chooses them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from counting import counted
from references import token_losses
from softprompt.comparison.methods import prompting
from softprompt.comparison.methods.prompting import SearchResult, Trial, choose_calibration, search_demonstrations
from softprompt.data.encoder import Encoder
from softprompt.data.rows import Row, Rows, load_data
from softprompt.data.templates import Format, make_format
from softprompt.errors import DataError, SettingsError
from softprompt.evaluation.calibration import CalibratedScorer, CalibratedScores, make_scorer, prior_matching
from softprompt.evaluation.completions import complete
from softprompt.evaluation.label_scorer import LabelScorer
from softprompt.evaluation.scores import LabelScores, add_label_bias
from softprompt.evaluation.token_scorer import TokenScorer
from softprompt.model.backends.packed import PackedBackend
from softprompt.model.frozen import FrozenModel
from softprompt.model.prefix import Prefix
from tiny_data import TEXTS
from tiny_models import as_prompt, frozen, tiny_prompt
from tiny_tokenizers import bos_tokenizer, with_chat

LABELS = ["bad", "good"]
SHOWN = ({"text": "a fine film", "label": "good"}, {"text": "what a waste", "label": "bad"})
WRITTEN = "a fine film\nLabel: good\n\nwhat a waste\nLabel: bad\n\n"
ANSWERED = ({"input": "a fine film", "target": " hello world "}, {"input": "the parcel", "target": "never came"})
WORDS = ["film", "parcel", "waste of time", "money back", "delivery", "billing", "returns", "world"]


def labels_format(demonstrations: tuple[Row, ...] = SHOWN, template: str | None = None, chat: bool = False) -> Format:
    return replace(make_format("classification", LABELS, template, chat_template=chat), demonstrations=demonstrations)


def labelled(count: int, begin: int = 0) -> Rows:
    numbers = range(begin, begin + count)
    return load_data([{"text": f"a {WORDS[i % 8]} {i}", "label": LABELS[i % 3 % 2]} for i in numbers])


# What is read.


def test_demonstrations_are_written_like_training_examples_with_blank_lines_between(llama: FrozenModel) -> None:
    rows = load_data([{"text": "a film", "label": "good"}, {"text": "money back", "label": "bad"}])
    for row, example in zip(rows, Encoder(llama.tokenizer, labels_format(), 512).examples(rows), strict=True):
        text = f"{WRITTEN}{row['text']}\nLabel:"
        assert list(example.ids) == llama.tokenizer(f"{text} {row['label']}")["input_ids"]
        assert example.start == len(llama.tokenizer(text)["input_ids"])


def test_completions_end_as_demonstrations_show_it(llama: FrozenModel) -> None:
    form = replace(make_format("completion", []), demonstrations=ANSWERED)
    rows = load_data([{"input": "a film", "target": "good"}, {"input": "money", "target": "waste of time"}])
    encoder = Encoder(llama.tokenizer, form, 512)
    text = "a fine film\n hello world\n\nthe parcel\nnever came\n\n"  # as it is given, but for its end
    for row, example in zip(rows, encoder.examples(rows), strict=True):
        assert list(example.ids) == llama.tokenizer(f"{text}{row['input']}\n{row['target']}\n\n")["input_ids"]
        assert example.start == len(llama.tokenizer(f"{text}{row['input']}\n")["input_ids"])
    # A model that has seen them goes on with a demonstration of its own: what is behind the blank line is cut off.
    written = llama.tokenizer(" good\n\nanother")["input_ids"]
    model = FrozenModel(llama.hf_model, llama.tokenizer, ScriptedBackend(llama, written), llama.source)
    rows = load_data([{"input": "a", "target": "x" * 30}])
    assert complete(model, as_prompt(None), encoder, rows).outputs == ["good"]


class ScriptedBackend(PackedBackend):
    """Writes given tokens, whatever it reads; it is its own batch of one row."""

    def __init__(self, model: FrozenModel, ids: list[int]) -> None:
        super().__init__(model.hf_model)
        self.ids, self.vocabulary_size = iter(ids), model.vocabulary_size

    def prefill(self, prefix: Prefix, texts: Sequence[Sequence[int]]) -> tuple[Tensor, list[Prefix]]:  # type: ignore[override]
        return self.step([]), [prefix] * len(texts)

    def decode(self, prefixes: Sequence[Prefix]) -> ScriptedBackend:  # type: ignore[override]
        return self

    def step(self, tokens: Sequence[int]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor([next(self.ids)]), self.vocabulary_size).float()

    def select(self, rows: Sequence[int]) -> None: ...


def test_in_a_chat_demonstrations_stand_in_the_users_message() -> None:
    tokenizer = with_chat()
    encoder = Encoder(tokenizer, labels_format(chat=True), 512)
    (example,) = encoder.examples(load_data([{"text": "a film", "label": "bad"}]))
    assert tokenizer.decode(example.ids) == f"<bos><user>{WRITTEN}a film\nLabel:\n<assistant>bad"
    assert tokenizer.decode(example.ids[example.start :]) == "bad"
    answers = Encoder(
        tokenizer, replace(make_format("completion", [], chat_template=True), demonstrations=ANSWERED), 512
    )
    (example,) = answers.examples(load_data([{"input": "a film", "target": "bad"}]))
    assert tokenizer.decode(example.ids[example.start :]) == "bad<eos>"  # an answer's end is not shown in a message


def test_a_label_that_begins_another_ends_as_demonstrations_show_it(llama: FrozenModel) -> None:
    labels = ["good", "good film"]
    shown = ({"text": "a", "label": "good"},)
    encoder = Encoder(llama.tokenizer, replace(make_format("classification", labels), demonstrations=shown), 512)
    (choices,) = encoder.choices(load_data([{"text": "b", "label": "good"}]))
    text = "a\nLabel: good\n\nb\nLabel:"
    for label, tail in zip(labels, choices.tails, strict=True):
        assert list(choices.input_ids + tail) == llama.tokenizer(f"{text} {label}\n\n")["input_ids"]


@pytest.mark.parametrize("typed", ["{{ text }}", "{% for x in y %}", "{# no #}", "{{ 1 / 0 }}", "<user>\\n"])
def test_what_looks_like_a_template_in_a_demonstration_stays_as_it_is(typed: str) -> None:
    form = labels_format(({"text": typed, "label": "good"},))
    assert form.input({"text": "a film"}) == f"{typed}\nLabel: good\n\na film\nLabel:"


def test_a_demonstration_needs_the_templates_columns() -> None:
    with pytest.raises(SettingsError, match="names the column 'title'; the rows have text, label"):
        labels_format(template="{{ title }}: {{ text }}").input({"text": "a", "title": "b"})


# What is scored.


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
@pytest.mark.parametrize("with_prompt", [True, False])
def test_labels_behind_demonstrations_are_scored_like_the_written_text(architecture: str, with_prompt: bool) -> None:
    model, rows = frozen(architecture), labelled(5)
    prompt = tiny_prompt(model) if with_prompt else None
    scores = LabelScorer(Encoder(model.tokenizer, labels_format(), 512), rows).score(model, as_prompt(prompt))
    expected = [
        [-float(token_losses(model, prompt, f"{WRITTEN}{row['text']}\nLabel:", f" {label}").sum()) for label in LABELS]
        for row in rows
    ]
    assert scores.log_likelihoods == pytest.approx(np.array(expected), abs=2e-4)  # type: ignore[attr-defined]


@pytest.mark.parametrize("bos", [False, True])
def test_of_plain_text_the_same_tokens_count_with_demonstrations_and_without(bos: bool) -> None:
    model = frozen("llama")
    model.tokenizer = bos_tokenizer() if bos else model.tokenizer
    form = make_format("text", [])
    rows = load_data([{"text": text} for text in ("a fine film", "the parcel never came", "a")])
    shown = replace(form, demonstrations=({"text": "hello world\n"}, {"text": "good"}))
    plain, behind = (
        TokenScorer(Encoder(model.tokenizer, f, 512), rows).score(model, as_prompt(None)) for f in (form, shown)
    )
    assert plain.tokens.tolist() == behind.tokens.tolist()
    for row, loss, tokens in zip(rows, behind.losses, behind.tokens, strict=True):
        ids = model.tokenizer(f"hello world\n\ngood\n\n{row['text']}", return_tensors="pt")["input_ids"]
        logits = model.hf_model(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
        each = -logits.gather(1, ids[0, 1:, None])[:, 0]
        assert loss == pytest.approx(float(each[len(each) - int(tokens) :].sum()), abs=2e-4)


@pytest.mark.parametrize("calibrated", [False, True])
def test_demonstrations_are_run_once_a_scoring(llama: FrozenModel, calibrated: bool) -> None:
    rows = labelled(30)
    encoder = Encoder(llama.tokenizer, labels_format(SHOWN * 3), 512)
    shown = len(llama.tokenizer(WRITTEN * 3)["input_ids"])
    with counted(llama) as work:
        (CalibratedScorer if calibrated else LabelScorer)(encoder, rows, 60).score(llama, as_prompt(tiny_prompt(llama)))
    prefix, common, *texts = work.passes
    assert shown > 60
    assert prefix == len(tiny_prompt(llama))
    assert shown <= common <= shown + 2
    assert len(texts) > 3
    alone = LabelScorer(Encoder(llama.tokenizer, labels_format(()), 512), rows)
    free = 40 if calibrated else 0
    assert sum(texts) <= sum(len(choice.ids) for choice in alone.choices) + free


def test_completions_are_written_behind_demonstrations(llama: FrozenModel) -> None:
    form = replace(make_format("completion", []), demonstrations=ANSWERED)
    rows = load_data([{"input": "a film", "target": "good and bad"}])
    ids = llama.tokenizer(form.input(rows[0]), return_tensors="pt")["input_ids"]
    longest = 1 + len(llama.tokenizer("good and bad")["input_ids"])
    plain = llama.hf_model.generate(input_ids=ids, max_new_tokens=longest, do_sample=False)[0, ids.shape[1] :]
    expected = llama.tokenizer.decode(plain, skip_special_tokens=True).split("\n\n")[0].strip()
    assert complete(llama, as_prompt(None), Encoder(llama.tokenizer, form, 512), rows).outputs == [expected]


# What does not fit.


def test_a_long_row_is_cut_and_demonstrations_stay_whole(llama: FrozenModel) -> None:
    shown = len(llama.tokenizer(WRITTEN)["input_ids"])
    encoder = Encoder(llama.tokenizer, labels_format(), shown + 20)
    rows = load_data([{"text": "the parcel never came " * 20, "label": "bad"}])
    for ids in (encoder.examples(rows)[0].ids, encoder.choices(rows)[0].input_ids, encoder.inputs(list(rows))[0]):
        text = llama.tokenizer.decode(ids)
        assert text.startswith(f"{WRITTEN}the parcel never")
        assert "\nLabel:" in text.removeprefix(WRITTEN)
        assert len(ids) <= shown + 20
    texts = replace(make_format("text", []), demonstrations=({"text": "hello world"},))
    (cut,) = Encoder(llama.tokenizer, texts, 12).examples(load_data([{"text": "a fine film " * 9}]))
    assert llama.tokenizer.decode(cut.ids).startswith("hello world\n\na fine film")
    assert len(cut.ids) == 12


def test_demonstrations_that_leave_no_room_are_refused(llama: FrozenModel) -> None:
    with pytest.raises(DataError, match="template's own text, after the demonstrations, does not fit in max_length 20"):
        Encoder(llama.tokenizer, labels_format(), 20).examples(labelled(1))
    texts = replace(make_format("text", []), demonstrations=({"text": "hello world"},))
    with pytest.raises(DataError, match=r"the demonstrations alone have .* max_length is 4; raise max_length, or show"):
        Encoder(llama.tokenizer, texts, 4).examples(load_data([{"text": "a fine film"}]))


# What is chosen.


def found(
    model: FrozenModel, train: Rows, validation: Rows, rows: int, seed: int = 0, **kwargs: object
) -> SearchResult:
    form = make_format(train.task, LABELS if train.task == "classification" else [])
    return search_demonstrations(model, form, train, validation, max_length=64, seed=seed, rows=rows, **kwargs)  # type: ignore[arg-type]


def told(trial: Trial) -> tuple[object, ...]:
    return trial.format.demonstrations, trial.calibration, trial.rows, trial.metrics, trial.max_length


def test_a_search_is_the_same_for_a_seed_and_another_for_another(llama: FrozenModel) -> None:
    train, validation = labelled(40), labelled(12, 100)
    first, again, other = (found(llama, train, validation, 100, seed) for seed in (3, 3, 4))
    assert [told(trial) for trial in first.trials] == [told(trial) for trial in again.trials]
    assert told(first.best) == told(again.best)
    assert [told(trial) for trial in first.trials] != [told(trial) for trial in other.trials]


@pytest.mark.parametrize("rows", [12, 23, 24, 100, 107])
def test_a_search_spends_its_rows_and_not_more(llama: FrozenModel, rows: int) -> None:
    shares: list[float] = []
    done = found(llama, labelled(40), labelled(12, 100), rows, progress=lambda _trial, share: shares.append(share))
    assert rows - 12 < done.rows <= rows
    assert done.rows == sum(trial.rows for trial in done.trials)
    assert done.best.rows == 12
    assert shares == pytest.approx([n * 12 / rows for n in range(1, len(shares) + 1)])


def test_a_round_halves_its_candidates_by_what_they_did(llama: FrozenModel) -> None:
    """A quarter of the candidates goes on to four times the rows, the best ones; the last is judged on all rows."""
    validation = labelled(192, 100)
    done = found(llama, labelled(40), validation, 4 * 192)
    assert [trial.rows for trial in done.trials] == [192] + [12] * 16 + [48] * 4 + [192]
    before, rounds = done.trials[1:17], done.trials[17:]

    def best(trials: tuple[Trial, ...], count: int) -> list[Format]:
        return [trial.format for trial in sorted(trials, key=lambda trial: trial.score, reverse=True)[:count]]

    assert [trial.format for trial in rounds[:4]] == best(before, 4)
    assert rounds[4].format == best(rounds[:4], 1)[0]
    assert done.best.score == max(trial.score for trial in done.trials if trial.rows == 192)


def test_demonstrations_are_training_rows_and_only_validation_rows_choose(
    llama: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, validation = labelled(40), labelled(50, 100)
    scored: list[Row] = []

    def recorded(encoder: Encoder, rows: Rows, at_once: int, _calibration: str) -> CalibratedScorer:
        scored.extend(rows)
        return CalibratedScorer(encoder, rows, at_once)

    monkeypatch.setattr(prompting, "make_scorer", recorded)
    done = found(llama, train, validation, 300)
    assert len(done.trials) > 6
    for trial in done.trials:
        assert all(row in list(train) for row in trial.format.demonstrations)
    assert {row["text"] for row in scored} == {row["text"] for row in validation}


def test_the_best_of_all_candidates_is_found_where_all_are_tried(llama: FrozenModel) -> None:
    """Two training rows make four candidates, and none of them a fifth; each is judged by plain transformers here."""
    train = labelled(2)
    validation = load_data([{"text": text, "label": LABELS[i % 2]} for i, text in enumerate((*TEXTS, *WORDS))])

    @torch.no_grad()
    def scores(shown: tuple[Row, ...], text: str) -> np.ndarray:
        written = "".join(f"{row['text']}\nLabel: {row['label']}\n\n" for row in shown)
        losses = [token_losses(llama, None, f"{written}{text}\nLabel:", f" {label}").sum() for label in LABELS]
        return -np.array([float(loss) for loss in losses])

    def score(made: np.ndarray) -> tuple[float, float]:
        gold = [LABELS.index(row["label"]) for row in validation]
        shares = np.exp(made) / np.exp(made).sum(axis=1, keepdims=True)
        return float((made.argmax(axis=1) == gold).mean()), float(np.log(shares[range(len(gold)), gold]).mean())

    merits = {}
    for shown in (shown for k in (0, 1, 2) for shown in itertools.permutations(train, k)):
        made = np.array([scores(shown, row["text"]) for row in validation])
        shift = np.mean([scores(shown, text) for text in ("N/A", "[MASK]", "")], axis=0)
        merits[score(made)], merits[score(made - shift)] = (shown, "none"), (shown, "contextual")
    assert len(merits) == 10
    assert max(merits) != max(merits, key=lambda score: score[1])  # accuracy comes first
    best = found(llama, train, validation, 210).best
    assert best.score == pytest.approx(max(merits), abs=1e-4)
    assert (best.format.demonstrations, best.calibration) == merits[max(merits)]
    assert best.metrics["accuracy"] == max(merits)[0]


def test_candidates_have_every_size_and_half_of_them_all_labels(llama: FrozenModel) -> None:
    train = load_data([*labelled(60), {"text": "the only one", "label": "rare"}])
    form = make_format("classification", train.labels)
    done = search_demonstrations(llama, form, train, labelled(12, 200), max_length=64, seed=0, rows=11 * 12)
    assert [trial.k for trial in done.trials] == [0, *(1, 2, 4, 8, 16) * 2]
    of_labels = [{row["label"] for row in trial.format.demonstrations} for trial in done.trials]
    assert [len(labels) for labels in of_labels[1:6]] == [1, 2, 3, 3, 3]  # balanced: also with a label of one row
    for trial in done.trials:
        shown = [row["text"] for row in trial.format.demonstrations]
        assert len(set(shown)) == len(shown)


def test_what_does_not_fit_in_the_context_is_shown_less_of(llama: FrozenModel) -> None:
    long = load_data([{"text": f"{'the parcel never came ' * n}{n}", "label": LABELS[n % 2]} for n in range(9, 40)])
    validation = labelled(4, 100)
    done = found(llama, long, validation, 80)
    assert llama.context_length == 256
    longest = max(len(e.ids) for e in Encoder(llama.tokenizer, labels_format(()), 64).examples(validation))
    sizes = [trial.k for trial in done.trials]
    assert 0 < max(sizes) < 16
    for trial in done.trials:
        shown = len(llama.tokenizer(trial.format.demonstrated)["input_ids"])
        assert shown + longest <= 256
        assert trial.max_length == min(shown + 64, 256)  # a row's own room is what it is without demonstrations
    huge = load_data([{"text": "what a waste of time " * 90, "label": label} for label in LABELS])
    assert [trial.k for trial in found(llama, huge, validation, 80).trials] == [0]


def test_of_completions_the_lowest_loss_wins(llama: FrozenModel) -> None:
    train, validation = (
        load_data([{"input": f"a {WORDS[i % 8]} {i}", "target": WORDS[i % 5]} for i in numbers])
        for numbers in (range(30), range(100, 112))
    )
    done = found(llama, train, validation, 120)
    assert done.best.metrics["loss"] == min(trial.metrics["loss"] for trial in done.trials)
    assert len({trial.metrics["loss"] for trial in done.trials}) == len(done.trials) == 10
    assert {trial.calibration for trial in done.trials} == {"none"}
    scores = make_scorer(Encoder(llama.tokenizer, done.best.format, done.best.max_length), validation).score(
        llama, as_prompt(None)
    )
    assert scores.loss() == pytest.approx(done.best.metrics["loss"], abs=1e-5)


def test_plain_texts_can_stand_before_others(llama: FrozenModel) -> None:
    texts = [load_data([{"text": f"a {WORDS[i % 8]} {i}"} for i in range(n, n + 12)]) for n in (0, 50)]
    assert {trial.k for trial in found(llama, texts[0], texts[1], 60).trials} == {0, 1, 2, 4, 8}


def test_a_search_by_time_ends_in_time(llama: FrozenModel) -> None:
    """By a clock on which a row takes a second, and a row behind demonstrations two."""
    for seconds in (0.0, 60.0, 200.0, 330.0, 600.0):
        spent: list[int] = []

        def scored(trial: Trial, _share: float, spent: list[int] = spent) -> None:
            spent.append(trial.rows * (2 if trial.k else 1))

        done = search_demonstrations(
            llama,
            labels_format(()),
            labelled(40),
            labelled(60, 100),
            max_length=64,
            seed=0,
            seconds=seconds,
            progress=scored,
            now=lambda spent=spent: sum(spent),  # type: ignore[misc]
        )
        # The first round is begun believing that all rows take a second; its last trial alone can be late, by half.
        assert done.seconds == sum(spent) <= max(seconds, 60) + 60
        assert done.best.rows == 60
        assert (done.rows == 60) == (seconds <= 60)
    assert done.seconds > 450


def test_zero_shot_decides_by_the_validation_rows_whether_to_calibrate(llama: FrozenModel) -> None:
    rows = load_data([{"text": text, "label": LABELS[0]} for text in (*TEXTS, *WORDS)])
    form = labels_format(())
    scores = CalibratedScorer(Encoder(llama.tokenizer, form, 64), rows, 1024).score(llama, as_prompt(None))
    assert isinstance(scores, CalibratedScores)
    assert scores.predicted.tolist() != scores.plain.predicted.tolist()
    for calibration, right in (("contextual", scores.predicted), ("none", scores.plain.predicted)):
        validation = load_data([{**row, "label": LABELS[i]} for row, i in zip(rows, right, strict=True)])
        done = choose_calibration(llama, form, rows, validation, max_length=64)
        assert (done.best.calibration, done.best.metrics["accuracy"]) == (calibration, 1)
        assert (done.best.k, done.rows, len(done.trials)) == (0, 14, 1)
    one = load_data([{"text": "a film"}])
    texts = choose_calibration(llama, make_format("text", []), one, one, max_length=64)
    assert (texts.best.calibration, texts.best.max_length, texts.rows, texts.trials) == ("none", 64, 0, ())


@pytest.mark.parametrize("count", [3, 12])
def test_prior_matching_is_a_third_calibration(llama: FrozenModel, count: int) -> None:
    labels = [f"team {name}" for name in "abcdefghijkl"[:count]]
    form = make_format("classification", labels)
    train = load_data([{"text": text, "label": labels[0]} for text in TEXTS])
    rows = load_data([{"text": text, "label": labels[0]} for text in (*TEXTS, *WORDS)])
    plain = LabelScorer(Encoder(llama.tokenizer, form, 64), rows, 1024).score(llama, as_prompt(None))
    assert isinstance(plain, LabelScores)
    found = prior_matching(plain, train)
    right = add_label_bias(plain, found).predicted
    validation = load_data([{**row, "label": labels[i]} for row, i in zip(rows, right, strict=True)])
    best = choose_calibration(llama, form, train, validation, max_length=64).best
    assert (best.calibration, best.metrics["accuracy"]) == ("none", 1)
    assert best.label_bias == pytest.approx(found, abs=1e-4)
