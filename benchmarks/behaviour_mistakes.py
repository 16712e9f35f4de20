"""The mistakes that users make, and what is to be said of each is left open: exit codes are compared."""

from __future__ import annotations

from pathlib import Path

from behaviour_side import CUT, INPUTS, PLACE, SHORT


def mistakes() -> list[tuple[str, tuple[str | Path, ...]]]:
    """Return commands by what is wrong with them; NEW stands for a folder of each one's own."""
    reviews, test, base = INPUTS / "reviews.csv", INPUTS / "test.csv", ("--model", INPUTS / "llama")
    tune = ("tune", "--out", "NEW", *base, *PLACE, *CUT, *SHORT)
    faulty = (
        "empty.csv",
        "header.csv",
        "short.csv",
        "unclosed.csv",
        "odd.csv",
        "one-label.csv",
        "bad.jsonl",
        "table.xlsx",
        "missing.csv",
        "reviews.csv[50:60]",
        "reviews.csv[x]",
    )
    return [
        *((f"data {name}", (*tune, INPUTS / name)) for name in faulty),
        ("unknown verb", ("tun", reviews)),
        ("unknown option", (*tune, reviews, "--colour")),
        ("no out", ("tune", reviews, *base)),
        ("unknown setting", (*tune, reviews, "--set", "learning_rat=1")),
        ("no value", (*tune, reviews, "--set", "learning_rate")),
        ("wrong value", (*tune, reviews, "--set", "learning_rate=fast")),
        ("unknown method", (*tune, reviews, "--set", "method=prompting")),
        ("unknown init", (*tune, reviews, "--set", "init=zeros")),
        ("no such file", (*tune, reviews, "--config", "none.yaml")),
        ("list of settings", (*tune, reviews, "--config", INPUTS / "list.yaml")),
        ("unknown in file", (*tune, reviews, "--config", INPUTS / "unknown.yaml")),
        ("verbalizers", (*tune, reviews, "--set", "verbalizers=good")),
        ("label without verbalizer", (*tune, reviews, "--set", 'verbalizers={"positive": "good"}')),
        ("template", (*tune, reviews, "--set", "template={{ text")),
        ("column of template", (*tune, reviews, "--set", "template={{ txt }}")),
        ("map", (*tune, reviews, "--map", "text=review")),
        ("map without =", (*tune, reviews, "--map", "text")),
        ("task", (*tune, reviews, "--task", "completion")),
        ("ensemble of one", (*tune, reviews, "--ensemble", "1")),
        ("name", (*tune, reviews, "--name", "no/name")),
        ("run there", ("tune", reviews, *base, "--out", "run")),
        ("nothing to resume", (*tune, reviews, "--resume")),
        ("other rows", ("tune", test, *base, "--out", "run", "--resume")),
        ("other model", ("tune", reviews, "--model", INPUTS / "gpt2", "--out", "run", "--resume")),
        ("no model", ("tune", reviews, "--out", "NEW", "--model", "nowhere/none")),
        ("too long", (*tune, reviews, "--set", "num_virtual_tokens=300")),
        ("no prompt", ("evaluate", "unknown", test)),
        ("prompt of another model", ("evaluate", "kept", test, "--model", INPUTS / "gpt2")),
        ("template of a prompt", ("evaluate", "kept", test, "--set", "template={{ text }}")),
        ("no targets", ("evaluate", "kept", INPUTS / "plain.jsonl")),
        ("predictions", ("evaluate", "kept", test, "--predictions", "none/file.jsonl")),
        ("json without out", ("predict", "kept", test, "--json")),
        ("probabilities of texts", ("predict", "writer/prompt", INPUTS / "inputs.jsonl", "--probabilities")),
        ("kind of out", ("predict", "kept", test, "--out", "predicted.txt")),
        ("choose", ("generate", "writer/prompt", "a", "--mode", "choose")),
        ("decoding", ("generate", "kept", "a", "--set", "max_new_tokens=3")),
        ("no text", ("generate", "kept")),
        ("beams drawn", ("generate", "none", "a", *base, "--set", "num_beams=2", "--set", "do_sample=true")),
        ("no version", ("prompts", "show", "kept@9")),
        ("remove none", ("prompts", "remove", "unknown", "--yes")),
        ("add nothing", ("prompts", "add", "other", "nowhere")),
        ("unknown bundled", ("models", "fetch", "smollm")),
        ("unknown rival", ("compare", reviews, *base, "--out", "NEW", "--methods", "zero-shot,magic")),
        ("compare into a run", ("compare", reviews, *base, "--out", "run", "--methods", "zero-shot")),
    ]
