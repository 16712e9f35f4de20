"""The template language: what a template may hold, what is refused with which cure, and what a rendering may take."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from jinja2 import Environment, StrictUndefined

from softprompt import load_prompt
from softprompt.data.encoder import Encoder
from softprompt.data.rendering import MOST_BYTES, MOST_WORK, Rendering, TooMuchError
from softprompt.data.rows import load_data
from softprompt.data.template_language import MOST_NESTED, parse_template
from softprompt.data.templates import make_format
from softprompt.errors import PromptError, SettingsError
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.base_model import base_model_record
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import SoftPrompt
from tiny_runs import Command
from tiny_tokenizers import tiny_tokenizer

REFUSED = {
    "{{ 'a' * 300000000 }}": r"\* is not allowed; compute it beforehand",
    "{{ 9**(9**9) }}": r"\*\* is not allowed; compute it beforehand",
    "{{ 7 // 2 }}": "// is not allowed",
    "{{ 7 % text }}": "% is not allowed",
    "{{ -text }}": "- is not allowed",
    "{{ +1 }}": r"\+ is not allowed",
    "{{ review-text }}": r'- is not allowed; .* is written {{ row\["review text"\] }}',
    "{{ review text }}": r'got \'text\'; a column whose name .* is written {{ row\["review text"\] }}',
    '{{ "%1000000000d"|format(1) }}': r"the filter \|format is not allowed; a template may hold columns, row",
    "{{ 'a'|center(10**9) }}": r"the filter \|center is not allowed",
    "{{ text|strip }}": r"the filter \|strip is not allowed; write \|trim;",
    "{{ text|uper }}": r"the filter \|uper is not allowed \(did you mean 'upper'\?\)",
    "{{ text.strip() }}": r"the call \.strip\(\) is not allowed; write {{ text\|trim }}",
    "{{ row['a b'].upper() }}": r"the call \.upper\(\) is not allowed; write {{ row\[\"a b\"\]\|upper }}",
    "{{ text.replace('a', 'b') }}": r"write {{ text\|replace\(…\) }}",
    "{{ text.split() }}": r"the call \.split\(\) is not allowed; of what calls do, there are the filters",
    "{{ range(9) }}": r"the call range\(\) is not allowed; leave it out",
    "{{ a + b }}": r"\+ is not allowed; write the texts side by side",
    "{{ a ~ b }}": "~ is not allowed; write the texts side by side",
    "{{ row.text }}": r"the attribute \.text is not allowed; .*{{ row\[\"text\"\] }}",
    "{{ user.name }}": r"{{ row\[\"user.name\"\] }}",
    "{{ text[0] }}": r"a part of a text, text\[…\], is not allowed",
    "{{ text[1:2] }}": r"a part of a text, text\[…\], is not allowed",
    "{{ row[text] }}": r"row\[…\] without a column's name in quotes is not allowed; write {{ row\[\"column\"\] }}",
    "{{ row[0] }}": "without a column's name in quotes",
    "{{ row['a']['b'] }}": "a part of a text",
    "{% for c in text %}{{ c }}{% endfor %}": "the loop {% for %} is not allowed; write the columns",
    "{% set x = 1 %}": "{% set %} is not allowed",
    "{% set x %}a{% endset %}": "{% set %} is not allowed",
    "{% macro m() %}{% endmacro %}": "{% macro %} is not allowed",
    "{% call m() %}{% endcall %}": "{% call %} is not allowed",
    "{% filter upper %}a{% endfilter %}": r"{% filter %} is not allowed; put the filter after each column",
    "{% with a = 1 %}{% endwith %}": "{% with %} is not allowed",
    "{% block b %}{% endblock %}": "{% block %} is not allowed",
    "{% extends 'x' %}": "{% extends %} is not allowed",
    "{% include 'x' %}": "{% include %} is not allowed",
    "{% import 'x' as y %}": "{% import %} is not allowed",
    "{% from 'x' import y %}": "{% from %} is not allowed",
    "{% autoescape true %}{% endautoescape %}": "{% autoescape %} is not allowed",
    "{% if text in ['a'] %}{% endif %}": r"a list \[…\] is not allowed; compare with each by itself",
    "{% if text in ('a', 'b') %}{% endif %}": r"a tuple \(…, …\) is not allowed; compare with each",
    "{{ {'a': text} }}": r"a dictionary {…} is not allowed; choose with {% if %}",
    "{{ text is divisibleby 3 }}": "the test `is divisibleby` is not allowed; write `text is defined`",
    "{{ 'a' is defined }}": "the test `is defined` is not allowed",
    "{{ text|upper(1) }}": r"the filter \|upper takes nothing in parentheses",
    "{{ text|replace('a') }}": r"the filter \|replace takes old, new, count in parentheses",
    "{{ text|replace(*text) }}": "takes old, new, count",
    "{{ text|default(row.x) }}": r"the attribute \.x is not allowed",
    "{{ 'a' if text.x else 'b' }}": r"the attribute \.x is not allowed",
    "{{ 1e999 }}": "a number is too large",
    "{{ 99999999999999999999 }}": "a number is too large",
    "{{ " + "9" * 5000 + " }}": "a number in it is too long",
    "{{ 0x" + "f" * 5000 + " }}": "a number in it is too long",
    '{{ "\\ud800" }}': "half of a character",
    "\ud800": "half of a character",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "it nests deeper than 150",
    "{{ " + "not " * 300 + "text }}": "it nests deeper than 150",
    "{{ text" + "|trim" * 300 + " }}": "it nests deeper than 150",
    "{% if text %}" * 400 + "{% endif %}" * 400: "it nests deeper than 150",
    "x" * 10**7: "it has 10,000,010 characters; at most 200,000 are allowed",
    "line\n\n{{ text.x }}": r"line 3: the attribute \.x",
}


@pytest.mark.parametrize("template", REFUSED, ids=lambda template: template[:40])
def test_what_a_template_may_not_hold_is_refused_with_the_cure(template: str) -> None:
    with pytest.raises(SettingsError, match=REFUSED[template]) as caught:
        make_format("text", [], "{{ text }}" + template)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("template", list(REFUSED)[:2])
def test_nothing_is_computed_before_a_template_is_refused(llama: FrozenModel, tmp_path: Path, template: str) -> None:
    record = Record(base_model=base_model_record(llama))
    folder = SoftPrompt(llama.embed([1, 2]).float(), record).save(tmp_path / "prompt")
    described = json.loads((folder / "softprompt.json").read_text(encoding="utf-8"))
    (folder / "softprompt.json").write_text(json.dumps({**described, "template": "{{ text }}" + template}))
    tracemalloc.start()
    try:
        with pytest.raises(PromptError, match=r"softprompt.json cannot be used: .* is not allowed; compute it"):
            load_prompt(folder)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


ALLOWED = [
    "{{ text }} {{ title }}",
    "{{ row['text'] }}{{ row[\"title\"]|upper }}",
    "{% if text == 'a film' %}x{% elif title %}y{% else %}z{% endif %}",
    "{{ 'yes' if 'film' in text else 'no' }}{{ 'x' if text not in title else 'y' }}",
    "{{ text|upper|lower|title|trim }}|{{ '  a '|trim }}|{{ 'xax'|trim('x') }}",
    "{{ text|replace('a', 'b', 1)|replace('', '-') }}|{{ text|replace('f', '', count=0) }}",
    "{{ none_there|default('gone') }}{{ ''|default('empty', true) }}{{ ''|default('empty') }}{{ none_there|default }}",
    "{% if none_there is defined %}a{% endif %}{% if title is not undefined %}b{% endif %}",
    "{{ 1 }}{{ 1.5 }}{{ true }}{{ none }}{{ -1 }}{{ 1 < 2 < 3 }}{{ 2 >= 3 }}{{ 1 != 2 }}",
    "{{ text and title }}{{ text or title }}{{ not text }}{{ '' or title }}",
    "a {# comment #}\n  {%- if text %} b {%- endif %}\n{% raw %}{{ x }}{% endraw %}{% print title %}\n",
    "{{ größe|default('ä') }}\r\n",
    "{{ text|title }}{{ 'wo-wo (wo) [wo'|title }}",
]


@pytest.mark.parametrize("template", ALLOWED)
def test_what_is_allowed_reads_as_in_jinja(template: str) -> None:
    row = {"text": "a film", "title": "A fine Film"}
    jinja = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(template)
    rendered = "".join(piece.text for piece in parse_template(template).render(row))
    assert rendered == jinja.render(row, row=row)


def test_a_column_may_have_any_name() -> None:
    made = make_format(
        "classification", ["a", "b"], '{{ row["review text"] }} {{ row[\'it"s\'] }} {{ row["row"] }} {{ row }}'
    )
    assert made.columns == ['it"s', "review text", "row"]
    assert made.input({"review text": "fine", 'it"s': "x", "row": "y", "label": "a"}) == "fine x y y"
    with pytest.raises(SettingsError, match=r"names the column 'review txt' \(did you mean 'review text'\?\)"):
        make_format("text", [], '{{ row["review txt"] }}').input({"review text": "a"})


def test_a_column_with_any_name_is_read_and_cut(llama_folder: Path, command: Command, tmp_path: Path) -> None:
    lines = [f"a dull film {i},x {i},{'good' if i % 2 else 'bad'}" for i in range(40)]
    (tmp_path / "r.csv").write_text("\n".join(["review text,text,label", *lines]) + "\n")
    template = 'template={{ row["review text"] }}\\nLabel:'
    done = command("check", "r.csv", "--model", llama_folder, "--set", "max_steps=1", "--set", template)
    assert (done.code, "a dull film" in done.out) == (0, True)
    rows = load_data([{"review text": "the parcel never came " * 50, "text": "x", "label": "bad"}])
    made = make_format("classification", ["bad", "good"], '{{ row["review text"] }}\nLabel:')
    (example,) = Encoder(tiny_tokenizer(), made, 20).examples(rows)
    assert len(example.ids) <= 20


BOMBS = [
    "{{ text" + "|replace('', 'aaaaaaaaaa')" * 20 + " }}",
    "{{ text|replace('x', text)|replace('x', text) }}",
    "{% if text" + "|replace('', 'aaaaaaaaaa')" * 20 + " == 'a' %}{% endif %}",
    "{{ text }}" * 2000,
    "{{ text|trim('" + "ab" * 5000 + "') }}",
    "{% if text|upper == '' %}a{% endif %}" * 4000,
    "{% if 'q' in text %}a{% endif %}" * 4000,
    "{{ text|default(text|replace('', text))|replace('', text) }}",
]


@pytest.mark.parametrize("template", BOMBS, ids=range(len(BOMBS)))
def test_a_rendering_stays_within_its_bounds(template: str) -> None:
    row = {"text": "x" * 5000}
    parsed = parse_template(template)
    tracemalloc.start()
    try:
        with pytest.raises(SettingsError, match=r"fails on a row: .*(more than|go through)"):
            parsed.render(row)
        assert tracemalloc.get_traced_memory()[1] < 8 * MOST_BYTES
    finally:
        tracemalloc.stop()
    rendering = Rendering(row)
    with pytest.raises(TooMuchError):
        rendering.run(parsed.body)
    assert sum(len(piece.text) for piece in rendering.pieces) <= MOST_BYTES
    assert rendering._work <= MOST_WORK + 10_000 * len(row["text"])


def test_a_rendered_input_of_a_megabyte_is_the_longest_and_the_error_names_the_row() -> None:
    form = make_format("text", [], "{{ text }}")
    assert len(form.input({"text": "x" * MOST_BYTES})) == MOST_BYTES
    rows = load_data([{"text": "a film"}, {"text": "ä" * (MOST_BYTES // 2 + 1)}])
    with pytest.raises(SettingsError, match=r"rows, row 2: .* more than 1,000,000 bytes of text; shorten the row"):
        Encoder(tiny_tokenizer(), form, 100).examples(rows)


def test_many_alternatives_are_no_depth() -> None:
    chain = "".join(f"{{% elif text == '{i}' %}}{i}" for i in range(500))
    form = make_format("text", [], f"{{% if text == 'x' %}}x{chain}{{% endif %}}")
    assert form.input({"text": "499"}) == "499"
    either = " or ".join(f"text == '{i}'" for i in range(MOST_NESTED - 10))
    assert make_format("text", [], f"{{% if {either} %}}yes{{% endif %}}").input({"text": "3"}) == "yes"


def test_what_cannot_be_compared_is_told() -> None:
    with pytest.raises(SettingsError, match=r"fails on a row: '>' not supported"):
        make_format("text", [], "{% if text > 1 %}{% endif %}").input({"text": "a"})
    with pytest.raises(SettingsError, match=r"fails on a row: the count of \|replace must be a whole number"):
        make_format("text", [], "{{ text|replace('a', 'b', text) }}").input({"text": "a"})


@pytest.mark.parametrize("verb", ["tune", "check", "evaluate", "compare"])
def test_every_verb_refuses_a_template_with_the_cure(
    verb: str, fails: Command, llama_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    out = ["--out", "run"] if verb in ("tune", "compare") else []
    prompt = ["none"] if verb == "evaluate" else []
    done = fails(verb, *prompt, reviews, "--model", llama_folder, *out, "--set", "template={{ text.strip() }}\\nLabel:")
    assert "the call .strip() is not allowed; write {{ text|trim }}" in done.err
    assert not (tmp_path / "run").exists()
