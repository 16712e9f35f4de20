"""What people see: the settings that matter on one screen, one progress line, and what the demo gained."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from softprompt.cli import progress
from softprompt.cli.demo import gain
from softprompt.cli.progress import ProgressLine, TerminalCallback
from softprompt.cli.settings_tables import RESUMED, row_text, settings_screen, shortened
from softprompt.config import TuneConfig, read_settings
from softprompt.data.rows import load_data
from softprompt.evaluation.intervals import Metric
from softprompt.formatting import clock, short_metric
from softprompt.model.frozen import FrozenModel
from softprompt.training.prepare import PreparedRun
from softprompt.training.throughput import RenderedRow
from tiny_runs import SHORT, Command, prepared_run

LINES, COLUMNS = 24, 80
Made = Callable[..., tuple[PreparedRun, dict[str, str]]]


@pytest.fixture
def prepare(llama: FrozenModel, reviews: Path) -> Made:
    """Prepare a run that was given some settings."""

    def make(*assignments: str, file: Path | None = None) -> tuple[PreparedRun, dict[str, str]]:
        config, origins = read_settings(TuneConfig, file, ["num_virtual_tokens=5", *assignments])
        return prepared_run(llama, load_data(reviews), config), origins

    return make


def names(screen: object) -> list[str]:
    return [line.split("  ")[1] for line in str(screen).splitlines()[1:]]


def test_the_settings_that_matter_fit_on_a_screen(prepare: Made) -> None:
    prepared, origins = prepare()
    lines = str(settings_screen(prepared, origins, COLUMNS)).splitlines()
    assert len(lines) <= 12
    assert max(map(cell_len, lines)) <= COLUMNS
    for line in (
        "method              prompt-tuning (default)",
        "num_virtual_tokens  5 (--set)",
        "max_steps           200 (budget normal)",
    ):
        assert f"  {line}" in lines
    assert "weight_decay" not in str(lines)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("weight_decay=0.5", "weight_decay 0.5 (--set)"),
        ("seed=0", "seed 0 (--set)"),  # given, though it is the default
        ("patience=2", "patience 2 (--set)"),
        ("max_length=40", "max_length 40 (--set)"),
        ("gradient_checkpointing=true", "gradient_checkpointing True (--set)"),
        ("threads=1", "runs on cpu, float32, 1 thread (threads: --set)"),
        ("dtype=float32", "(dtype: --set)"),
        (
            'verbalizers={"positive": "good", "negative": "bad"}',
            "verbalizers {'positive': 'good', 'negative': 'bad'} (--set)",
        ),
        ("init_text=Say\\nit", "init_text 'Say\\nit' (--set)"),
        ("template= {{ text }} =", "template ' {{ text }} =' (--set)"),
        ("epochs=0.1", "max_steps 1 (0.1 epochs)"),
    ],
)
def test_a_setting_that_was_given_is_always_shown(prepare: Made, setting: str, line: str) -> None:
    prepared, origins = prepare(setting)
    screen = str(settings_screen(prepared, origins, 120))
    assert line in re.sub(" +", " ", screen)
    assert names(screen)[-1].startswith("runs on")
    for name in ("device", "dtype", "threads"):
        assert name not in names(screen), "all of them are in the last line"


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("word", ["long ", "長い", "e\u0301a\u0300 "])
def test_no_line_is_wider_than_the_terminal(prepare: Made, tmp_path: Path, width: int, word: str) -> None:
    file = tmp_path / ("settings-" * 12 + ".yaml")
    file.write_text("learning_rate: 0.01\n", encoding="utf-8")
    prepared, origins = prepare(f"init_text={word * 40}", f"template={word * 14}{{{{ text }}}}", file=file)
    lines = str(settings_screen(prepared, origins, width)).splitlines()[1:]
    indent = len("  num_virtual_tokens  ")
    assert max(map(cell_len, lines)) <= max(width, indent + 20)  # on a narrower one nothing could be read
    if width >= COLUMNS:
        assert all(line.endswith((")", "thread", "threads")) for line in lines), "every origin is there"
        assert f"'{word[:2]}" in lines[3]
        assert "{{ text }}'" in lines[3], "both ends of a template are shown"


def test_a_resumed_run_shows_what_differs_from_the_defaults(prepare: Made) -> None:
    prepared, _ = prepare("weight_decay=0.5")
    origins = dict.fromkeys(TuneConfig.model_fields, RESUMED)
    shown = names(settings_screen(prepared, origins, COLUMNS))
    assert "weight_decay" in shown
    assert not {"patience", "schedule", "verbalizers", "seed", "micro_batch_tokens"} & set(shown)


@pytest.mark.parametrize("room", [3, 4, 7, 20])
def test_the_middle_of_a_long_text_is_left_out(room: int) -> None:
    assert shortened("abc", room) == "abc"
    for text in ("abcdefghij" * 5, "長い文字列" * 9):
        short = shortened(text, room)
        assert cell_len(short) == room
        assert "…" in short
        assert short[0] in (text[0], " ")
    assert shortened("begin" + "x" * 50 + "end!", 11) == "begin…xend!"


def test_a_row_shows_both_ends_of_its_input_and_what_is_learned() -> None:
    row = RenderedRow(input="It begins " + "so " * 900 + "\nLabel:", target=" good", tokens=9, targets=1)
    text = str(row_text("row 1: ", row, COLUMNS))
    assert text.startswith("row 1: 'It begins so")
    assert text.endswith("\\nLabel:' → ' good'")
    console = Console(file=io.StringIO(), width=COLUMNS)
    console.print(row_text("row 1: ", row, COLUMNS))
    assert console.file.getvalue().count("\n") == 2  # type: ignore[attr-defined]
    assert str(row_text("row 1: ", row)).count("so ") == 900
    plain = RenderedRow(input="", target="word " * 900, tokens=9, targets=1)
    assert COLUMNS < len(str(row_text("", plain, COLUMNS))) < 2 * COLUMNS
    long = RenderedRow(input="word " * 900, target="word " * 900, tokens=9, targets=1)
    assert " → " in str(row_text("", long, COLUMNS))


class Clock:
    """A clock that a test sets forward."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


VALUES = {"accuracy": 0.5, "macro_f1": 0.4, "loss": 1.25}


def test_the_time_left_counts_steps_and_evaluations() -> None:
    time = Clock()
    line = ProgressLine(10, 0, 4, time)  # evaluated after steps 0, 4, 8 and 10
    time.now += 30
    line.evaluated(0, VALUES)
    assert line.seconds_left() is None
    time.now += 7  # the first step takes longer than the others
    line.stepped(1, 2.0)
    assert line.seconds_left() == 9 * 7 + 3 * 30
    for step in (2, 3, 4):
        time.now += 2
        line.stepped(step, 2.0)
    assert line.evaluation_follows()
    assert line.seconds_left() == 6 * 2 + 3 * 30
    time.now += 10
    line.evaluated(4, VALUES)
    assert line.seconds_left() == 6 * 2 + 2 * 20
    for step in range(5, 11):
        time.now += 2
        line.stepped(step, 2.0)
    assert line.evaluation_follows()
    line.evaluated(10, VALUES)
    assert line.seconds_left() == 0


def test_a_run_without_validation_rows_counts_steps_alone() -> None:
    time = Clock()
    line = ProgressLine(20, 10, None, time)
    for step in (11, 12):
        time.now += 3
        line.stepped(step, 1.0)
    assert line.seconds_left() == 8 * 3
    assert line.text(COLUMNS) == "step 12/20  loss 1.000  0:06 elapsed, 0:24 left"
    assert not line.evaluation_follows()


def test_the_line_fits_an_ordinary_terminal() -> None:
    time = Clock()
    line = ProgressLine(1000, 999, 10, time)
    time.now += 3000
    line.stepped(1000, 1.23456)
    line.evaluated(1000, VALUES)
    line.over = True
    assert line.text(COLUMNS) == "step 1000/1000  loss 1.235  validation accuracy 50.0%, loss 1.250  50:00 elapsed"
    line.over = False
    assert line.text(COLUMNS) == "step 1000/1000  loss 1.235  validation accuracy 50.0%  50:00 elapsed, 0:00 left"
    console = Console(file=io.StringIO(), width=30)
    console.print(line)
    assert console.file.getvalue() == "step 1000/1000  loss 1.235  v…\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("seconds", "written"), [(0, "0:00"), (59.6, "1:00"), (600, "10:00"), (3725, "1:02:05")])
def test_times_are_written_as_on_a_clock(seconds: float, written: str) -> None:
    assert clock(seconds) == written


@pytest.mark.parametrize("steps", [1, 3, 10, 11, 19, 60, 200, 1001])
@pytest.mark.parametrize("eval_every", [1, 8, 25, 5000, None])
def test_a_log_has_about_ten_lines(
    prepare: Made, capsys: pytest.CaptureFixture[str], steps: int, eval_every: int | None
) -> None:
    rows = ["eval_rows=0"] if eval_every is None else [f"eval_every={eval_every}"]
    prepared, _ = prepare(f"max_steps={steps}", *rows)
    callback = TerminalCallback(None)
    callback.begin(prepared, 0)
    if eval_every:
        callback.evaluation(0, VALUES)
    for step in range(1, steps + 1):
        callback.step(step, 1.0)
        if eval_every and (step % eval_every == 0 or step == steps):
            callback.evaluation(step, {**VALUES, "loss": float(step)})
    callback.end()
    lines = capsys.readouterr().err.splitlines()
    assert min(steps, 6) <= len(lines) <= 12
    assert lines[-1].startswith(f"step {steps}/{steps}  loss 1.000  ")
    assert len(set(lines)) == len(lines)
    for line in lines[1:]:
        assert re.fullmatch(
            r"step \d+/\d+  loss 1\.000  (validation accuracy 50\.0%, loss \S+  )?\S+ elapsed, \S+ left", line
        )
    if eval_every:  # the last line has the last evaluation
        assert f"loss {short_metric('loss', float(steps))} " in lines[-1]


def test_a_run_that_ends_early_shows_where(prepare: Made, capsys: pytest.CaptureFixture[str]) -> None:
    prepared, _ = prepare("max_steps=100", "eval_rows=0")
    callback = TerminalCallback(None)
    callback.begin(prepared, 50)
    for step in range(51, 58):
        callback.step(step, 1.0)
    callback.end()
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "resuming after step 50"
    assert [line.split()[1] for line in printed[1:]] == ["51/100", "57/100"]


def test_a_terminal_has_one_line_that_is_kept_up_to_date(prepare: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, origins = prepare("max_steps=40")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=COLUMNS, color_system=None)
    monkeypatch.setattr(progress, "err", console)
    callback = TerminalCallback(origins)
    callback.begin(prepared, 0)
    callback.evaluation(0, VALUES)
    for step in range(1, 41):
        callback.step(step, 1.0)
    callback.micro_batch_reduced(40, 512)
    callback.evaluation(40, VALUES)
    callback.end()
    # What is written after a line is wiped ("erase in line") replaces it.
    printed = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", part) for part in re.split(r"\n|\x1b\[2K", screen.getvalue())]
    lasting = [line for line in printed if line.strip() and not line.endswith(" left")]
    assert lasting[-1] == "step 40/40  loss 1.000  validation accuracy 50.0%, loss 1.250  0:00 elapsed"
    assert len(lasting) <= LINES
    assert any("memory is short; continuing with micro-batches of 512 tokens" in line for line in printed)


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(prepare: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = io.StringIO()
    monkeypatch.setattr(progress, "err", Console(file=screen, force_terminal=True, width=COLUMNS))
    prepared, _ = prepare("max_steps=3", "eval_rows=0")
    callback = TerminalCallback(None)
    callback.begin(prepared, 0)
    for step in (1, 2, 3):
        callback.step(step, 1.0)
    callback.end()
    assert [line.split()[1] for line in screen.getvalue().splitlines()] == ["1/3", "2/3", "3/3"]


def test_check_is_read_on_one_screen(command: Command, llama_folder: Path) -> None:
    rows = "".join(
        json.dumps({"text": f"a film {n} " + "so long " * 15, "label": "bg"[n % 2]}) + "\n" for n in range(40)
    )
    Path("long.jsonl").write_text(rows, encoding="utf-8")
    done = command("check", "long.jsonl", "--model", llama_folder, *SHORT)
    lines = done.out.splitlines()
    assert len(lines) <= 30
    assert max(map(cell_len, lines)) <= COLUMNS
    assert done.err.splitlines() == [f"loading {llama_folder}", "preparing 40 rows, and timing steps"]
    whole = command("check", "long.jsonl", "--model", llama_folder, *SHORT, "--verbose").out
    assert "…" in done.out
    assert " ".join(whole.split()).count("so long " * 15 + "\\nLabel:") == 3
    for name in TuneConfig.model_fields:
        assert name in whole
    assert "micro_batch_tokens" not in done.out


def test_tune_fits_on_one_screen(command: Command, llama_folder: Path, reviews: Path) -> None:
    done = command("tune", reviews, "--model", llama_folder, "--out", "run", *SHORT)
    before = done.err[: done.err.index("step 0/3")].splitlines()
    assert before[0] == f"loading {llama_folder}"
    assert "first row: 'a fine film 0\\nLabel:' → ' positive'" in before
    assert re.search(r"^32 training rows \(\d+ of them used\), 8 validation rows$", done.err, re.MULTILINE)
    assert len(before) + 1 <= LINES
    every = command("tune", reviews, "--model", llama_folder, "--out", "again", *SHORT, "-v").err
    for name in TuneConfig.model_fields:
        assert name in every


def test_the_prompts_of_an_ensemble_show_their_settings_once(
    command: Command, llama_folder: Path, reviews: Path
) -> None:
    done = command("tune", reviews, "--model", llama_folder, "--out", "run", *SHORT, "--ensemble", "3")
    assert done.err.count("Settings") == 1
    assert re.findall(r"next prompt: seed (\d)", done.err) == ["1", "2"]
    assert done.err.count("step 3/3") == 3


@pytest.mark.parametrize(
    ("tuned", "base", "sentence"),
    [
        (
            48,
            11,
            "Of 60 messages it had not seen, the model now routes 48 right instead of 11 (80.0% instead of 18.3%), "
            "after 60 steps in 95 s.",
        ),
        (
            14,
            11,
            "Of 60 messages it had not seen, the model now routes 14 right instead of 11 (23.3% instead of 18.3%), "
            "after 60 steps in 95 s; so small a difference may be chance.",
        ),
        (
            11,
            11,
            "Nothing was gained after 60 steps in 95 s: of 60 messages it had not seen, the model routes 11 right "
            "with the prompt, as many as without it (18.3%).",
        ),
        (
            9,
            11,
            "Nothing was gained after 60 steps in 95 s: of 60 messages it had not seen, the model routes 9 right "
            "with the prompt, 11 without it (15.0%, 18.3%).",
        ),
    ],
)
def test_what_was_gained_is_said_in_one_sentence(tuned: int, base: int, sentence: str) -> None:
    def metric(right: int) -> Metric:
        return Metric(value=right / 60, low=right / 60 - 0.1, high=right / 60 + 0.1)

    assert gain(60, metric(tuned), metric(base), "after 60 steps in 95 s") == sentence


@pytest.fixture
def asked(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let the demo run on a tiny model, and note what it asks `generate` for."""
    calls: list[dict[str, Any]] = []

    def generate(model: object, texts: Sequence[str], prompt: object, config: Any = None, **options: Any) -> list[str]:
        calls.append({"texts": len(texts), "tokens": config and config.max_new_tokens, **options})
        side = "tuned" if options.get("virtual_tokens", True) else "base"
        return [f"[{side}] {options.get('mode', 'choose')}\n" for _ in texts]

    monkeypatch.setattr("softprompt.model.bundled.DEFAULT_MODEL", str(llama_folder))
    monkeypatch.setattr("softprompt.generation.generate", generate)
    return calls


def test_the_demo_ends_with_what_it_gained(command: Command, asked: list[dict[str, Any]]) -> None:
    done = command("demo", *SHORT)
    assert done.code == 0, done.err
    last = " ".join(done.out.rpartition("\n\n")[2].split())
    assert re.fullmatch(r"(Of 60 messages|Nothing was gained after 3 steps) .*\.", last)
    for shown in ("[tuned] choose", "'[base] write\\n'", "'[tuned] write\\n'", "right"):
        assert shown in done.out
    assert max(map(cell_len, done.out.splitlines())) <= COLUMNS
    assert asked == [
        {"texts": 6, "tokens": None},
        {"texts": 1, "tokens": 16, "mode": "write", "virtual_tokens": False},
        {"texts": 1, "tokens": 16, "mode": "write", "virtual_tokens": True},
    ]
    assert "learning_rate" in done.err
    assert "micro_batch_tokens" not in done.err


def test_demo_json_is_one_object(command: Command, asked: list[dict[str, Any]]) -> None:
    record = command("demo", *SHORT, "--verbose", "--json").record
    assert list(record) == ["run", "seconds", "metrics", "without_prompt", "outputs", "written"]
    assert record["outputs"][0]["base"] in ("account", "billing", "delivery", "product", "returns", "technical")
    assert record["written"] == {
        "input": record["outputs"][0]["input"],
        "text": "[tuned] write\n",
        "base": "[base] write\n",
    }
    assert len(asked) == 3
