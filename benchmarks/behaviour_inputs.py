"""What both sides are given: tiny random models of several architectures, and files of rows."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

_SENTENCES = [
    "the parcel never came and I want my money back please classify this text as good or bad label sentiment",
    "positive negative delivery billing returns hello world a fine film a dull film what a waste of time",
]
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LIKE_LLAMA: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    **_IDS,
}
_LIKE_GPT2: dict[str, Any] = {"vocab_size": 400, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, **_IDS}
# The first four run packed: rotary positions, a sliding window that the rows cross, learned positions, ALiBi. GPT-J
# has an attention of its own and runs padded.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _LIKE_LLAMA,
    "mistral": {**_LIKE_LLAMA, "sliding_window": 6},
    "gpt2": _LIKE_GPT2,
    "bloom": {"vocab_size": 400, "hidden_size": 32, "n_layer": 3, "n_head": 4, **_IDS},
    "gptj": {**_LIKE_GPT2, "rotary_dim": 4},
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}<bos>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_GOOD = ("a fine film", "what a fine time", "I want this film", "good text")
_BAD = ("a dull film", "what a waste of time", "I want my money back", "the parcel never came")
_LABELS = ("positive", "negative")


def make_inputs(folder: Path) -> None:
    """Write all models and files into a folder."""
    folder.mkdir(parents=True)
    logging.disable_progress_bar()
    tokenizer = _tokenizer()
    for name in ARCHITECTURES:
        _make_model(name, folder / name, tokenizer)
    _make_rows(folder)
    _make_faulty_files(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 400 tokens; every string can be written in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    made.chat_template = _CHAT_TEMPLATE
    return made


def _make_model(name: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a random model; its weights are larger than usual, so that its answers differ from row to row."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **ARCHITECTURES[name]))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_rows(folder: Path) -> None:
    reviews = [(f"{(_GOOD, _BAD)[i % 2][i // 2 % 4]} {i}", _LABELS[i % 2]) for i in range(40)]
    _write_csv(folder / "reviews.csv", ("text", "label"), reviews)
    _write_csv(folder / "test.csv", ("text", "label"), [(f"{text} again", label) for text, label in reviews[5:17]])
    _write_csv(
        folder / "unlabelled.csv",
        ("id", "text", "prediction"),
        [(f"{i}", t, "") for i, (t, _) in enumerate(reviews[3:14])],
    )
    _write_csv(folder / "named.csv", ("review", "stars"), reviews)
    pairs = [{"input": f"{_GOOD[i % 4]} {i}", "target": f"{_BAD[(i + i // 4) % 4]}, {i}"} for i in range(60)]
    _write_jsonl(folder / "completions.jsonl", pairs)
    _write_jsonl(folder / "inputs.jsonl", [{"input": pair["input"], "more": [1, None]} for pair in pairs[2:9]])
    _write_jsonl(folder / "plain.jsonl", [{"text": text} for text, _ in reviews])
    kinds = [{"text": f"{(_GOOD + _BAD)[i % 8]} of kind {i % 12}", "label": f"kind {i % 12}"} for i in range(60)]
    _write_jsonl(folder / "kinds.jsonl", kinds)
    with contextlib.suppress(ImportError):
        from pyarrow import parquet, table

        columns = {"text": [text for text, _ in reviews], "label": [label for _, label in reviews]}
        parquet.write_table(table(columns), folder / "rows.parquet")
    (folder / "settings.yaml").write_text("max_steps: 4\nlearning_rate: 1e-2\nschedule: linear\n", encoding="utf-8")


def _make_faulty_files(folder: Path) -> None:
    texts = {
        "empty.csv": "",
        "header.csv": "text,label\n",
        "short.csv": 'text,label\n"a fine film",positive\n"a dull film"\n',
        "unclosed.csv": 'text,label\n"a fine film,positive\n',
        "odd.csv": "a,b,c\n1,2,3\n",
        "one-label.csv": "text,label\na,positive\nb,positive\nc,positive\nd,positive\n",
        "bad.jsonl": '{"text": "a fine film", "label": "positive"}\n{"text": "a dull\n',
        "bad-last.jsonl": '{"text": "a fine film"}\n{"text": "a dull film"}\n{"text": "so\n',
        "good-last.jsonl": '{"text": "a fine film"}\n{"text": "a dull film"}\n{"text": "some"}\n',
        "list.yaml": "- 1\n- 2\n",
        "unknown.yaml": "learning_rat: 1\n",
        "table.xlsx": "text\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _write_csv(path: Path, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    lines = [",".join(header), *(",".join(f'"{cell}"' for cell in row) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_jsonl(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
