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
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from softprompt.distributed.launch import local_rank, local_world_size
from softprompt.errors import ModelError, nearest
from softprompt.extras import require_package
from softprompt.model.backends.verify import freeze
from softprompt.model.bundled import BUNDLED, DEFAULT_MODEL, fetch, plain_model
from softprompt.model.frozen import FrozenModel
from softprompt.model.model_folder import require_model_folder

logger = logging.getLogger(__name__)

# Buffers that are computed from the configuration; older checkpoints contain them.
_COMPUTED = re.compile(r"inv_freq$|position_ids$|\.masked_bias$|\.attn\.bias$|\.attention\.bias$")
# Those, and parts of a larger model that text does not use: images, sound, and heads for multi-token prediction.
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
    """Load a causal language model and its tokenizer, with the fastest backend that is exact.

    Args:
        model: a bundled name (see `softprompt models list`), a folder, a `.gguf` file, or a hub id.
        revision: branch, tag or commit of a hub id.
        device: `auto` takes a GPU where there is one; of several processes, each takes its own.
        dtype: `auto` is float32 on a CPU; on a GPU bfloat16, or float16 where it has none.
        quantization: `8bit`, or on a GPU `4bit`, quantizes the weights with bitsandbytes; a model that was saved
            quantized is loaded as it is.
        device_map: splits the model over several devices, by transformers' own rules (`auto`, `balanced`,
            `sequential`, or a dictionary of modules); `device` is then not used.
        trust_remote_code: run the Python code that comes with the model. It can do whatever you can: read the
            files, and send them. Only for repositories whose code you have read.
        say: called with lines about the progress.

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
    source, options = _locate(name, revision, say)
    options["trust_remote_code"] = trust_remote_code
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if config.is_encoder_decoder:
            raise ModelError(
                f"{name} is an encoder-decoder model: its prompt sees the input, so it is not the same for every "
                "example. softprompt runs decoder-only (causal) models"
            )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        options["dtype"] = resolve_dtype(dtype, place)
        options |= _quantized(quantization, place, options["dtype"])
        if device_map != "none" or quantization != "none":
            options["device_map"] = device_map if device_map != "none" else {"": place}
        hf_model = _load_weights(name, source, config, options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(f"cannot load {name!r}: {_reason(error)}") from error
    if "device_map" not in options and not _is_quantized(hf_model):
        torch.nn.Module.to(hf_model, place)
    return freeze(hf_model, tokenizer, name, _commit(name, revision) or revision)


def _load_weights(name: str, source: str, config: PretrainedConfig, options: Mapping[str, Any]) -> PreTrainedModel:
    """Load a model and make sure that its checkpoint is complete."""
    gguf = "gguf_file" in options
    # A pickle can run code.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, use_safetensors=None if gguf else True, output_loading_info=True, **options
    )
    hf_model: PreTrainedModel = loaded[0]
    require_complete(name, loaded[1], _is_quantized(hf_model))
    return plain_model(hf_model, config) if gguf else hf_model


def _is_quantized(hf_model: PreTrainedModel) -> bool:
    return bool(getattr(hf_model, "is_quantized", False))


def _locate(name: str, revision: str | None, say: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    """Return the source and the options with which `from_pretrained` loads a model."""
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
    """Tell whether a name can only be that of a folder or file: a hub id is `NAME` or `TEAM/NAME`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _reason(error: Exception) -> str:
    """Return the first sentences of an error's message: transformers writes whole pages."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if len(reason) <= _LONGEST_REASON:
        return reason
    end = max(reason.rfind(". ", 0, _LONGEST_REASON), reason.rfind("? ", 0, _LONGEST_REASON))
    return reason[: end + 1] if end > 0 else reason[: _LONGEST_REASON - 1] + "…"


def require_complete(name: str, report: Mapping[str, Collection[Any]], quantized: bool) -> None:
    """Make sure that a checkpoint has the weights that its architecture needs, and no others that change answers.

    transformers initializes missing weights at random: the answers would differ each time the model is loaded.

    Args:
        quantized: whether the checkpoint may have scales and maps that are no parameters.
    """
    missing = sorted(key for key in report["missing_keys"] if not _COMPUTED.search(key))
    unused = [] if quantized else sorted(key for key in report["unexpected_keys"] if not _UNUSED.search(key))
    faults = [f"lacks {_listed(missing)}"] if missing else []
    faults += [f"has {_listed(unused)}, which a causal language model of this kind does not use"] if unused else []
    if faults:
        raise ModelError(
            f"{name} {' and '.join(faults)}: it was saved from another kind of model (a classifier, or one without its "
            "head), in part, or with another configuration. Give the causal language model that it came from"
        )


def _listed(keys: Sequence[str]) -> str:
    more = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {more} more weights" if more > 0 else "")


def _commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a model in the hub's cache: a branch may point to another one later."""
    if Path(name).exists() or looks_local(name):
        return None
    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None  # …/snapshots/COMMIT/config.json


def _quantized(quantization: str, place: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the options with which `from_pretrained` quantizes a model."""
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
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config}


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
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[place.type]
    if (place.index or 0) >= available:
        raise ModelError(f"device {device}: PyTorch sees {available} {place.type} devices here; use --set device=cpu")
    if place == torch.device("cuda") and local_world_size() > 1:
        return torch.device("cuda", local_rank() % available)
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
    """Return the number of CPU threads that a setting means; None is one per core, within a container's CPU limit.

    Several processes share the cores, unless OMP_NUM_THREADS sets the threads of each.
    """
    if threads is not None:
        return threads
    sharing, most = local_world_size(), torch.get_num_threads()
    # torchrun and accelerate launch set it to 1 if it is not set.
    if sharing > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        most = (psutil.cpu_count(logical=False) or os.cpu_count() or 1) // sharing
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        most = min(most, math.ceil(int(quota) / int(period)) // sharing)
    except (OSError, ValueError):  # no such control group, or "max": no limit
        pass
    return max(1, most)
