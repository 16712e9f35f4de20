"""Templates and verbalizers: what becomes text, and what is refused."""

from __future__ import annotations

import pytest

from softprompt.data.rows import Task
from softprompt.data.templates import DEFAULT_TEMPLATE, make_format
from softprompt.errors import SettingsError

LABELS = ["bad", "good"]


@pytest.mark.parametrize(
    ("task", "template", "row", "text"),
    [
        ("classification", None, {"text": "a film", "label": "good"}, "a film\nLabel:"),
        ("completion", None, {"input": "a film", "target": "x"}, "a film\n"),
        ("text", None, {"text": "a film"}, "a film"),
        ("classification", "{{ title }}: {{ text }} =", {"text": "b", "title": "a"}, "a: b ="),
        ("classification", "{% if text %}yes{% endif %} {{ text | upper }}", {"text": "b"}, "yes B"),
        ("classification", "no {# comment #}{{ text }}", {"text": "{{ label }}", "label": "x"}, "no {{ label }}"),
        ("classification", "{{ text }}", {"text": "<b> & 'q'"}, "<b> & 'q'"),
    ],
)
def test_a_row_is_put_into_the_template(task: Task, template: str | None, row: dict[str, str], text: str) -> None:
    assert make_format(task, LABELS if task == "classification" else [], template).input(row) == text


@pytest.mark.parametrize("typed", ["a ", "a  \n", "a\n\n", " a", "a\t "])
def test_plain_text_is_kept_as_it_was_typed(typed: str) -> None:
    assert make_format("text", []).input({"text": typed}) == typed
    assert make_format("text", [], "{{ text }} ").input({"text": typed}) == f"{typed} "


@pytest.mark.parametrize("task", ["classification", "completion"])
@pytest.mark.parametrize(
    ("rendered", "kept"), [("x: ", "x:"), ("x:   ", "x:"), ("x:\n", "x:\n"), ("x:\n  ", "x:\n"), ("x:\t", "x:\t")]
)
def test_spaces_before_a_target_are_dropped_and_line_breaks_are_not(task: Task, rendered: str, kept: str) -> None:
    column = "text" if task == "classification" else "input"
    made = make_format(task, LABELS if task == "classification" else [], f"{{{{ {column} }}}}")
    assert made.input({column: rendered}) == kept


@pytest.mark.parametrize(
    ("text", "whole"), [("x:", "x: good"), ("x:\n", "x:\ngood"), ("x\t", "x\tgood"), ("", "good"), ("x", "x good")]
)
def test_a_target_follows_after_a_space_or_a_line_break(text: str, whole: str) -> None:
    assert text + make_format("completion", []).joined(text, "good") == whole


def test_a_completion_is_as_the_row_gives_it_and_a_label_has_no_spaces_around_it() -> None:
    made = make_format("completion", [])
    assert made.target({"input": "a", "target": "  two words \n"}) == "  two words \n"
    labels = make_format("classification", LABELS, verbalizers={"bad": " terrible "})
    assert labels.target({"text": "a", "label": "bad"}) == "terrible"


def test_a_label_without_a_verbalizer_stands_for_itself() -> None:
    made = make_format("classification", ["1", "3", "5"], verbalizers={"1": "bad", "5": "good"})
    assert dict(made.verbalizers) == {"1": "bad", "3": "3", "5": "good"}


def test_an_unknown_column_is_named_with_the_nearest() -> None:
    made = make_format("classification", LABELS, "{{ txt }}")
    with pytest.raises(SettingsError, match=r"the column 'txt' \(did you mean 'text'\?\); the rows have text, label"):
        made.input({"text": "a", "label": "good"})


@pytest.mark.parametrize("template", ["", "Label:", "{{ 'text' }}", "{% if true %}x{% endif %}", "{# text #}"])
@pytest.mark.parametrize("task", list(DEFAULT_TEMPLATE))
def test_a_template_without_a_column_is_refused(task: Task, template: str) -> None:
    column = "input" if task == "completion" else "text"
    with pytest.raises(SettingsError, match=rf"names no column; write one in double braces, {{{{ {column} }}}}"):
        make_format(task, LABELS if task == "classification" else [], template)


@pytest.mark.parametrize("template", ["{{ text", "{% if text %}", "{{ text | nofilter }}", "{{ text }} {% end %}"])
def test_a_broken_template_is_refused(template: str) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        make_format("text", [], template)


ATTACKS = [
    "{{ ''.__class__.__mro__ }}",
    "{{ text.__class__ }}",
    "{{ text | attr('__class__') }}",
    "{{ ''['__class__'] }}",
    "{{ text.join.__globals__ }}",
    "{{ '{0.__class__}'.format(text) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ (text | map('upper')).gi_frame }}",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_template_cannot_reach_out_of_itself(attack: str) -> None:
    with pytest.raises(SettingsError, match=r"cannot be read: line 1: .* is not allowed"):
        make_format("text", [], f"{{{{ text }}}}{attack}")


@pytest.mark.parametrize(
    "template",
    [
        "{{ text.__class__ }}",
        "{{ text.nothing }}",
        "{{ text / 2 }}",
        "{{ text }}{{ 1 / 0 }}",
        "{{ text }}{{ range(1000000) | list }}",
        "{% include 'other' %}{{ text }}",
    ],
)
def test_a_template_that_fails_on_a_row_is_the_users_error_and_told(template: str) -> None:
    with pytest.raises(SettingsError, match="template"):
        make_format("text", [], template).input({"text": "words"})


@pytest.mark.parametrize(
    ("verbalizers", "message"),
    [
        ({"godo": "fine"}, r"the label 'godo' \(did you mean 'good'\?\), which no row has"),
        ({"good": "x", "bad": " x "}, "the labels 'bad' and 'good' have the same verbalizer 'x'; each needs one"),
        ({"good": "bad"}, "the labels 'bad' and 'good' have the same verbalizer 'bad'"),
        ({"good": ""}, "verbalizer of the label 'good' is empty"),
        ({"good": "  \n"}, "verbalizer of the label 'good' is empty"),
    ],
)
def test_verbalizers_that_do_not_fit_the_labels_are_refused(verbalizers: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_format("classification", LABELS, verbalizers=verbalizers)


def test_a_column_that_a_row_lacks_can_have_a_default() -> None:
    form = make_format(
        "text", [], "{{ text }}{% if note is defined %} ({{ note }}){% endif %} {{ by | default('me') }}"
    )
    assert form.input({"text": "fine"}) == "fine me"
    assert form.input({"text": "fine", "note": "new", "by": "you"}) == "fine (new) you"
    with pytest.raises(SettingsError, match="names the column 'by'; the rows have text"):
        make_format("text", [], "{{ text }} {{ by }}").input({"text": "fine"})
