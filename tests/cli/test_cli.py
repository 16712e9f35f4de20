"""The command: what scripts read on stdout, and one message with the cure for whatever goes wrong."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from softprompt.cli.main import main, softprompt
from softprompt.cli.tables import confusion_table
from softprompt.evaluation.scores import Confusion
from softprompt.model.frozen import FrozenModel
from tiny_models import tiny_model
from tiny_runs import SHORT, Command
from tiny_tokenizers import tiny_tokenizer

WEIGHTS = "adapter_model.safetensors"


def write_rows(path: Path, good: str = "a fine film") -> Path:
    lines = [f"{good} {i},positive\na dull film {i},negative" for i in range(20)]
    path.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run_folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run that the command made, with the rows it was made from beside it; nobody may change it."""
    folder = tmp_path_factory.mktemp("cli")
    data = write_rows(folder / "reviews.csv")
    with pytest.raises(SystemExit) as exit_:
        main(["tune", str(data), "--model", str(llama_folder), "--out", str(folder / "run"), *SHORT])
    assert exit_.value.code == 0
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    yield folder / "run"
    for path, content in before.items():
        assert path.read_bytes() == content, f"a test changed {path}"


@pytest.fixture
def prompt(run_folder: Path) -> Path:
    return run_folder / "prompt"


@pytest.fixture
def data(run_folder: Path) -> Path:
    return run_folder.parent / "reviews.csv"


@pytest.fixture
def damaged(prompt: Path, tmp_path: Path) -> Path:
    """A copy of a prompt, to be damaged."""
    return Path(shutil.copytree(prompt, tmp_path / "damaged"))


def test_tune_evaluate_generate_and_check_follow_on_each_other(
    command: Command, llama_folder: Path, reviews: Path
) -> None:
    tuned = command("tune", reviews, "--model", llama_folder, "--out", "run", *SHORT)
    assert tuned.code == 0
    assert "prompt: run/prompt" in tuned.out
    assert "num_virtual_tokens" in tuned.err
    assert "step 3/3" in tuned.err
    assert {path.name for path in Path("run").iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "predictions.jsonl",
        "environment.json",
        "prompt",
        "state",
    }
    # The commands that tune names as next can be typed as they stand.
    assert f"softprompt evaluate {Path('run/prompt')} TEST_DATA" in tuned.out
    evaluated = command("evaluate", "run/prompt", reviews)
    assert evaluated.code == 0
    assert "without prompt" in evaluated.out
    assert "accuracy" in evaluated.out
    generated = command("generate", "run/prompt", "a fine film", "--versus-base")
    assert generated.code == 0
    assert "without prompt" in generated.out
    before = sorted(Path().rglob("*"))
    checked = command("check", reviews, "--model", llama_folder, "--out", "run", *SHORT)
    assert checked.code == 0
    assert "'a fine film 0\\nLabel:' → ' positive'" in checked.out
    assert "trainable parameters  160 (5 virtual tokens)" in checked.out
    assert sorted(Path().rglob("*")) == before, "check writes nothing"


def test_tune_tells_of_a_label_bias(command: Command, llama_folder: Path) -> None:
    """An untrained model takes one label for all rows, which is the frequent one or the rare one."""
    told = []
    for often, seldom in (("positive", "negative"), ("negative", "positive")):
        rows = [f"a film {i},{seldom if i % 10 == 0 else often}" for i in range(200)]
        Path(f"{often}.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
        still = ["--set", "learning_rate=1e-9"]
        tuned = command("tune", f"{often}.csv", "--model", llama_folder, "--out", often, *SHORT, *still)
        biased = bool(json.loads(Path(often, "prompt", "softprompt.json").read_text(encoding="utf-8"))["label_bias"])
        assert (", with a label bias" in tuned.out) == biased
        told.append(biased)
    assert sorted(told) == [False, True]


def test_tune_json_is_one_object_with_the_keys_that_scripts_read(
    command: Command, llama_folder: Path, reviews: Path
) -> None:
    done = command("tune", reviews, "--model", llama_folder, "--out", "run", "--json", *SHORT)
    record = done.record
    assert set(record) == {"run", "prompt", "steps", "seconds", "best_step", "metrics", "settings"}
    assert (record["run"], record["prompt"], record["steps"]) == ("run", "run/prompt", 3)
    assert set(record["metrics"]) == {"accuracy", "macro_f1", "loss"}
    assert record["settings"]["batch_size"] == 4
    assert record["settings"]["learning_rate"] == 0.03
    assert 0 <= record["best_step"] <= 3


def test_evaluate_json_is_one_object_with_the_keys_that_scripts_read(
    command: Command, prompt: Path, data: Path
) -> None:
    record = command("evaluate", prompt, data, "--json", "--predictions", "out.jsonl").record
    keys = {"task", "rows", "metrics", "without_prompt", "without_bias", "confusion", "seconds", "predictions"}
    assert set(record) == keys
    assert (record["task"], record["rows"]) == ("classification", 40)
    for metrics in (record["metrics"], record["without_prompt"]):
        assert set(metrics) == {"accuracy", "macro_f1", "loss"}
        for metric in metrics.values():
            assert set(metric) == {"value", "low", "high"}
            assert metric["low"] <= metric["value"] <= metric["high"]
    predictions = [json.loads(line) for line in Path(record["predictions"]).read_text(encoding="utf-8").splitlines()]
    assert Path(record["predictions"]).samefile("out.jsonl")
    right = [row["prediction"] == row["label"] for row in predictions]
    assert record["metrics"]["accuracy"]["value"] == sum(right) / 40


def test_evaluate_of_the_base_model_has_nothing_to_compare_with(
    command: Command, llama_folder: Path, prompt: Path, data: Path
) -> None:
    base = command("evaluate", "none", data, "--model", llama_folder, "--json").record
    assert base["without_prompt"] is None
    compared = command("evaluate", prompt, data, "--json", "--predictions", "p.jsonl").record
    assert base["metrics"] == compared["without_prompt"]


def test_evaluate_of_plain_text_gives_loss_and_perplexity(command: Command, llama_folder: Path) -> None:
    Path("texts.csv").write_text("prompt,more\na fine film,x\nwhat a waste of time,y\n", encoding="utf-8")
    done = command("evaluate", "none", "texts.csv", "--map", "text=prompt", "--model", llama_folder, "--json")
    assert set(done.record["metrics"]) == {"loss", "perplexity"}
    assert done.record["task"] == "text"


def test_a_folder_is_no_file_for_predictions(fails: Command, run_folder: Path, data: Path) -> None:
    done = fails("evaluate", run_folder / "prompt", data, "--predictions", run_folder)
    assert f"--predictions {run_folder} is a folder; give a file" in done.err


def test_predictions_of_a_prompt_are_put_next_to_it(command: Command, run_folder: Path, data: Path) -> None:
    run = Path(shutil.copytree(run_folder, "copy"))
    before = (run / "predictions.jsonl").read_bytes()
    record = command("evaluate", run / "prompt", data, "--json").record
    assert Path(record["predictions"]).parent == run.resolve()
    assert (run / "predictions.jsonl").read_bytes() == before, "the run's own predictions stay"


def plain_greedy(model: FrozenModel, text: str, tokens: int, embeddings: torch.Tensor | None = None) -> str:
    """Continue a text without a cache: everything through the whole model for every token."""
    ids = list(model.tokenizer(text)["input_ids"])
    given, embed = len(ids), model.hf_model.get_input_embeddings()
    for _ in range(tokens):
        embeds = embed(torch.tensor(ids))
        embeds = embeds if embeddings is None else torch.cat([embeddings, embeds])
        token = int(model.hf_model(inputs_embeds=embeds.unsqueeze(0), use_cache=False).logits[0, -1].argmax())
        if token == model.tokenizer.eos_token_id:
            break
        ids.append(token)
    decode = model.tokenizer.decode
    return str(decode(ids))[len(decode(ids[:given])) :]


def test_generate_json_is_one_object_with_the_keys_that_scripts_read(
    command: Command, prompt: Path, llama: FrozenModel
) -> None:
    texts = ["a fine film", "what a waste", "hello world", "the parcel never came"]
    options = ["--json", "--mode", "write", "--set", "max_new_tokens=6"]
    compared = command("generate", prompt, *texts, "--versus-base", *options).record
    embeddings = load_file(prompt / WEIGHTS)["prompt_embeddings"]
    rendered = [f"{text}\nLabel:" for text in texts]
    assert compared == {
        "outputs": [
            {"input": text, "text": plain_greedy(llama, whole, 6, embeddings), "base": plain_greedy(llama, whole, 6)}
            for text, whole in zip(texts, rendered, strict=True)
        ]
    }
    assert any(output["base"] != output["text"] for output in compared["outputs"])
    alone = command("generate", prompt, *texts, *options).record["outputs"]
    assert alone == [{**output, "base": None} for output in compared["outputs"]]


def test_generate_without_a_prompt_is_the_base_model(command: Command, llama_folder: Path, llama: FrozenModel) -> None:
    done = command("generate", "none", "a fine film", "--model", llama_folder, "--set", "max_new_tokens=5")
    assert done.out == "a fine film" + plain_greedy(llama, "a fine film", 5) + "\n"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff", "\ufeff\ufeff"])
def test_what_other_systems_put_around_lines_is_not_text(command: Command, prompt: Path, mark: str, end: str) -> None:
    typed = command("generate", prompt, "a fine film", "b", "--json").record
    done = command("generate", prompt, "--json", stdin=f"{mark}a fine film{end}b{end}")
    assert done.record == typed
    assert "blank" not in done.err


def test_generate_reads_lines_of_stdin(command: Command, prompt: Path) -> None:
    typed = command("generate", prompt, "a fine film", "what a waste ☕", "--json").record
    assert command("generate", prompt, "--json", stdin="a fine film\nwhat a waste ☕\n").record == typed
    assert command("generate", prompt, "--json", stdin="a fine film\nwhat a waste ☕").record == typed
    blank = command("generate", prompt, "--json", stdin="a fine film\n\n  \nwhat a waste ☕\n")
    assert blank.record == typed
    assert "2 of 4 lines of stdin are blank and are left out" in blank.err


def test_raw_text_is_not_put_through_the_template(command: Command, prompt: Path) -> None:
    options = ["--json", "--mode", "write", "--set", "max_new_tokens=6"]
    rendered = command("generate", prompt, "a fine film", *options).record["outputs"][0]["text"]
    by_hand = command("generate", prompt, "a fine film\nLabel:", "--raw", *options).record["outputs"][0]["text"]
    raw = command("generate", prompt, "a fine film", "--raw", *options).record["outputs"][0]["text"]
    assert rendered == by_hand
    assert raw != rendered


def test_a_label_is_printed_alone_and_a_text_with_its_beginning(command: Command, prompt: Path) -> None:
    made = command("generate", prompt, "a fine film", "--json").record["outputs"][0]["text"]
    assert command("generate", prompt, "a fine film").out == made + "\n"
    raw = command("generate", prompt, "a fine film", "--raw", "--json").record["outputs"][0]["text"]
    assert command("generate", prompt, "a fine film", "--raw").out == f"a fine film{raw}\n"


@pytest.mark.parametrize("text", [r"a \[/b] c", r"\[x\]", "[/red]", "[red]x", "a\\", "[bold]\\[/bold]"])
def test_square_brackets_and_backslashes_are_shown_as_they_are(command: Command, llama_folder: Path, text: str) -> None:
    done = command("generate", "none", text, "hello", "--model", llama_folder, "--set", "max_new_tokens=1")
    assert done.code == 0
    assert f" {text} " in done.out


def test_a_folder_with_square_brackets_is_named_as_it_is(command: Command, llama_folder: Path, reviews: Path) -> None:
    done = command("tune", reviews, "--model", llama_folder, "--out", "run[a]", *SHORT)
    assert Path("run[a]/prompt").is_dir()
    assert "prompt: run[a]/prompt" in done.out


def test_check_json_is_one_object(command: Command, llama_folder: Path, reviews: Path) -> None:
    done = command("check", reviews, "--model", llama_folder, "--json", *SHORT)
    assert done.record["virtual_tokens"] == 5
    assert done.record["steps"] == done.record["settings"]["max_steps"] == 3
    assert done.record["eval_every"] == done.record["settings"]["eval_every"]
    assert list(Path().iterdir()) == [reviews.relative_to(Path.cwd())]


def test_check_counts_the_rows_that_a_short_run_holds_back(command: Command, llama_folder: Path) -> None:
    rows = "".join(json.dumps({"text": f"a film {n}", "label": "bg"[n % 2]}) + "\n" for n in range(300))
    Path("many.jsonl").write_text(rows)
    done = command("check", "many.jsonl", "--model", llama_folder, "-v", "--set", "max_minutes=0.00001")
    assert "268 training rows (16 of them used), 32 validation rows" in done.out
    assert re.search(r"eval_rows +│ 32 +│ what fits", done.out)


def test_check_says_how_many_steps_fit_in_the_minutes(command: Command, llama_folder: Path, reviews: Path) -> None:
    night = ["--set", "max_steps=1000000", "--set", "max_minutes=0.5"]
    done = command("check", reviews, "--model", llama_folder, *SHORT, *night, "--json")
    steps = done.record["steps"]
    assert 0 < steps == done.record["settings"]["max_steps"] < 1_000_000
    assert done.record["minutes"] <= 0.5
    alone = ["--set", "max_minutes=60", "--set", "eval_rows=0"]  # instead of the budget's 200 steps
    done = command("check", reviews, "--model", llama_folder, "--set", "num_virtual_tokens=5", *alone)
    assert "what fits in max_minutes" in done.out
    assert int(re.findall(r"min for (\d+) steps", done.out)[0]) > 200
    done = command("check", reviews, "--model", llama_folder, *SHORT, "--ensemble", "3")
    assert "3 steps with evaluations, for each of 3 prompts" in " ".join(done.out.split())


def test_check_counts_no_more_cut_rows_than_there_are(command: Command, llama_folder: Path, reviews: Path) -> None:
    done = command("check", reviews, "--model", llama_folder, "--json", *SHORT, "--set", "max_length=9")
    assert 0 < done.record["truncated"] <= 40


def test_settings_come_from_the_file_then_the_command_then_set(
    command: Command, llama_folder: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # so wide that no cell is folded
    Path("settings.yaml").write_text("seed: 5\nlearning_rate: 1e-3\nbudget: quick\nmax_steps: 9\n", encoding="utf-8")
    common = ["check", reviews, "--model", llama_folder, "--config", "settings.yaml", "--budget", "thorough"]
    shown = command(*common, "--verbose", "--set", "max_steps=2", "--set", "template={{ text }} yes: ")
    record = command(*common, "--set", "max_steps=2", "--set", "template={{ text }} yes: ", "--json").record["settings"]
    assert (record["seed"], record["learning_rate"], record["budget"]) == (5, 0.001, "thorough")
    assert (record["max_steps"], record["template"]) == (2, "{{ text }} yes: ")
    rows = {cells[1].strip(): cells for cells in (line.split("│") for line in shown.out.splitlines()) if len(cells) > 3}
    for name, origin in (
        ("seed", "settings.yaml"),
        ("budget", "command"),
        ("max_steps", "--set"),
        ("schedule", "default"),
        ("batch_size", "default of classification"),
    ):
        assert rows[name][3].strip() == origin


def test_a_setting_that_another_one_lowers_says_so(command: Command, llama_folder: Path, reviews: Path) -> None:
    shown = command("check", reviews, "--model", llama_folder, "-v", "--set", "max_steps=99", "--set", "epochs=0.1")
    (row,) = (line.split("│") for line in shown.out.splitlines() if "max_steps" in line)
    assert (row[2].strip(), row[3].strip()) == ("1", "0.1 epochs")


def test_a_map_and_a_task_say_what_the_columns_are(command: Command, llama_folder: Path) -> None:
    Path("rows.csv").write_text("q,a\n" + "".join(f"a film {i},good\n" for i in range(30)), encoding="utf-8")
    common = ["--model", llama_folder, "--json", *SHORT]
    done = command("check", "rows.csv", "--map", "input=q", "--map", "target=a", *common)
    assert done.record["rendered"][0]["input"].startswith("a film ")
    assert done.record["rendered"][0]["target"].startswith("good")
    text = command("check", "rows.csv", "--task", "text", "--map", "text=q", *common)
    assert text.record["settings"]["loss"] == "all"


def test_a_finished_run_is_resumed_to_the_same_end(
    command: Command, llama_folder: Path, run_folder: Path, data: Path
) -> None:
    shutil.copytree(run_folder, "copy")
    done = command("tune", data, "--model", llama_folder, "--out", "copy", "--resume", "--json", *SHORT)
    assert done.record["steps"] == 3
    assert Path("copy/prompt", WEIGHTS).read_bytes() == (run_folder / "prompt" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("setting", ["max_length=512", "epochs=0.5", "init=auto", "verbalizers=null", "threads=1"])
def test_a_stopped_run_goes_on_with_the_same_command(
    command: Command, llama_folder: Path, reviews: Path, setting: str
) -> None:
    same = ["tune", reviews, "--model", llama_folder, "--out", "run", "--json", *SHORT, "--set", setting]
    assert command(*same).code == 0
    again = command(*same, "--resume")
    assert again.code == 0, again.err
    assert again.record["steps"] == 3


def test_a_missing_data_file_is_named_with_the_nearest(fails: Command, llama_folder: Path, reviews: Path) -> None:
    done = fails("tune", reviews.with_name("revews.csv"), "--model", llama_folder, "--out", "run")
    assert "no such file" in done.err
    assert "did you mean 'reviews.csv'" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--map", "text=txet"], "no column 'txet' (did you mean 'text'?)"),
        (["--map", "txt=text"], "cannot map 'txt' (did you mean 'text'?)"),
        (["--map", "text"], "write NAME=COLUMN"),
        (["--map", "text="], "write NAME=COLUMN"),
        (["--task", "completion"], "completion needs a column 'input'"),
        (["--set", "learning_rte=1"], "unknown setting 'learning_rte' (did you mean 'learning_rate'?)"),
        (["--set", "learning_rate=-1"], "setting learning_rate = -1"),
        (["--set", "num_virtual_tokens=5000"], "less than or equal to 1000"),
        (["--set", f"init_text={'a ' * 2000}"], "tokens, and a prompt 1000 at most; shorten it"),
        (["--set", "learning_rate=fast"], "setting learning_rate = fast"),
        (["--set", "learning_rate=inf"], "setting learning_rate = inf"),
        (["--set", "learning_rate"], "write NAME=VALUE"),
        (["--set", "max_steps=[3"], "max_steps"),
        (["--set", "template={{ txet }}"], "names the column 'txet' (did you mean 'text'?)"),
        (["--set", "template=Label:"], "names no column"),
        (["--set", "template={{ text.nothing }}"], "template"),
        (["--set", 'verbalizers={"positiv": "x"}'], "'positiv' (did you mean 'positive'?)"),
        (["--set", "num_virtual_tokens=255"], "255 virtual tokens leave no room for text"),
        (["--set", "device=gpu"], "unknown device 'gpu'"),
        (["--config", "nowhere.yaml"], "no such settings file: nowhere.yaml"),
        (["--eval-data", "nowhere.csv"], "no such file: nowhere.csv"),
        (["--eval-data", "nowhere.csv", "--set", "eval_rows=0"], "reads no --eval-data; leave one of them out"),
        (["--model", "./nowhere"], "no such folder: ./nowhere"),
        (["--model", "nowhere.gguf"], "no such file: nowhere.gguf"),
        (["--model", "smollm2-135"], "no such model: smollm2-135"),
        (["--model", "smollm2-135"], "did you mean 'smollm2-135m'?"),
        (["--task", "sorting"], "'sorting' is not one of"),
        (["--budget", "huge"], "'huge' is not one of"),
        (["--modle", "x"], "--model"),
    ],
)
@pytest.mark.parametrize("verb", ["tune", "check"])
def test_what_is_wrong_with_a_run_is_said_in_one_message(
    fails: Command, llama_folder: Path, reviews: Path, verb: str, options: list[str], message: str
) -> None:
    done = fails(verb, reviews, "--model", llama_folder, "--out", "run", *options)
    assert message in done.err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["tune"], "Missing argument 'DATA'"),
        (["tune", "rows.csv"], "Missing option '--out'"),
        (["evaluate", "none"], "Missing argument 'DATA'"),
        (["generate"], "Missing argument 'PROMPT'"),
        (["models", "fetch", "smollm2"], "no bundled model 'smollm2' (did you mean 'smollm2-135m'?)"),
        (["--frobnicate"], "No such option"),
        (["generate", "none", "a", "--set", "max_new_tokns=1"], "did you mean 'max_new_tokens'"),
        (["generate", "none", "a", "--set", "top_p=2"], "setting top_p = 2"),
        (["generate", "none", "--json"], "no text to continue"),
        (["generate", "x" * 300], "no such prompt"),
        (["evaluate", "x" * 300, "rows.csv"], "no such prompt"),
        (["evaluate", "none", "x" * 300], "no such file"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused_before_a_model_is_loaded(
    fails: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    def never(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("no model is needed to see this")

    monkeypatch.setattr("softprompt.model.load.load_model", never)
    assert message in fails(*arguments).err


def test_a_run_does_not_overwrite_another(
    fails: Command, llama_folder: Path, run_folder: Path, data: Path, tmp_path: Path
) -> None:
    done = fails("tune", data, "--model", llama_folder, "--out", run_folder, *SHORT)
    assert "holds another run; give another folder, or --resume" in done.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    done = fails("tune", data, "--model", llama_folder, "--out", "full", *SHORT)
    assert "full exists and is not empty; give a new folder" in done.err
    done = fails("tune", data, "--model", llama_folder, "--out", "full/thesis.txt", *SHORT)
    assert "give a new folder" in done.err


def test_there_has_to_be_a_run_to_resume(fails: Command, llama_folder: Path, data: Path) -> None:
    done = fails("tune", data, "--model", llama_folder, "--out", "run", "--resume", *SHORT)
    assert "run holds no run to resume; leave --resume out to begin one" in done.err


def test_a_run_is_resumed_with_its_own_settings_only(
    fails: Command, llama_folder: Path, run_folder: Path, data: Path
) -> None:
    shutil.copytree(run_folder, "copy")
    common = ["tune", data, "--model", llama_folder, "--out", "copy", "--resume"]
    assert "begun with max_steps = 3, not 9" in fails(*common, "--set", "max_steps=9").err
    assert "begun with budget = 'normal', not 'quick'" in fails(*common, "--budget", "quick").err


def test_a_run_is_resumed_with_its_own_data_and_model_only(
    fails: Command, llama_folder: Path, run_folder: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_folder, "copy")
    other_rows = write_rows(tmp_path / "other.csv", good="good text")
    common = ["--out", "copy", "--resume", *SHORT]
    assert "training data of copy is another" in fails("tune", other_rows, "--model", llama_folder, *common).err
    assert "training data of copy is another" in fails("tune", f"{data}[:39]", "--model", llama_folder, *common).err
    done = fails("tune", data, "--eval-data", data, "--model", llama_folder, *common)
    assert "validation data of copy is another" in done.err
    model = other_model(tmp_path / "other-model")
    assert "base model of copy is another" in fails("tune", data, "--model", model, *common).err


def other_model(folder: Path, **settings: int) -> Path:
    """A model of the fixture's kind with other weights or another shape."""
    config = LlamaConfig(**{**tiny_model("llama").config.to_diff_dict(), **settings})
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [({}, "its weights differs"), ({"hidden_size": 64}, "width 32"), ({"num_hidden_layers": 2}, "its architecture")],
)
@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_a_prompt_for_another_model_is_refused(
    fails: Command, prompt: Path, data: Path, tmp_path: Path, verb: str, settings: dict[str, int], message: str
) -> None:
    model = other_model(tmp_path / "other-model", **settings)
    given = data if verb == "evaluate" else "a text"
    done = fails(verb, prompt, given, "--model", model)
    assert message in done.err
    assert "was trained on" in done.err


class Harmful:
    """What runs when its pickle is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm-done"),))


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Harmful()))


def weights(**tensors: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: save_file(tensors, folder / WEIGHTS)


def text(name: str, content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(content, encoding="utf-8")

    return write


def record(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "softprompt.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")

    return change


def short_fingerprint(folder: Path) -> None:
    path = folder / "softprompt.json"
    loaded = json.loads(path.read_text(encoding="utf-8"))
    loaded["base_model"]["fingerprint"]["embeddings"] = [0.0]
    path.write_text(json.dumps(loaded), encoding="utf-8")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (shutil.rmtree, "no such prompt"),
    "empty": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "adapter_config.json is missing"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "pickle": (pickle_only, "adapter_model.bin is a pickle, which can run code and is never read"),
    "flat": (weights(prompt_embeddings=torch.zeros(32)), "has the shape [32]; it must be [virtual tokens, width]"),
    "no tokens": (weights(prompt_embeddings=torch.zeros(0, 32)), "has the shape [0, 32]"),
    "other width": (weights(prompt_embeddings=torch.zeros(5, 16)), "width 16"),
    "nan": (weights(prompt_embeddings=torch.full((5, 32), torch.nan)), "values that are not finite"),
    "infinite": (weights(prompt_embeddings=torch.full((5, 32), torch.inf)), "values that are not finite"),
    "other key": (weights(embeddings=torch.zeros(5, 32)), "must hold one tensor 'prompt_embeddings', it holds embeddi"),
    "two keys": (weights(prompt_embeddings=torch.zeros(5, 32), more=torch.zeros(1)), "must hold one tensor"),
    "not safetensors": (text(WEIGHTS, "hello"), "cannot read"),
    "not an adapter": (text("adapter_config.json", "{"), "cannot read"),
    "a list": (text("adapter_config.json", "[]"), "must hold a JSON object"),
    "lora": (text("adapter_config.json", '{"peft_type": "LORA"}'), "holds a LORA adapter"),
    "broken record": (text("softprompt.json", "{"), "cannot read"),
    "later version": (record(format_version=99), "format version 99; this softprompt reads 1"),
    "wrong record": (record(task="sorting"), "is damaged"),
    "short fingerprint": (short_fingerprint, ""),
    "hostile template": (record(template="{{ text.__class__.__mro__ }}"), "template"),
    "broken template": (record(template="{{ text"), "cannot be read"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_a_damaged_prompt_is_named_with_what_is_wrong(
    fails: Command, damaged: Path, data: Path, llama_folder: Path, verb: str, damage: str
) -> None:
    harm, message = DAMAGES[damage]
    harm(damaged)
    done = fails(verb, damaged, data if verb == "evaluate" else "a text", "--model", llama_folder)
    assert message in done.err
    assert not Path("harm-done").exists()


def test_what_a_prompt_brings_is_not_given_again(fails: Command, prompt: Path, data: Path) -> None:
    done = fails("evaluate", prompt, data, "--set", "template={{ text }}")
    assert "the prompt brings its own template; leave --set template out" in done.err


def test_rows_for_another_task_than_the_prompts_are_refused(fails: Command, prompt: Path) -> None:
    Path("rows.csv").write_text("input,target\na,b\n", encoding="utf-8")
    assert "classification needs a column 'text'" in fails("evaluate", prompt, "rows.csv").err
    Path("rows.csv").write_text("text,label\na,neutral\n", encoding="utf-8")
    assert "the label 'neutral' is not one that was learned" in fails("evaluate", prompt, "rows.csv").err


def test_a_text_that_the_model_cannot_hold_is_refused(fails: Command, tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    done = fails("generate", "none", "the parcel never came " * 100, "--model", tmp_path / "gpt2")
    assert "256" in done.err


def test_a_folder_that_cannot_be_written_is_a_failure_of_the_work(
    fails: Command, llama_folder: Path, prompt: Path, reviews: Path
) -> None:
    # Below a file there can be no folder, not even for root.
    done = fails("tune", reviews, "--model", llama_folder, "--out", reviews / "run", *SHORT, code=1)
    assert f"cannot write {reviews / 'run'}" in done.err
    done = fails("evaluate", prompt, reviews, "--predictions", reviews / "p.jsonl")
    assert f"no such folder: {reviews}" in done.err


@pytest.mark.skipif(not Path("/sys/kernel").exists(), reason="/sys, which not even root may write in, is Linux's")
def test_a_read_only_folder_is_a_failure_of_the_work(
    fails: Command, command: Command, llama_folder: Path, prompt: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = fails("tune", reviews, "--model", llama_folder, "--out", "/sys/run", *SHORT, code=1)
    assert "cannot write /sys/run" in done.err
    assert "free some space, or choose another folder" in done.err
    failed = command("evaluate", prompt, reviews, "--predictions", "/sys/predictions.jsonl")
    assert (failed.code, "accuracy" in failed.out) == (1, True)  # the figures took minutes: they are shown all the same
    monkeypatch.setenv("SOFTPROMPT_HOME", "/sys/home")
    assert "cannot write /sys/home/prompts/film/1" in fails("prompts", "add", "film", prompt, code=1).err


def test_a_full_disk_is_a_failure_of_the_work(fails: Command, llama_folder: Path, reviews: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))  # the texts fit, 100 virtual tokens do not
    try:
        settings = ["--set", "max_steps=1", "--set", "num_virtual_tokens=100"]
        done = fails("tune", reviews, "--model", llama_folder, "--out", "run", *settings, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot write run" in done.err
    assert not Path("run/prompt").exists()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 1, "out of memory; use smaller batches (--set micro_batch_tokens=N"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 1, "out of memory"),
        (KeyboardInterrupt(), 130, "stopped; no step was done yet"),
    ],
)
def test_what_stops_the_work_has_its_exit_code(
    fails: Command,
    monkeypatch: pytest.MonkeyPatch,
    llama_folder: Path,
    reviews: Path,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def stop(*_args: object, **_kwargs: object) -> None:
        raise error

    monkeypatch.setattr("softprompt.training.tune.tune", stop)
    assert message in fails("tune", reviews, "--model", llama_folder, "--out", "run", code=code).err


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback(command: Command, place: str) -> None:
    arguments = ["check", "nowhere.csv"]
    done = command(*(["--debug", *arguments] if place == "before" else [*arguments, "--debug"]))
    assert done.code == 2
    assert "Traceback" in done.err
    assert "softprompt: no such file: nowhere.csv" in done.err.splitlines()[-1]


def verbs(group: click.Group, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, verb in group.commands.items():
        found.append((*before, name))
        if isinstance(verb, click.Group):
            found += verbs(verb, (*before, name))
    return found


@pytest.mark.parametrize("verb", [(), *verbs(softprompt)], ids=" ".join)
def test_every_verb_has_help(command: Command, verb: tuple[str, ...]) -> None:
    for option in ("--help", "-h"):
        done = command(*verb, option)
        assert (done.code, done.err) == (0, "")
        assert done.out.startswith("Usage: " + " ".join(("softprompt", *verb)))
        assert len(done.out.splitlines()) > 4


def test_help_does_not_wait_for_torch() -> None:
    program = """
import sys
from softprompt.cli.main import main
for arguments in (["--help"], ["tune", "--help"], ["--version"], ["models", "list"]):
    try:
        main(arguments)
    except SystemExit as exit_:
        assert exit_.code == 0
heavy = {"torch", "transformers", "scipy", "numpy", "datasets", "peft"} & set(sys.modules)
print("loaded:", sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_the_version_is_printed(command: Command) -> None:
    import softprompt as package

    assert command("--version").out == f"softprompt, version {package.__version__}\n"


def test_the_bundled_models_are_listed(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path / "home"))
    (model,) = command("models", "list", "--json").record["models"]
    assert (model["name"], model["license"], model["folder"]) == ("smollm2-135m", "Apache-2.0", None)
    assert "not fetched yet" in command("models", "list").out


def test_labels_are_shown_as_they_are_whatever_they_look_like() -> None:
    labels = ["[ham]", "[/b]", ":smile:"]
    console = Console(file=StringIO(), width=100)
    console.print(confusion_table(Confusion(labels=labels, counts=[[3, 0, 0], [0, 2, 1], [0, 0, 4]])))
    heading = console.file.getvalue().splitlines()[2]  # type: ignore[attr-defined]
    assert [cell.strip() for cell in heading.split("┃")[2:-1]] == labels
