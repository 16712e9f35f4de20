"""What both sides do: fixed lists of commands, whose output and files are kept.

The file is also the program that runs one part on one side, with that side's `softprompt` on the path.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from behaviour_inputs import ARCHITECTURES
from behaviour_mistakes import mistakes
from behaviour_side import CUT, INPUTS, PLACE, SHORT, Side


def run_architecture(side: Side, model: str) -> None:
    """Learn labels and completions by both methods, and use what was learned, and the untouched model."""
    base = ("--model", INPUTS / model)
    for method in side.methods:
        labels = side.tune(f"{method}-labels", model, "reviews.csv", *side.method(method))
        use_labels(side, labels)
        completions = side.tune(f"{method}-completions", model, "completions.jsonl", *side.method(method))
        use_completions(side, completions)
    side.call("check", "check", INPUTS / "reviews.csv", *base, "--json", *PLACE, *CUT, *SHORT)
    template = ("--set", "template={{ text }}\\nSentiment:", *PLACE)
    side.call("evaluate none", "evaluate", "none", INPUTS / "test.csv", *base, "--json", *template)
    calibrated = ("--set", "calibration=contextual", "--predictions", "calibrated.jsonl")
    side.call("evaluate calibrated", "evaluate", "none", INPUTS / "test.csv", *base, "--json", *template, *calibrated)
    side.call("predict none", "predict", "none", INPUTS / "unlabelled.csv", *base, *PLACE, "--set", "max_new_tokens=4")
    decoding = ("--set", "max_new_tokens=8", *PLACE)
    side.call("generate none", "generate", "none", "a fine", "the parcel", *base, "--json", *decoding)
    drawn = ("--set", "do_sample=true", "--set", "temperature=0.7", "--set", "top_k=20", "--set", "seed=3")
    side.call("generate drawn", "generate", "none", "a fine", "the", *base, "--json", *decoding, *drawn)
    side.call("generate beams", "generate", "none", "a fine", "the", *base, "--json", *decoding, "--set", "num_beams=3")


def use_labels(side: Side, prompt: str) -> None:
    """Measure and use a prompt of labels."""
    run = Path(prompt).parent
    side.call(f"evaluate {run}", "evaluate", prompt, INPUTS / "test.csv", "--json", *PLACE)
    out = ("--out", run / "predicted.csv", "--probabilities", "--json")
    side.call(f"predict {run} csv", "predict", prompt, INPUTS / "unlabelled.csv", *PLACE, *out)
    side.call(f"predict {run} jsonl", "predict", prompt, INPUTS / "plain.jsonl", *PLACE)
    side.call(f"predict {run} stdin", "predict", prompt, "-", *PLACE, stdin="a fine film\nmy parcel\n")
    texts = ("a fine film", "the parcel never came", "--json", "--versus-base")
    side.call(f"generate {run} choose", "generate", prompt, *texts, *PLACE)
    writing = ("--mode", "write", "--set", "max_new_tokens=6")
    side.call(f"generate {run} write", "generate", prompt, *texts, *PLACE, *writing)


def use_completions(side: Side, prompt: str) -> None:
    """Measure and use a prompt of completions."""
    run = Path(prompt).parent
    side.call(f"evaluate {run}", "evaluate", prompt, INPUTS / "completions.jsonl[20:26]", "--json", *PLACE)
    decoding = ("--set", "max_new_tokens=8", *PLACE)
    out = ("--out", run / "predicted.jsonl", "--json")
    side.call(f"predict {run}", "predict", prompt, INPUTS / "inputs.jsonl", *decoding, *out)
    texts = ("a fine film", "good text 3", "--json", "--versus-base")
    side.call(f"generate {run}", "generate", prompt, *texts, *decoding)
    rules = ("--raw", "--set", "repetition_penalty=1.3", "--set", "no_repeat_ngram_size=2", "--set", "batch_size=1")
    side.call(f"generate {run} raw", "generate", prompt, *texts, *decoding, *rules)


def run_settings(side: Side) -> None:
    """Learn with one setting after another set to something else."""
    for name, data, settings in (
        ("random", "reviews.csv", ("init=random", "seed=5", "weight_decay=0.1", "max_grad_norm=0.1")),
        ("vocabulary", "reviews.csv", ("init=vocabulary", "loss=labels", "schedule=constant", "warmup_ratio=0.5")),
        ("text", "reviews.csv", ("init=text", "init_text=label this text", "loss=all", "patience=1", "eval_every=1")),
        ("labels", "kinds.jsonl", ("init=labels", "schedule=linear", "save_every=2", "train_rows=20")),
        ("examples", "kinds.jsonl", ("init=examples", "eval_rows=0", "max_length=20")),
        ("continued", "reviews.csv", ("init=prompt:random/prompt", "learning_rate=0.1")),
        ("chat", "reviews.csv", ("chat_template=true", "template=Is it good?\\n{{ text }}")),
        ("verbalizers", "reviews.csv", ('verbalizers={"positive": "good text", "negative": "bad"}',)),
        ("half", "completions.jsonl", ("dtype=bfloat16", "epochs=0.5")),
        ("plain", "plain.jsonl", ("gradient_checkpointing=true",)),
        ("left-open", "kinds.jsonl", ("num_virtual_tokens=none", "batch_size=none", "eval_every=none")),
    ):
        side.tune(name, "llama", data, *(part for setting in settings for part in ("--set", setting)))
    for method in side.methods:
        side.tune(
            f"thorough-{method}",
            "llama",
            "reviews.csv",
            *side.method(method),
            "--budget",
            "thorough",
            "--set",
            "max_steps=40",
        )
        side.tune(f"many-{method}", "mistral", "kinds.jsonl", *side.method(method), "--set", "batch_size=8")
    use_labels(side, "verbalizers/prompt")
    use_labels(side, "chat/prompt")
    side.call("evaluate plain", "evaluate", "plain/prompt", INPUTS / "plain.jsonl", "--json", *PLACE)
    side.tune(
        "from-file",
        "gpt2",
        "named.csv",
        "--config",
        str(INPUTS / "settings.yaml"),
        "--map",
        "text=review",
        "--map",
        "label=stars",
        "--eval-data",
        str(INPUTS / "named.csv[:10]"),
    )


def run_resume(side: Side) -> None:
    """Stop runs by signals, and go on: what they end with is what a run that was not stopped ends with."""
    settings = (*PLACE, *CUT, "--set", "num_virtual_tokens=5", "--set", "max_steps=60", "--set", "save_every=1")
    both = (signal.SIGTERM, signal.SIGKILL)
    for model, method, signals in (("llama", "soft", both), ("gptj", "deep", both[1:])):
        run = ("tune", INPUTS / "reviews.csv", "--model", INPUTS / model, *settings, *side.method(method), "--json")
        whole = f"{model}-whole"
        side.call(f"tune {whole}", *run, "--out", whole)
        for number in signals:
            out = f"{model}-{number.name}"
            side.stop(f"stop {out}", number, 3, *run, "--out", out)
            side.call(f"resume {out}", *run, "--out", out, "--resume", progress=False)
            side.note(f"{out} has learned what {whole} has", _same(Path(whole), Path(out)))
    run = ("tune", INPUTS / "reviews.csv", "--model", INPUTS / "llama", *settings, "--ensemble", "2", "--json")
    side.stop("stop ensemble", signal.SIGTERM, 75, *run, "--out", "ensemble")
    side.call("resume ensemble", *run, "--out", "ensemble", "--resume", progress=False)


def _same(first: Path, second: Path) -> bool:
    """Tell whether two runs have learned the same prompt, to the byte."""
    name = "prompt/adapter_model.safetensors"
    return (first / name).read_bytes() == (second / name).read_bytes()


def run_processes(side: Side) -> None:
    """Learn in two processes that share each step."""
    for method in side.methods:
        run = ("tune", INPUTS / "reviews.csv", "--model", INPUTS / "llama", *side.method(method), "--out", method)
        side.launch(f"tune {method}", 2, *run, "--json", *PLACE, *CUT, *SHORT)
        use_labels(side, f"{method}/prompt")


def run_ensemble(side: Side) -> None:
    """Learn an ensemble of each method, and use it."""
    for method in side.methods:
        prompt = side.tune(
            f"{method}", "llama", "reviews.csv", *side.method(method), "--ensemble", "2", "--name", method
        )
        use_labels(side, prompt)
        side.call(f"show {method}", "prompts", "show", method, "--json")
    use_completions(side, side.tune("completions", "bloom", "completions.jsonl", "--ensemble", "2"))


def run_verbs(side: Side) -> None:
    """Run the verbs that keep prompts, and those that say what is here."""
    side.tune("run", "llama", "reviews.csv", "--name", "kept")
    side.tune("run-deep", "llama", "reviews.csv", *side.method("deep"))
    side.call("add", "prompts", "add", "kept", "run-deep/prompt")
    side.call("list", "prompts", "list", "--json")
    for name in ("kept", "kept@1"):
        side.call(f"show {name}", "prompts", "show", name, "--json", *PLACE)
        side.call(f"evaluate {name}", "evaluate", name, INPUTS / "test.csv", "--json", *PLACE)
    side.call("export", "prompts", "export", "kept@1", "exported")
    template = ("--task", "classification", "--set", "template={{ text }}\\nLabel:", "--set", "threads=1")
    labels = ("--set", 'verbalizers={"positive": " good", "negative": " bad"}', "--model", str(INPUTS / "llama"))
    side.call("import", "prompts", "import", "foreign", "exported", *template, *labels)
    side.call("evaluate foreign", "evaluate", "foreign", INPUTS / "test.csv", "--json", *PLACE)
    side.call("remove", "prompts", "remove", "kept@1", "--yes")
    side.call("remove all", "prompts", "remove", "foreign", "--yes")
    side.call("list again", "prompts", "list", "--json")
    side.call("models", "models", "list", "--json")
    side.call("doctor", "doctor", "--json")
    where = ("--out", "predicted.parquet", "--json")
    side.call("predict parquet", "predict", "run/prompt", INPUTS / "unlabelled.csv", *PLACE, *where)
    side.tune("from-parquet", "llama", "rows.parquet")
    side.call("bad row", "predict", "run/prompt", INPUTS / "bad-last.jsonl", "--out", "predicted.jsonl", *PLACE)
    resumed = ("--out", "predicted.jsonl", "--resume", "--json")
    side.call("resume predict", "predict", "run/prompt", INPUTS / "good-last.jsonl", *PLACE, *resumed)
    for method in side.methods:
        options = (*side.method(method), "--ensemble", "3", "--set", "max_steps=6")
        given = ("check", INPUTS / "kinds.jsonl", "--model", INPUTS / "gptj", "--json")
        side.call(f"check {method}", *given, *PLACE, *CUT, *options)


def run_text(side: Side) -> None:
    """Run what people read: the verbs without --json."""
    where = (INPUTS / "reviews.csv", "--model", INPUTS / "llama", *PLACE, *CUT, *SHORT)
    side.call("tune", "tune", *where, "--out", "run", "--name", "kept")
    side.call("tune verbose", "tune", *where, *side.method("deep"), "--out", "run-deep", "--verbose")
    side.call("check", "check", *where)
    side.call("check verbose", "check", *where, "--verbose", "--ensemble", "2")
    side.call("evaluate", "evaluate", "kept", INPUTS / "test.csv", *PLACE)
    side.call("predict", "predict", "kept", INPUTS / "unlabelled.csv", "--out", "predicted.csv", *PLACE)
    side.call("generate", "generate", "kept", "a fine film", "the parcel", "--versus-base", *PLACE)
    side.call("list", "prompts", "list")
    side.call("show", "prompts", "show", "kept", *PLACE)
    side.call("models", "models", "list")
    side.call("doctor", "doctor")
    side.call("version", "--version")


def run_help(side: Side) -> None:
    """Ask every command for its help."""
    side.call("softprompt", "--help")
    groups = {"prompts": ("add", "export", "import", "list", "remove", "show"), "models": ("fetch", "list")}
    verbs = ("check", "compare", "demo", "doctor", "evaluate", "generate", "models", "predict", "prompts", "tune")
    for verb in verbs:
        side.call(verb, verb, "--help")
        for second in groups.get(verb, ()):
            side.call(f"{verb} {second}", verb, second, "--help")


def run_compare(side: Side) -> None:
    """Compare cheap methods, all with the same number of examples."""
    alike = ("--equal", "examples", "--set", "max_steps=6", *PLACE, *CUT)
    soft, deep = side.methods["soft"], side.methods["deep"]
    for name, model, data, methods, more in (
        ("labels", "llama", "reviews.csv", ("zero-shot", "few-shot", soft, deep, "lora"), ("--no-search",)),
        ("completions", "gptj", "completions.jsonl", ("zero-shot", soft, "full"), ("--no-search",)),
        ("searched", "llama", "reviews.csv", (soft, "lora"), ("--set", "max_steps=40")),
    ):
        where = ("compare", INPUTS / data, "--model", INPUTS / model, "--methods", ",".join(methods), "--out", name)
        options = (*where, "--seeds", "1" if name == "searched" else "2", *alike, *more)
        side.call(f"compare {name}", *options, "--json")
        for place, method in enumerate(methods):
            for result in Path(name, "results").glob(f"{method}-[0-9].json"):
                set_costs(result, place + 1)
        side.call(f"compare {name} again", *options)  # the report is written anew, with the costs that were set


def set_costs(path: Path, number: int) -> None:
    """Put fixed numbers in place of what was measured: a report draws conclusions from them."""
    result = json.loads(path.read_text(encoding="utf-8"))
    result["date"] = "2020-02-20"
    seconds = {name: number / 8 for name in result["costs"] if name.endswith("seconds")}
    result["costs"] |= {**seconds, "peak_bytes": number << 20, "stored_bytes": number << 10}
    for place, point in enumerate(result["curve"]):
        point["seconds"] = number * place / 64
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run_library(side: Side) -> None:
    """Do the same from Python, through the names that the contract has."""
    import softprompt as sp

    model = sp.load_model(str(INPUTS / "mistral"))
    rows = sp.load_data(str(INPUTS / "reviews.csv"))
    settings: dict[str, Any] = {"num_virtual_tokens": 5, "max_steps": 6, "batch_size": 4}
    settings |= {"threads": 1, "device": "cpu", "micro_batch_tokens": 96}
    found: dict[str, Any] = {}
    for short, method in side.methods.items():
        made = sp.tune(model, rows, sp.TuneConfig(method=method, **settings))
        made.prompt.save(Path(short))
        prompt = sp.load_prompt(short)
        scored = sp.evaluate(model, sp.load_data(str(INPUTS / "test.csv")), prompt=prompt)
        texts = ["a fine film", "the parcel"]
        found[short] = {
            "steps": made.steps,
            "metrics": made.metrics,
            "scores": {name: metric.value for name, metric in scored.metrics.items()},
            "texts": sp.generate(model, texts, prompt=prompt),
            "probabilities": [one.probabilities for one in sp.predict(model, texts, prompt=prompt)],
        }
    mine = sp.load_data([{"input": text, "target": text[::-1]} for text in ("some", "other", "more", "text")])
    made = sp.tune(model, mine, sp.TuneConfig(eval_rows=0, **settings))
    found["own rows"] = sp.generate(model, ["some"], prompt=made.prompt)
    Path("found.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def run_smollm2(side: Side) -> None:
    """Learn by both methods on the bundled model, from real rows where they are here."""
    data = Path(os.environ["BEHAVIOUR_DATA"]) / "sst2"
    settings = ("--set", "max_steps=4", "--set", "batch_size=4", "--set", "eval_rows=10", *PLACE)
    for method in side.methods:
        run = ("tune", f"{data}/train.jsonl[:40]", "--out", method, "--json", *settings)
        side.call(f"tune {method}", *run, *side.method(method), "--set", "micro_batch_tokens=512")
        out = ("--out", f"{method}/predicted.jsonl", "--probabilities", "--json")
        side.call(f"predict {method}", "predict", f"{method}/prompt", f"{data}/test.jsonl[:10]", *PLACE, *out)
    texts = ("a gorgeous , witty film .", "--json", "--versus-base")
    side.call("generate", "generate", "soft/prompt", *texts, *PLACE)
    side.call("models", "models", "list", "--json")


def run_mistakes(side: Side) -> None:
    """Make the mistakes that users make; what is compared is the exit code, and that nothing is printed or left."""
    side.tune("run", "llama", "reviews.csv", "--name", "kept")
    side.tune("writer", "llama", "completions.jsonl")
    for number, (name, arguments) in enumerate(mistakes()):
        side.call(name, *(f"new-{number}" if argument == "NEW" else argument for argument in arguments))


PARTS: dict[str, Callable[[Side], None]] = {
    **{name: functools.partial(run_architecture, model=name) for name in ARCHITECTURES},
    "settings": run_settings,
    "resume": run_resume,
    "processes": run_processes,
    "ensemble": run_ensemble,
    "verbs": run_verbs,
    "text": run_text,
    "help": run_help,
    "compare": run_compare,
    "library": run_library,
    "smollm2": run_smollm2,
    "mistakes": run_mistakes,
}


def main() -> None:
    """Run a part in the current folder, and write its calls."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("calls", type=Path, help="where the calls are written, as JSON")
    parser.add_argument("--new-names", action="store_true")
    given = parser.parse_args()
    found = find_spec("softprompt")
    if found is None or not str(found.origin).startswith(os.environ["PYTHONPATH"]):
        raise SystemExit(f"another softprompt is before the side's own: {found}")
    side = Side(given.new_names)
    try:
        PARTS[given.part](side)
    finally:
        given.calls.write_text(json.dumps([asdict(call) for call in side.calls], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
