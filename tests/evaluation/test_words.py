"""Completion metrics of every kind of text: short, without spaces, of several scripts, code, numbers."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sacrebleu import corpus_bleu
from sacrebleu.metrics.bleu import BLEU

from softprompt.evaluation.completions import Completions
from softprompt.evaluation.intervals import Metric
from softprompt.evaluation.primary_metric import compute_metric, ranking_metric

BEST = {"exact_match": 1, "bleu": 100, "chrf": 100, "rouge_l": 1}
TEXTS = {
    "a number": "42",
    "a negative number": "-3.5",
    "a letter": "B",
    "a word": "Paris",
    "a word and a full stop": "Paris.",
    "two words": "New York",
    "three words": "the parcel came",
    "a sentence": "The parcel never came, and I want my money back.",
    "punctuation": "?!",
    "a date": "12/05/2024",
    "money": "$1,234.56",
    "Chinese": "我喜欢这部电影",
    "a Chinese character": "是",
    "Japanese": "この映画が好きです。",
    "half-width kana": "ｱｲｳｴｵ",
    "Korean": "나는 이 영화를 좋아한다",
    "Thai": "ฉันชอบหนังเรื่องนี้",
    "Lao": "ຂ້ອຍມັກຮູບເງົານີ້",
    "Khmer": "ខ្ញុំចូលចិត្តភាពយន្តនេះ",
    "Burmese": "ဒီရုပ်ရှင်ကို ကြိုက်တယ်",
    "Arabic": "أحب هذا الفيلم",
    "Hebrew": "סרט טוב",
    "composed letters": "cafe\u0301 Ünal İstanbul ß",
    "two scripts": "我用 Python 写代码, v3.11",
    "an emoji": "👍",
    "emoji of several code points": "👩‍👩‍👧🏽🇩🇪 ok",
    "code": "def f(x):\n    return x[0] + 'a\\tb'  # ok",
    "code without spaces": "print(x)",
    "JSON": '{"a":[1,2],"b":null}',
    "an address": "https://example.com/a?b=c&amp;d",
    "markup that the tokenizer of BLEU drops": "<skipped>",
    "entities": "&lt;b&gt; &quot;x&quot;",
    "a hyphen at the end of a line": "well-\nknown",
    "no letters, no white space": "\u200b",
    "a repeated word": "no no no no no",
    "a long text": "word " * 300 + "end",
}


def values(outputs: list[str], references: list[list[str]]) -> dict[str, float]:
    found = Completions(outputs, references, list(range(len(outputs)))).metrics()
    return {name: metric.value for name, metric in found.items()}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_right_answer_has_the_best_figure_whatever_it_is_made_of(text: str) -> None:
    found = Completions([text] * 2, [["something else", text], [text]], [0, 1]).metrics()
    for name, best in BEST.items():
        assert found[name].value == pytest.approx(best), name
        assert (found[name].high, found[name].low) == pytest.approx((best, best)) or name == "exact_match", name


@pytest.mark.parametrize("seed", range(20))
def test_any_mixture_of_right_answers_has_the_best_figures(seed: int) -> None:
    draw = random.Random(seed)
    alphabets = ["abc", "ABC é", "0123.,-", "我喜欢电影", "かなカナー", "หนังดี ", "😀🎉", "(){}[];=+ \n\t", "&<>\"'"]
    texts = []
    for _ in range(draw.randint(1, 12)):
        letters = "".join(draw.sample(alphabets, draw.randint(1, 4)))
        text = "".join(draw.choices(letters, k=draw.randint(1, 25))).strip()
        texts.append(text or "x")
    found = values(texts, [[text] for text in texts])
    assert found == pytest.approx(BEST)


@pytest.mark.parametrize(
    ("right", "written"),
    [
        ("我喜欢这部电影", "我喜欢这部电视"),
        ("この映画が好きです", "この映画は好きです"),
        ("ฉันชอบหนังเรื่องนี้", "ฉันชอบเพลงเรื่องนี้"),
        ("ຂ້ອຍມັກຮູບເງົານີ້", "ຂ້ອຍມັກເພງນີ້"),
        ("ខ្ញុំចូលចិត្តភាពយន្តនេះ", "ខ្ញុំចូលចិត្តចម្រៀងនេះ"),
        ("ဒီရုပ်ရှင်ကိုကြိုက်တယ်", "ဒီသီချင်းကိုကြိုက်တယ်"),
        ("New York City", "New York Town"),
        ("我用 Python 写代码", "我用 Python 写文章"),
    ],
)
def test_what_is_partly_right_is_between_nothing_and_all(right: str, written: str) -> None:
    found = values([written], [[right]])
    assert found["exact_match"] == 0
    for name in ("bleu", "chrf", "rouge_l"):
        assert 0.2 * BEST[name] < found[name] < 0.98 * BEST[name], name
    assert values(["z"], [[right]]) == dict.fromkeys(BEST, 0)


def test_bleu_and_rouge_count_characters_where_no_spaces_are_written() -> None:
    right, written = ["我喜欢这部电影", "天气很好"], ["我喜欢那部电影", "天气好"]
    found = values(written, [[text] for text in right])
    assert found["bleu"] == pytest.approx(corpus_bleu(written, [right], tokenize="char").score)
    assert found["rouge_l"] == pytest.approx((2 * 6 / 14 + 2 * 3 / 7) / 2)


def test_words_of_other_scripts_stay_whole_between_characters() -> None:
    right, written = "我用 Python 写代码", "我用 Pascal 写代码"
    assert values([written], [[right]])["rouge_l"] == pytest.approx(5 / 6)


@pytest.mark.parametrize("seed", range(3))
def test_bleu_of_ordinary_text_is_sacrebleus_own(seed: int) -> None:
    """Also where some outputs are empty, short, or in another script: the right answers decide what a word is."""
    draw = random.Random(seed)
    words = ["The", "Mill,", "a", "fast-food", "restaurant", "near", "Café", "Sicilia.", "costs", "$20", "(3 of 5)"]
    right = [" ".join(draw.choices(words, k=draw.randint(5, 15))) for _ in range(40)]
    written = [" ".join(text.split()[: draw.randint(0, 15)]) for text in right]
    written[0], written[1] = "", "我喜欢 The Mill"
    assert values(written, [[text] for text in right])["bleu"] == corpus_bleu(written, [right]).score


def test_bleu_of_short_answers_is_sacrebleus_of_effective_order() -> None:
    right = ["Paris", "New York", "42", "Rio de Janeiro"]
    written = ["Paris", "York", "41", "Rio de Janeiro"]
    expected = BLEU(effective_order=True).corpus_score(written, [right]).score
    assert values(written, [[text] for text in right])["bleu"] == pytest.approx(expected)
    assert 0 < expected < 100


@pytest.mark.parametrize("right", ["42", "the parcel never came back", "我喜欢这部电影"])
def test_nothing_written_is_the_worst(right: str) -> None:
    assert values([""], [[right]]) == dict.fromkeys(BEST, 0)
    assert values(["", ""], [[right, right * 2], [right]]) == dict.fromkeys(BEST, 0)


# Which metric ranks.

SENTENCE = "the parcel never came back"
CHINESE = "我喜欢这部电影"


@pytest.mark.parametrize(
    ("right", "metric"),
    [
        (["42", "7"], "exact_match"),
        (["-3.5", "$1,234.56", "12/05/2024", "10:30"], "exact_match"),
        (["Paris", "Paris.", "“Paris”!"], "exact_match"),
        (["New York", "Rio de Janeiro"], "exact_match"),
        (["B", "(a)", "D."], "exact_match"),
        (["是", "正面", "北京"], "exact_match"),
        (["👍", "👎"], "exact_match"),
        (["print(x)", "x[0]"], "exact_match"),
        (["1 + 2 = 3"], "exact_match"),
        ([CHINESE, "天气非常好"], "chrf"),
        (["この映画が好きです"], "chrf"),
        (["ฉันชอบหนังเรื่องนี้ ฉันชอบ เพลงนี้ ด้วย มาก"], "chrf"),
        (["我 喜欢 这部 电影 很 好"], "chrf"),
        (['{"a":[1,2],"b":null}'], "chrf"),
        ([SENTENCE], "bleu"),
        (["나는 이 영화를 정말 좋아한다"], "bleu"),
        (["The sushi (寿司) was really very good"], "bleu"),
        (["def f(x):\n    return x + 1 if x else 0"], "bleu"),
        ([SENTENCE, SENTENCE, "42"], "bleu"),
        (["42", "43", SENTENCE], "exact_match"),
        ([SENTENCE, "42"], "chrf"),
        ([SENTENCE, CHINESE, "42"], "chrf"),
        ([CHINESE, CHINESE, SENTENCE], "chrf"),
    ],
)
def test_the_right_answers_say_which_metric_ranks(right: list[str], metric: str) -> None:
    assert ranking_metric("completion", right) == metric
    assert ranking_metric("completion", right[::-1]) == metric
    assert Completions([""] * len(right), [[text] for text in right], []).ranked_by == metric
    assert Completions(right, [[text] for text in right], []).ranked_by == metric  # what was written plays no part


def test_labels_and_plain_text_are_ranked_as_ever() -> None:
    assert ranking_metric("classification") == "accuracy"
    assert ranking_metric("text") == "loss"


@pytest.mark.parametrize("right", [["42", "Paris"], [CHINESE, "天气很好"], [SENTENCE, "I want my money back"]])
def test_the_statistics_add_up_to_the_ranking_metric(right: list[str]) -> None:
    for written in ([right[0], "no"], right, ["", ""]):
        found = Completions(written, [[text, "or this"] for text in right], [0, 1])
        sums = np.array(found.statistics()).sum(axis=0)
        figure: Metric = found.metrics()[found.ranked_by]
        assert compute_metric(found.ranked_by, sums) == pytest.approx(figure.value)
