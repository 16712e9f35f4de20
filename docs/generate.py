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
# The reason for each default; every setting has an entry.
WHY = {
    TuneConfig: {
        "dtype": "float32, the most exact, on a CPU and on mps; bfloat16 on a CUDA GPU, or float16 on an old one",
        "device": "a GPU if there is one",
        "quantization": "fewer bits make a model smaller and less accurate; use them if it does not fit",
        "device_map": "one device is fastest when the model fits on it",
        "threads": "more threads than cores slow each other down",
        "template": "short: the wording matters before training, and hardly afterwards (SST-2, " + _BENCHMARK + ")",
        "chat_template": "the virtual tokens replace an instruction; a chat adds tokens to every row",
        "chat_date": "the same rows give the same tokens every day",
        "verbalizers": "the model knows words best; give words for labels such as 0 and 1",
        "max_length": "memory grows with the square of the length; truncated rows are counted and reported",
        "method": "a soft prompt is smaller, runs everywhere (vLLM cannot use a prefix) and has nearest tokens; a "
        "prefix learns more",
        "num_virtual_tokens": "on most tasks, 20 that start as words learn nearly as much as 100 (Lester et al. 2021, "
        "section 3.2); examples and lists of labels need more",
        "init": "words are inputs that the model knows; noise learns slowly (Lester et al. 2021, section 3.2)",
        "init_text": "it names the labels, so that they are likely from the first step",
        "loss": "inputs are given, so predicting them is of no use; in plain text every token is a target. With "
        "many labels, a soft prompt is more accurate if it learns to distinguish them",
        "learning_rate": "the best or nearly the best on the tasks that were [tried](../benchmarks/results/choices.md)",
        "warmup_ratio": "the first steps of Adam have the size of the learning rate, however noisy the gradient is",
        "schedule": "small steps at the end refine what large ones found",
        "weight_decay": "virtual tokens are few; the validation rows detect overfitting",
        "max_grad_norm": "one unusual batch must not undo the training",
        "batch_size": "16 labels are 16 target tokens; a text or a completion has many",
        "micro_batch_tokens": "half of the free memory, and no more than the processor can use",
        "gradient_checkpointing": "50 % more time for a fraction of the memory",
        "epochs": "with steps, the time of a run does not depend on the number of rows",
        "max_steps": "200 for labels, 100 for texts, in which every token is a target; quick: 30 %, thorough: 300 %",
        "max_minutes": "a number of steps gives the same result everywhere, a time does not",
        "eval_every": "often enough to find the best prompt, rarely enough to cost little",
        "save_every": "a killed run loses a minute or two",
        "patience": "the loss often stays the same before it falls again; the best prompt is the result in any case",
        "train_rows": "all rows",
        "eval_rows": "at most a fifth of the rows, so that enough are left to train on; 200 take little time",
        "budget": "minutes on a CPU with a small model",
        "seed": "the same run twice gives the same prompt, on a CPU to the byte",
        "tensorboard": "`metrics.jsonl` has the same figures",
    },
    EvaluateConfig: {
        "calibration": "a prompt is trained on plain likelihoods; handwritten templates gain if the model prefers a "
        "label whatever the text is (Zhao et al. 2021)",
    },
    GenerateConfig: {
        "max_new_tokens": "a few sentences",
        "max_length": "texts of different lengths get the same number of new tokens",
        "repetition_penalty": "the model's own distribution; increase it if a small model repeats itself",
        "no_repeat_ngram_size": "without repetition, some right answers are impossible",
        "stop": "the end-of-text token ends a text",
        "num_beams": "N beams take N times as long",
        "length_penalty": "the mean log-probability per token, as in transformers",
        "do_sample": "greedy decoding gives the same text every time, so that prompts can be compared",
        "temperature": "the model's own distribution",
        "top_k": "the model's own distribution; a model's sampling defaults are not used",
        "top_p": "the model's own distribution",
        "seed": "the same samples every time, whatever the batch size",
        "batch_size": "more need more memory for keys and values, fewer leave the processor idle",
    },
}


def commands() -> str:
    """Return the help of every command."""
    parts = ["# Commands\n", NOTE]
    with click.Context(softprompt, info_name="softprompt", **softprompt.context_settings) as top:
        parts.append(f"```text\n{softprompt.get_help(top)}\n```\n")
        for name, command in sorted(softprompt.commands.items()):
            parts.append(_help(name, command, top))
            if isinstance(command, click.Group):
                with click.Context(command, info_name=name, parent=top) as inner:
                    parts.extend(_help(f"{name} {n}", v, inner) for n, v in sorted(command.commands.items()))
    return "\n".join(parts)


def _help(name: str, command: click.Command, parent: click.Context) -> str:
    with click.Context(command, info_name=command.name, parent=parent) as context:
        return f"## softprompt {name}\n\n```text\n{command.get_help(context)}\n```\n"


def settings() -> str:
    """Return a table of all settings."""
    parts = [
        "# Settings\n",
        NOTE,
        "The same names work with `--set NAME=VALUE` and in Python, those of tuning also in a YAML file (`--config`).\n"
        "Where the default is open, it depends on the data and the model; `softprompt check --verbose` shows each\n"
        "value and its reason.\n",
        "## Tuning: `TuneConfig`\n",
        _table(TuneConfig),
        "## Evaluation: `evaluate --set`, keywords of `sp.evaluate`\n",
        "Those of the model above, `dtype` to `threads`; without a prompt, those of the text, `template` to\n"
        "`max_length`; and\n",
        _table(EvaluateConfig, FormatConfig),
        "## Generation: `GenerateConfig`\n",
        "On the command line also those of the model above, `dtype` to `threads`.\n",
        _table(GenerateConfig),
    ]
    return "\n".join(parts)


def _table(kind: type[BaseModel], shared: type[BaseModel] = BaseModel) -> str:
    lines = ["| setting | default | what it is | reason |", "|---|---|---|---|"]
    why = WHY[kind]
    fields = {name: field for name, field in kind.model_fields.items() if name not in shared.model_fields}
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
