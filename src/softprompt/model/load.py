"""Loading a base model: bundled, a folder, a GGUF file, or an id of the hub."""

from __future__ import annotations

import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from softprompt.distributed.launch import local_rank, local_world_size
from softprompt.errors import ModelError, nearest
from softprompt.extras import require_package
from softprompt.model.backends.verify import freeze
from softprompt.model.bundled import BUNDLED, DEFAULT_MODEL, fetch, plain_model
from softprompt.model.frozen import FrozenModel
from softprompt.model.model_folder import require_model_folder

logger = logging.getLogger(__name__)

# Buffers that follow from the configuration: older checkpoints hold them.
_COMPUTED = re.compile(r"inv_freq$|position_ids$|\.masked_bias$|\.attn\.bias$|\.attention\.bias$")
# Those, and parts of a larger model that text never goes through: images, sound, and heads that guess tokens ahead.
_UNUSED = re.compile(_COMPUTED.pattern + r"|vision|visual|image|audio|speech|multi_modal|multimodal|mm_|(^|\.)mtp\.")
_SHOWN = 3  # weights in a message
_LONGEST_REASON = 400
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    model: str | Path = DEFAULT_MODEL,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "none",
    device_map: str | dict[str, Any] = "none",
    trust_remote_code: bool = False,
    say: Callable[[str], None] = logger.info,
) -> FrozenModel:
    """Load a causal language model and its tokenizer, and find the fastest way of running it that is exact.

    Args:
        model: a bundled name (see `softprompt models list`), a folder, a `.gguf` file, or a hub id.
        revision: branch, tag or commit of a hub id.
        device: `auto` takes a GPU where there is one; of several processes, each takes its own.
        dtype: `auto` is float32 on a CPU; on a GPU bfloat16, or float16 where it has none.
        quantization: `8bit`, or on a GPU `4bit`, loads the weights so, with bitsandbytes; a model that was saved
            quantized is loaded as it is.
        device_map: splits the model over several devices, by transformers' own rules (`auto`, `balanced`,
            `sequential`, or a dictionary of modules); `device` is then not used.
        trust_remote_code: run the Python code that comes with the model. It can do whatever you can: read the
            files, and send them. Only for repositories whose code you have read.
        say: told what is going on, a line at a time.

    Raises:
        ModelError: no such model, or one that cannot run prompts exactly.
    """
    name = str(model)
    if trust_remote_code:
        warnings.warn(
            f"trust_remote_code runs Python code that comes with {name}; it can read and change your files",
            stacklevel=2,
        )
    place = resolve_device(device)
    source, extra = _locate(name, revision, say)
    extra["trust_remote_code"] = trust_remote_code
    try:
        config = AutoConfig.from_pretrained(source, **extra)
        if config.is_encoder_decoder:
            raise ModelError(
                f"{name} is an encoder-decoder model: its prompt sees the input, so it is not the same for every "
                "example. softprompt runs decoder-only (causal) models"
            )
        tokenizer = AutoTokenizer.from_pretrained(source, **extra)
        extra |= _quantized(quantization, place, resolve_dtype(dtype, place))
        split = device_map != "none"
        if split or quantization != "none":
            extra["device_map"] = device_map if split else {"": place}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=resolve_dtype(dtype, place),
            use_safetensors=None if "gguf_file" in extra else True,  # a pickle can run code
            output_loading_info=True,
            **extra,
        )
        hf_model: PreTrainedModel = loaded[0]
        require_complete(name, loaded[1], bool(getattr(hf_model, "is_quantized", False)))
        if "gguf_file" in extra:
            hf_model = plain_model(hf_model, config)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(f"cannot load {name!r}: {_reason(error)}") from error
    if "device_map" not in extra and not getattr(hf_model, "is_quantized", False):
        torch.nn.Module.to(hf_model, place)
    return freeze(hf_model, tokenizer, name, _commit(name, revision) or revision)


def _locate(name: str, revision: str | None, say: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    """Return what `from_pretrained` takes for a model's name."""
    if name in BUNDLED:
        return str(fetch(BUNDLED[name], say)), {}
    path = Path(name).expanduser()
    if name.lower().endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"no such file: {path}")
        say(f"reading {path.name}; a folder that transformers saved loads faster")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        require_model_folder(path)
        return str(path), {}
    if path.is_file():
        raise ModelError(f"{path} is a file; give the folder that it is in, or a .gguf file")
    if looks_local(name):
        raise ModelError(f"no such folder: {name}")
    close = nearest(name, BUNDLED)
    if close and "/" not in name:
        raise ModelError(f"no such model: {name}{close}")  # at once: asking a hub takes a while
    return name, {"revision": revision}


def looks_local(name: str) -> bool:
    """Tell whether a name can be that of a folder or file alone: a hub id is `NAME` or `TEAM/NAME`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _reason(error: Exception) -> str:
    """Return what an error says, in its first sentences: transformers writes whole pages."""
    said = " ".join(str(error).split()) or type(error).__name__
    if len(said) <= _LONGEST_REASON:
        return said
    end = max(said.rfind(". ", 0, _LONGEST_REASON), said.rfind("? ", 0, _LONGEST_REASON))
    return said[: end + 1] if end > 0 else said[: _LONGEST_REASON - 1] + "…"


def require_complete(name: str, report: Mapping[str, Collection[Any]], quantized: bool) -> None:
    """Make sure that a checkpoint has the weights that its architecture needs, and no others that would play a part.

    Missing weights are made up at random: each time that the model is loaded it gives other answers.

    Args:
        name: of the model.
        report: transformers' own, of what it loaded.
        quantized: then a checkpoint holds scales and maps that no parameter is called after.

    Raises:
        ModelError: some are missing or unused.
    """
    missing = sorted(key for key in report["missing_keys"] if not _COMPUTED.search(key))
    unused = [] if quantized else sorted(key for key in report["unexpected_keys"] if not _UNUSED.search(key))
    said = [f"lacks {_listed(missing)}"] if missing else []
    said += [f"has {_listed(unused)}, which a causal language model of this kind does not use"] if unused else []
    if said:
        raise ModelError(
            f"{name} {' and '.join(said)}: it was saved from another kind of model (a classifier, or one without its "
            "head), in part, or with another configuration. Give the causal language model that it came from"
        )


def _listed(keys: Sequence[str]) -> str:
    more = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {more} more weights" if more > 0 else "")


def _commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a model that the hub's cache holds: a branch may be another model next month."""
    if Path(name).exists() or looks_local(name):
        return None
    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None  # …/snapshots/COMMIT/config.json


def _quantized(quantization: str, place: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return what `from_pretrained` takes to quantize a model as it is loaded."""
    if quantization == "none":
        return {}
    if quantization not in ("8bit", "4bit"):
        raise ModelError(f"unknown quantization {quantization!r}; allowed are none, 8bit and 4bit")
    require_package("bitsandbytes", f"quantization={quantization}")
    if quantization == "4bit" and place.type == "cpu":
        # On CPUs with AVX512-BF16, bitsandbytes 0.50 runs a kernel that has no gradient, or fails.
        raise ModelError("bitsandbytes cannot train through 4-bit weights on a CPU; take quantization=8bit, or a GPU")
    if quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": four}


def resolve_device(device: str) -> torch.device:
    """Return the device that a setting names; `auto` is a GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError:
        place = None
    if place is None or place.type not in ("cpu", "cuda", "mps"):
        raise ModelError(f"unknown device {device!r}; allowed are auto, cpu, cuda, cuda:N and mps")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[place.type]
    if (place.index or 0) >= there:
        raise ModelError(f"device {device}: PyTorch sees {there} {place.type} devices here; use --set device=cpu")
    if place == torch.device("cuda") and local_world_size() > 1:
        return torch.device("cuda", local_rank() % there)
    return place


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the precision that a setting names."""
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if dtype not in _DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; allowed are auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def resolve_threads(threads: int | None) -> int:
    """Return how many CPU threads a setting names; None is one a core, but no more than a container may keep busy.

    Several processes share the cores, unless OMP_NUM_THREADS says how many each takes.
    """
    if threads is not None:
        return threads
    sharing, most = local_world_size(), torch.get_num_threads()
    # 1 is what torchrun and accelerate launch set where nobody has set anything.
    if sharing > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        most = (psutil.cpu_count(logical=False) or os.cpu_count() or 1) // sharing
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        most = min(most, math.ceil(int(quota) / int(period)) // sharing)
    except (OSError, ValueError):  # no such control group, or "max": no limit
        pass
    return max(1, most)
