"""Which base model a prompt was trained on, and where that model is."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from pydantic import BaseModel

from softprompt.errors import PromptError
from softprompt.model.bundled import BUNDLED
from softprompt.model.fingerprint import AnyFingerprint, fingerprint
from softprompt.model.fingerprint_v1 import FirstFingerprint
from softprompt.model.frozen import FrozenModel
from softprompt.model.load import looks_local


class BaseModelRecord(BaseModel):
    """Which base model a prompt was trained on.

    Attributes:
        id: what it was loaded by: a hub id, a bundled name, or a folder or file.
        path: where that folder or file was; None for a model of the hub, a bundled one, and in records of version 1.
        revision: of a hub id.
        fingerprint: None of a prompt that PEFT wrote.
        attention_heads, layers: for PEFT.
    """

    id: str
    path: str | None = None
    revision: str | None = None
    fingerprint: AnyFingerprint | None = None
    attention_heads: int = 0
    layers: int = 0

    @property
    def name(self) -> str:
        """What it is called where others read it: of a folder, its own name alone."""
        local = self.path or (self.id if looks_local(self.id) else None)
        return _last(local) if local else self.id

    def here(self) -> str:
        """Return what loads this model here.

        A folder's name is never asked for on the hub: a stranger's model can have it.

        Raises:
            PromptError: it was trained on a folder or file that is not here.
        """
        if self._of_the_hub():
            return self.id
        for place in (self.path, self.id):
            if place and Path(place).expanduser().exists():
                return place
        if self.path is None and _in_hub_cache(self.id):
            return self.id
        raise PromptError(
            f"the prompt was trained on {self.path or self.id}, a folder or file that is not here; say with --model "
            "where the same model is"
        )

    def may_be(self, model: str) -> bool:
        """Tell whether this can be another name for a model: two folders are told apart, and otherwise last names."""
        own, other = Path(self.id).expanduser(), Path(model).expanduser()
        if not self.id or self.id == model:
            return True
        if own.exists() and other.exists():
            return own.resolve() == other.resolve()
        bundled = BUNDLED.get(model)
        if bundled is not None and self.id == bundled.original:
            return True
        return _last(self.id) == _last(model)

    def _of_the_hub(self) -> bool:
        """Tell whether this was no folder; version 1 says it of a hub id only by its revision."""
        if self.id in BUNDLED:
            return True
        return self.path is None and (self.revision is not None or not isinstance(self.fingerprint, FirstFingerprint))


def base_model_record(model: FrozenModel) -> BaseModelRecord:
    """Describe a loaded model, so that a prompt can be matched to it later."""
    config = model.hf_model.config.get_text_config()
    local = model.source not in BUNDLED and bool(model.source) and Path(model.source).expanduser().exists()
    return BaseModelRecord(
        id=model.source,
        path=str(Path(model.source).expanduser().absolute()) if local else None,
        revision=model.revision,
        fingerprint=fingerprint(model),
        attention_heads=config.num_attention_heads,
        layers=config.num_hidden_layers,
    )


def _last(name: str) -> str:
    """Return the last part of a path, or of a hub id."""
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1]


def _in_hub_cache(name: str) -> bool:
    """Tell whether a model of the hub was downloaded before."""
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # a path, not a hub id
        return False
