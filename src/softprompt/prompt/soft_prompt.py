"""The prompt as a value: a soft prompt or a learned prefix with its record, or the base model alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader
from safetensors.torch import save_file
from torch import Tensor

from softprompt.config import Method
from softprompt.data.templates import Format
from softprompt.errors import PromptError
from softprompt.model.prefix import is_prefix
from softprompt.prompt.layout import (
    ADAPTER,
    CARD,
    PEFT_KEY,
    PEFT_TYPES,
    RECORD,
    WEIGHTS,
    peft_config,
    read_json,
    to_peft,
)
from softprompt.prompt.record import Record
from softprompt.storage import strict_json, write_folder


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """A soft prompt (prompt tuning) or a learned prefix (prefix tuning).

    Attributes:
        weights: float32, on the CPU: embeddings `[P, H]`, or keys and values at every layer, `[L, 2, K, P, D]`.
        record: what it is for and where it comes from.
    """

    weights: Tensor
    record: Record

    @property
    def format(self) -> Format:
        """How rows become text for this prompt."""
        return self.record.format

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        return int(self.weights.shape[-2])

    @property
    def members(self) -> tuple[SoftPrompt]:
        """The prompt itself; an ensemble has several members."""
        return (self,)

    @property
    def label_bias(self) -> Mapping[str, float]:
        """Nats that are added to labels' log-likelihoods."""
        return self.record.label_bias

    @property
    def method(self) -> Method:
        """How it was learned."""
        return "prefix-tuning" if is_prefix(self.weights) else "prompt-tuning"

    def save(self, folder: str | Path) -> Path:
        """Write the folder: PEFT's two files, `softprompt.json` and a model card.

        Raises:
            PromptError: the folder exists and is neither empty nor a prompt.
            StorageError: it cannot be written.
        """
        path = Path(folder)
        if path.exists() and not (path.is_dir() and _is_replaceable(path)):
            raise PromptError(f"{path} exists and is not a prompt; give a new folder")
        texts = {
            ADAPTER: _json(peft_config(self.weights, self.record.base_model)),
            RECORD: _json(self.record.model_dump()),
            CARD: self._card(),
        }
        with write_folder(path) as new:
            save_file({PEFT_KEY: to_peft(self.weights)}, new / WEIGHTS)
            for name, text in texts.items():
                (new / name).write_text(text, encoding="utf-8")
        return path

    def _card(self) -> str:
        card = Environment(loader=PackageLoader("softprompt.prompt", "."), trim_blocks=True).get_template("card.md")
        return card.render(prompt=self, record=self.record)


@dataclass(frozen=True, eq=False)
class BasePrompt:
    """No virtual tokens: the base model, with a label bias or without.

    Attributes:
        label_bias: nats that are added to labels' log-likelihoods.
    """

    label_bias: Mapping[str, float] = field(default_factory=dict)
    weights: ClassVar[None] = None
    num_virtual_tokens: ClassVar[int] = 0

    @property
    def members(self) -> tuple[BasePrompt]:
        """The base model itself."""
        return (self,)


def _is_replaceable(folder: Path) -> bool:
    """Tell whether a folder is empty or holds a prompt alone; other kinds of adapters have files of the same names."""
    names = {file.name for file in folder.iterdir()}
    if RECORD not in names and ADAPTER in names:
        try:
            peft_type = read_json(folder / ADAPTER).get("peft_type")
        except PromptError:
            return False
        return names <= {WEIGHTS, ADAPTER, CARD} and peft_type in PEFT_TYPES
    return not names or (RECORD in names and names <= {WEIGHTS, ADAPTER, RECORD, CARD})


def _json(value: Any) -> str:
    return json.dumps(strict_json(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
