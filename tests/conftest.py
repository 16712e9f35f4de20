"""Tiny random models of several architectures, and a tiny tokenizer, made on the spot."""

from __future__ import annotations

import functools
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: tests never wait for a hub
os.environ.pop("COLUMNS", None)  # readline, which pytest imports, sets it for the processes that share the tests

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from softprompt.cli.main import main
from softprompt.config import TuneConfig
from softprompt.data.rows import Rows
from softprompt.model.backends.verify import freeze
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.base_model import BaseModelRecord
from softprompt.prompt.ensemble import AnyPrompt, Ensemble
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import BasePrompt, SoftPrompt
from softprompt.training.prepare import PreparedRun, prepare_data, prepare_run

logging.set_verbosity_error()
logging.disable_progress_bar()
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
WORDS = (
    "the parcel never came and I want my money back please classify this text as good or bad label sentiment "
    "positive negative delivery billing returns hello world a fine film a dull film what a waste of time"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that run the real model: they take longest, and two processes are to end together."""
    long = {item.path for item in items if item.get_closest_marker("real")}
    items.sort(key=lambda item: item.path not in long)


# Of a run that tests wait for.
SHORT = ["--set", "max_steps=3", "--set", "batch_size=4", "--set", "num_virtual_tokens=5"]


def prepared_run(model: FrozenModel, rows: Rows, config: TuneConfig, eval_data: Rows | None = None) -> PreparedRun:
    """Prepare a single run."""
    return prepare_run(prepare_data(model, rows, config, eval_data), config)


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens, trained on one sentence; every string can be written in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LIKE_LLAMA = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    **_IDS,
}
_LIKE_GPT2 = {"vocab_size": 400, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, **_IDS}
_LIKE_NEOX = {key: value for key, value in _LIKE_LLAMA.items() if key != "num_key_value_heads"}
_WINDOW = {"sliding_window": 6}  # shorter than the texts of the tests
_EXPERTS = {"num_experts_per_tok": 2}
_LIKE_FALCON = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, **_IDS}

# Each with the way that it is expected to get.
ARCHITECTURES: dict[str, tuple[str, Callable[[], PretrainedConfig]]] = {
    "llama": ("packed", lambda: transformers.LlamaConfig(**_LIKE_LLAMA)),
    "mistral": ("packed", lambda: transformers.MistralConfig(**_LIKE_LLAMA, **_WINDOW)),
    "qwen2": ("packed", lambda: transformers.Qwen2Config(**_LIKE_LLAMA)),
    "qwen2-window": (
        "packed",
        lambda: transformers.Qwen2Config(**_LIKE_LLAMA, **_WINDOW, use_sliding_window=True, max_window_layers=2),
    ),
    "qwen3": ("packed", lambda: transformers.Qwen3Config(**_LIKE_LLAMA, head_dim=8)),
    "gemma": ("packed", lambda: transformers.GemmaConfig(**_LIKE_LLAMA, head_dim=8)),
    "gemma2": ("packed", lambda: transformers.Gemma2Config(**_LIKE_LLAMA, **_WINDOW, head_dim=8)),
    "gemma3": (
        "packed",
        lambda: transformers.Gemma3TextConfig(**_LIKE_LLAMA, **_WINDOW, head_dim=8, sliding_window_pattern=2),
    ),
    "phi": ("packed", lambda: transformers.PhiConfig(**_LIKE_LLAMA)),
    "phi3": ("packed", lambda: transformers.Phi3Config(**_LIKE_LLAMA, **_WINDOW)),
    "gpt2": ("packed", lambda: transformers.GPT2Config(**_LIKE_GPT2)),
    "opt": (
        "packed",
        lambda: transformers.OPTConfig(**_LIKE_FALCON, ffn_dim=48, max_position_embeddings=256, word_embed_proj_dim=16),
    ),
    "gpt-neox": ("packed", lambda: transformers.GPTNeoXConfig(**_LIKE_NEOX)),
    "olmo2": ("packed", lambda: transformers.Olmo2Config(**_LIKE_LLAMA)),
    "cohere": ("packed", lambda: transformers.CohereConfig(**_LIKE_LLAMA)),
    "granite": (
        "packed",
        lambda: transformers.GraniteConfig(
            **_LIKE_LLAMA,
            logits_scaling=2.0,
            attention_multiplier=0.3,
            embedding_multiplier=3.0,
            residual_multiplier=0.7,
        ),
    ),
    "smollm3": ("packed", lambda: transformers.SmolLM3Config(**_LIKE_LLAMA)),
    "gpt-oss": (
        "packed",
        lambda: transformers.GptOssConfig(**_LIKE_LLAMA, **_WINDOW, **_EXPERTS, head_dim=8, num_local_experts=4),
    ),
    "mixtral": ("packed", lambda: transformers.MixtralConfig(**_LIKE_LLAMA, **_EXPERTS, num_local_experts=4)),
    "qwen3-moe": (
        "packed",
        lambda: transformers.Qwen3MoeConfig(
            **_LIKE_LLAMA, **_EXPERTS, head_dim=8, num_experts=4, moe_intermediate_size=16
        ),
    ),
    "phimoe": (
        "packed",
        lambda: transformers.PhimoeConfig(**_LIKE_LLAMA, **_WINDOW, **_EXPERTS, num_local_experts=4),
    ),
    "bloom": ("packed", lambda: transformers.BloomConfig(vocab_size=400, hidden_size=32, n_layer=3, n_head=4, **_IDS)),
    "falcon-rotary": ("padded", lambda: transformers.FalconConfig(**_LIKE_FALCON, alibi=False)),
    "falcon-alibi": ("padded", lambda: transformers.FalconConfig(**_LIKE_FALCON, alibi=True, multi_query=False)),
    "mpt": (
        "padded",
        lambda: transformers.MptConfig(vocab_size=400, d_model=32, n_heads=4, n_layers=3, max_seq_len=256, **_IDS),
    ),
    "gptj": ("padded", lambda: transformers.GPTJConfig(**_LIKE_GPT2, rotary_dim=4)),
}


def tiny_model(architecture: str, **settings: object) -> PreTrainedModel:
    """A random model, the same each time; some of its configuration's settings may be others."""
    config = ARCHITECTURES[architecture][1]()
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    # Random weights of the usual size give nearly the same logits everywhere; larger ones tell positions apart, and let
    # no token stand between two experts, where rounding decides.
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return made.eval().requires_grad_(False)


def frozen(architecture: str) -> FrozenModel:
    return freeze(tiny_model(architecture), tiny_tokenizer(), f"tiny-{architecture}")


@pytest.fixture(scope="session")
def llama() -> FrozenModel:
    return frozen("llama")


def as_prompt(*weights: torch.Tensor | None) -> AnyPrompt:
    """Return weights as a prompt: a soft prompt or prefix, the base model for None, an ensemble for several."""
    record = Record(base_model=BaseModelRecord(id="tiny"))
    members = tuple(BasePrompt() if each is None else SoftPrompt(each, record) for each in weights)
    return members[0] if len(members) == 1 else Ensemble(members, record)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def llama_folder(llama: FrozenModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    llama.hf_model.save_pretrained(folder)
    llama.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Forty labelled rows."""
    good = ["a fine film", "what a fine time", "I want this film", "good text"]
    bad = ["a dull film", "what a waste of time", "I want my money back", "the parcel never came"]
    lines = ["text,label"]
    for i in range(20):
        lines += [f'"{good[i % 4]} {i}",positive', f'"{bad[i % 4]} {i}",negative']
    path = tmp_path / "reviews.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@dataclass
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def record(self) -> dict[str, Any]:
        """The one JSON object that stdout holds."""
        assert self.out.endswith("}\n")
        assert self.out.count("\n") == 1
        loaded = json.loads(self.out)
        assert isinstance(loaded, dict)
        return loaded


Command = Callable[..., Done]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Run `softprompt` in an empty folder and return its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert isinstance(exit_.value.code, int)
        return Done(exit_.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def fails(command: Command) -> Command:
    """Run a command that has to fail with one message: no result, no traceback."""

    def run(*arguments: object, code: int = 2, **kwargs: Any) -> Done:
        done = command(*arguments, **kwargs)
        assert (done.code, done.out) == (code, "")
        assert "Traceback" not in done.err
        return done

    return run


def shared_data(name: str) -> Path:
    """A real data set, where the folder that holds them is there."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"real data set {name} is not here: {path}")
    return path
