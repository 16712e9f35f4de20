"""Templates and verbalizers: what becomes text, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from softprompt import load_data, load_prompt
from softprompt.comparison.methods.base import Predictor
from softprompt.data.rows import Task
from softprompt.data.templates import DEFAULT_TEMPLATE, Format, make_format, require_unseen_answer
from softprompt.errors import PromptError, SettingsError
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.base_model import base_model_record
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import SoftPrompt
from tiny_runs import Command

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
    assert text + make_format("completion", []).join_target(text, "good") == whole


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


@pytest.mark.parametrize(
    ("task", "template", "column"),
    [
        ("classification", "{{ text }}\nTeam: {{ label }}\nLabel:", "label"),
        ("classification", '{{ text }}{{ row["label"] }}', "label"),
        ("classification", "{{ text }}{% if label == 'good' %}!{% endif %}", "label"),
        ("classification", "{{ text }}{{ label|default('') }}", "label"),
        ("completion", "{{ input }}{{ target|upper }}", "target"),
        ("completion", "{{ input }}{{ 'a' if target else 'b' }}", "target"),
    ],
)
def test_a_template_that_shows_the_answer_is_refused(task: Task, template: str, column: str) -> None:
    with pytest.raises(SettingsError, match=f"shows the answer: the column '{column}' is what is to be predicted"):
        make_format(task, LABELS if task == "classification" else [], template)


def test_other_tasks_may_name_such_a_column() -> None:
    assert make_format("text", [], "{{ text }} {{ label }}").columns == ["label", "text"]
    assert make_format("completion", [], "{{ input }} {{ label }}").columns == ["input", "label"]


STARS = [{"review": "a", "stars": "Good ", "n": "1"}, {"review": "b", "stars": "bad", "n": "bad"}]


@pytest.mark.parametrize(
    ("rows", "template", "shown"),
    [
        (STARS, "{{ text }} {{ stars }}", True),
        (STARS, '{{ review }} {{ row["stars"]|lower }}', True),
        (STARS, "{{ text }} {{ n }}", False),
        (STARS, "{{ review }}", False),
        (STARS[:1], "{{ text }} {{ stars }}", False),
        ([{**row, "review": row["stars"]} for row in STARS], "{{ review }}", False),
    ],
)
def test_a_column_that_the_answer_was_mapped_from_is_found(
    rows: list[dict[str, str]], template: str, shown: bool
) -> None:
    data = load_data(rows, map={"text": "review", "label": "stars"})
    form = make_format("classification", data.labels, template)
    if not shown:
        require_unseen_answer(form, data)
        return
    with pytest.raises(SettingsError, match="shows the answer: in rows the column 'stars' is the label in every row"):
        require_unseen_answer(form, data)


@pytest.mark.parametrize("verb", ["tune", "check", "evaluate", "compare"])
@pytest.mark.parametrize(
    ("template", "mapped"),
    [
        ("{{ text }} {{ label }}\\nLabel:", []),
        ("{{ text }} {{ stars }}", ["--map", "text=text", "--map", "label=stars"]),
    ],
)
def test_every_verb_refuses_a_template_that_shows_the_answer(
    verb: str, template: str, mapped: list[str], fails: Command, llama_folder: Path, tmp_path: Path
) -> None:
    column = "stars" if mapped else "label"
    lines = [f"film {i},{'good' if i % 2 else 'bad'}" for i in range(40)]
    (tmp_path / "r.csv").write_text("\n".join([f"text,{column}", *lines]) + "\n")
    common = ["r.csv", "--model", llama_folder, *mapped, "--set", f"template={template}"]
    out = ["--out", "run"] if verb in ("tune", "compare") else []
    done = fails(verb, *(["none"] if verb == "evaluate" else []), *common, *out)
    assert "shows the answer" in done.err
    assert not (tmp_path / "run").exists()


def test_a_prompt_whose_template_shows_the_answer_is_not_loaded(llama: FrozenModel, tmp_path: Path) -> None:
    described = {"task": "classification", "template": "{{ text }} {{ label }}", "verbalizers": {"a": "a", "b": "b"}}
    record = Record(base_model=base_model_record(llama), **described)
    folder = SoftPrompt(llama.embed([1, 2]).float(), record).save(tmp_path / "prompt")
    with pytest.raises(PromptError, match=r"cannot be used: .* shows the answer"):
        load_prompt(folder)


@pytest.mark.parametrize("template", ["{{ text.strip() }}", "{{ text }} {{ label }}"])
def test_template_of_a_saved_method_is_checked_too(llama: FrozenModel, tmp_path: Path, template: str) -> None:
    form = Format("classification", template, {"a": "a", "b": "b"})
    Predictor(llama, form, 100).save(tmp_path / "task")
    with pytest.raises(SettingsError, match=r"write {{ text\|trim }}|shows the answer"):
        Predictor.read(tmp_path / "task", llama, "classification")


def test_half_a_character_in_a_verbalizer_is_refused() -> None:
    with pytest.raises(SettingsError, match="half of a character"):
        make_format("classification", LABELS, verbalizers={"bad": "\ud800"})


@pytest.mark.parametrize(
    ("text", "target", "whole", "compared"),
    [
        ("def f(a):\n", "    x = a\n    return x\n", "    x = a\n    return x\n", None),
        ("def f(a):", "\n    return a", "\n    return a", None),
        ("x\t", " good", " good", None),
        ("City:", "London", " London", "London"),
        ("City:", " London", " London", "London"),
        ("City:", "   London", " London", "London"),
        ("City:\n", "London", "London", None),
        ("", "  a", "  a", None),
    ],
)
def test_what_is_learned_is_what_is_compared(text: str, target: str, whole: str, compared: str | None) -> None:
    form = make_format("completion", [])
    assert form.join_target(text, target) == whole
    assert form.answer(text, target) == (whole if compared is None else compared)
    chat = make_format("completion", [], chat_template=True)
    assert chat.join_target(text, target) == chat.answer(text, target) == target
