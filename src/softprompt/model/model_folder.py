"""Whether a folder contains a base model, and what to do where it contains something else."""

from __future__ import annotations

import json
from pathlib import Path

from softprompt.errors import ModelError

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_PROMPT = ("softprompt.json", "ensemble.json")
_PROMPT_KINDS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZERS = (
    "tokenizer*",
    "vocab*",
    "spiece*",
    "sentencepiece*",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "tekken.json",
)
_SHOWN = 3


def require_model_folder(path: Path) -> None:
    """Make sure that a folder holds a model's configuration, its weights as safetensors, and a tokenizer."""
    if not any(path.iterdir()):
        raise ModelError(
            f"{path} is empty, so it holds no {_CONFIG}; give a folder that transformers' save_pretrained wrote"
        )
    _require_no_prompt(path)
    if not (path / _CONFIG).is_file():
        raise ModelError(f"{path} holds no {_CONFIG}: {_instead(path)}")
    if not list(path.glob("*.safetensors")):
        raise ModelError(f"{path} holds no weights as safetensors; {_weights_cure(path)}")
    if not any(file for pattern in _TOKENIZERS for file in path.glob(pattern)):
        raise ModelError(
            f"{path} holds a model, but no tokenizer. Put that of the model that it came from beside it: "
            f"AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained({str(path)!r})"
        )


def _require_no_prompt(path: Path) -> None:
    """Refuse folders of prompts, runs and adapters, each with its own message."""
    adapter = _read(path / _ADAPTER)
    base = adapter.get("base_model_name_or_path") or "its base model"
    if any((path / name).is_file() for name in _PROMPT) or adapter.get("peft_type") in _PROMPT_KINDS:
        raise ModelError(
            f"{path} is a prompt, not a base model; give it as PROMPT, and leave --model out or name the model that it "
            "was trained on"
        )
    if (path / "config.yaml").is_file() and (path / "prompt").is_dir():
        raise ModelError(f"{path} is a run, not a base model; its prompt is {path / 'prompt'}")
    if (path / _ADAPTER).is_file():
        kind = adapter.get("peft_type") or "PEFT"
        if (path / _CONFIG).is_file():
            raise ModelError(
                f"{path} holds a {kind} adapter beside the model, which transformers would run with it; move "
                f"{_ADAPTER} to another folder, or merge the adapter into the model"
            )
        raise ModelError(
            f"{path} holds a {kind} adapter for {base}, not a whole model. Give the base model, or merge the adapter "
            f"into it: PeftModel.from_pretrained(base, {str(path)!r}).merge_and_unload().save_pretrained(NEW), and "
            "give NEW with the tokenizer saved beside it"
        )


def _instead(path: Path) -> str:
    """Say what a folder without a configuration holds."""
    inside = sorted(folder.name for folder in path.iterdir() if (folder / _CONFIG).is_file())
    if inside:
        return f"the models are inside; give {' or '.join(str(path / name) for name in inside[-_SHOWN:])}"
    if gguf := _gguf_hint(path):
        return gguf
    if list(path.glob("*.safetensors")) or any(file for pattern in _PICKLES for file in path.glob(pattern)):
        return f"it holds weights alone; put {_CONFIG} of the model that they came from beside them"
    if any(file for pattern in _TOKENIZERS for file in path.glob(pattern)):
        return "it holds a tokenizer, but no model; give the folder of the whole model"
    return "it is no model's folder; give one that transformers' save_pretrained wrote"


def _weights_cure(path: Path) -> str:
    pickles = sorted({file.name for pattern in _PICKLES for file in path.glob(pattern)})
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which can run code and is never read. Where you trust it, convert it once: "
            f"AutoModelForCausalLM.from_pretrained({str(path)!r}, use_safetensors=False).save_pretrained(NEW), and "
            "give NEW with the tokenizer saved beside it"
        )
    return _gguf_hint(path) or "the download or the copy may have stopped early; get the whole folder"


def _gguf_hint(path: Path) -> str:
    gguf = sorted(path.glob("*.gguf"))
    return f"it holds GGUF files; give one of them, such as {gguf[0]}" if gguf else ""


def _read(path: Path) -> dict[str, object]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
