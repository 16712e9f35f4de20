"""Write the reference pages from the code: `commands.md` and `settings.md`."""

from __future__ import annotations

from pathlib import Path

import click
from pydantic import BaseModel

from softprompt.cli.main import softprompt
from softprompt.config import EvaluateConfig, FormatConfig, GenerateConfig, TuneConfig

HERE = Path(__file__).parent
NOTE = "<!-- Written by docs/generate.py (make docs). Do not edit. -->\n"
_BENCHMARK = "[compared](../benchmarks/results/defaults.md)"
# Why each default is what it is; every setting has an entry.
WHY = {
    TuneConfig: {
        "dtype": "float32 on a CPU, which rounds least, and on mps; bfloat16 on a CUDA GPU, or float16 on an old one",
        "device": "a GPU where there is one",
        "quantization": "fewer bits make a model smaller, and its figures worse; take them when it does not fit",
        "device_map": "one device is fastest when the model fits on it",
        "threads": "more threads than cores wait for each other",
        "template": "short: the wording matters before training, hardly after (SST-2, " + _BENCHMARK + ")",
        "chat_template": "the virtual tokens take the place of an instruction; a chat puts tokens into every row",
        "chat_date": "the same rows give the same tokens on every day",
        "verbalizers": "a label that is a word is what the model knows best; write words for labels such as 0 and 1",
        "max_length": "longer texts cost memory with the square of their length; cut rows are counted and told",
        "method": "a soft prompt is smaller, runs everywhere (vLLM takes no deep prefix) and has words near it; a deep "
        "prefix learns more",
        "num_virtual_tokens": "from words, 20 learn nearly all that 100 do on most tasks (Lester et al. 2021, section "
        "3.2); examples and lists of labels take what they need",
        "init": "words start where the model is at home; noise learns slowly (Lester et al. 2021, section 3.2)",
        "init_text": "it names the labels, so that they are near from the first step",
        "loss": "an input is given, so predicting it would be learned for nothing; plain text is all target. Where "
        "labels are many, a soft prompt chooses better if it learns to tell them apart",
        "learning_rate": "the best or nearly so on the tasks that were [tried](../benchmarks/results/choices.md)",
        "warmup_ratio": "Adam's first steps have the size of the rate, however sure it is of the direction",
        "schedule": "small steps at the end settle what large ones found",
        "weight_decay": "virtual tokens are few; the validation rows guard against learning by heart",
        "max_grad_norm": "one odd batch must not undo what was learned",
        "batch_size": "16 labels are 16 target tokens; a text or a completion has many",
        "micro_batch_tokens": "half of the free memory, at most what makes full use of the processor",
        "gradient_checkpointing": "half as much time again for a fraction of the memory",
        "epochs": "steps say how long a run takes, whatever the number of rows",
        "max_steps": "200 for labels, 100 for texts, whose tokens all teach; quick: 30 %, thorough: 300 %",
        "max_minutes": "steps are the same everywhere, minutes are not",
        "eval_every": "often enough to find the best prompt, seldom enough to cost little",
        "save_every": "a killed run loses a minute or two",
        "patience": "the loss often stands still before it falls again; the best prompt is kept in any case",
        "train_rows": "all that there are",
        "eval_rows": "at most a fifth of the rows: the others are to be learned from; 200 take little time",
        "budget": "minutes on a CPU with a small model",
        "seed": "the same run twice gives the same prompt, on a CPU to the byte",
        "tensorboard": "`metrics.jsonl` holds the same figures",
    },
    EvaluateConfig: {
        "calibration": "a prompt is trained on plain likelihoods; handwritten templates gain where the model prefers a "
        "label whatever the text says (Zhao et al. 2021)",
    },
    GenerateConfig: {
        "max_new_tokens": "a few sentences",
        "max_length": "texts of unlike length get equally many new tokens",
        "repetition_penalty": "the model's own distribution; higher where a small model repeats itself",
        "no_repeat_ngram_size": "forbidding repetition forbids right answers too",
        "stop": "the end-of-text token ends a text",
        "num_beams": "beams take their number in time",
        "length_penalty": "the mean log-probability a token, as in transformers",
        "do_sample": "greedy decoding gives the same text every time, so that prompts can be compared",
        "temperature": "the model's own distribution",
        "top_k": "the model's own distribution; a model's sampling defaults are not used",
        "top_p": "the model's own distribution",
        "seed": "the same draws every time, in a batch of any size",
        "batch_size": "more fill the memory with keys and values, fewer leave the processor idle",
    },
}


def commands() -> str:
    """Return the help of every verb."""
    parts = ["# Commands\n", NOTE]
    with click.Context(softprompt, info_name="softprompt", **softprompt.context_settings) as top:
        parts.append(f"```text\n{softprompt.get_help(top)}\n```\n")
        for name, verb in sorted(softprompt.commands.items()):
            parts.append(_help(name, verb, top))
            if isinstance(verb, click.Group):
                with click.Context(verb, info_name=name, parent=top) as inner:
                    parts.extend(_help(f"{name} {n}", v, inner) for n, v in sorted(verb.commands.items()))
    return "\n".join(parts)


def _help(name: str, verb: click.Command, parent: click.Context) -> str:
    with click.Context(verb, info_name=verb.name, parent=parent) as context:
        return f"## softprompt {name}\n\n```text\n{verb.get_help(context)}\n```\n"


def settings() -> str:
    """Return a table of all settings."""
    parts = [
        "# Settings\n",
        NOTE,
        "The same names work with `--set NAME=VALUE` and in Python, those of tuning also in a YAML file (`--config`).\n"
        "Where the default is open, it is chosen from the data and the model; `softprompt check --verbose` shows each\n"
        "value and its origin.\n",
        "## Tuning: `TuneConfig`\n",
        _table(TuneConfig),
        "## Evaluation: `evaluate --set`, keywords of `sp.evaluate`\n",
        "Those of the model above, `dtype` to `threads`; without a prompt, which brings its own, those of the text,\n"
        "`template` to `max_length`; and\n",
        _table(EvaluateConfig, FormatConfig),
        "## Generation: `GenerateConfig`\n",
        "On the command line also those of the model above, `dtype` to `threads`.\n",
        _table(GenerateConfig),
    ]
    return "\n".join(parts)


def _table(kind: type[BaseModel], told: type[BaseModel] = BaseModel) -> str:
    lines = ["| setting | default | what it is | why so |", "|---|---|---|---|"]
    why = WHY[kind]
    fields = {name: field for name, field in kind.model_fields.items() if name not in told.model_fields}
    assert set(why) == set(fields), set(why) ^ set(fields)
    for name, field in fields.items():
        default = "open" if field.default in (None, "auto") else f"`{field.default}`"
        lines.append(f"| `{name}` | {default} | {field.description} | {why[name]} |")
    return "\n".join(lines) + "\n"


PAGES = {"commands.md": commands, "settings.md": settings}


def main() -> None:
    """Write the pages."""
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
