"""The base model that a prompt was trained on, and where that model is."""

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
    """The base model that a prompt was trained on.

    Attributes:
        id: what it was loaded from: a hub id, a bundled name, or a folder or file.
        path: that folder or file; None for a hub id, a bundled model, and in records of version 1.
        revision: of a hub id.
        fingerprint: None for a prompt that PEFT wrote.
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
        """The model's name in what others read: of a folder, its last part alone."""
        local = self.path or (self.id if looks_local(self.id) else None)
        return _last(local) if local else self.id

    def resolve(self) -> str:
        """Return what `load_model` can load this model from on this machine.

        A folder's name is never looked up on the hub: somebody else's model can have it.

        Raises:
            PromptError: the prompt was trained on a folder or file that is not on this machine.
        """
        # In version 1, only the revision of a hub id tells it from a path.
        first_version = isinstance(self.fingerprint, FirstFingerprint)
        if self.id in BUNDLED or (self.path is None and (self.revision is not None or not first_version)):
            return self.id
        for path in (self.path, self.id):
            if path and Path(path).expanduser().exists():
                return path
        if self.path is None and _in_hub_cache(self.id):
            return self.id
        raise PromptError(
            f"the prompt was trained on {self.path or self.id}, a folder or file that is not here; give its path "
            "with --model"
        )

    def may_be(self, model: str) -> bool:
        """Tell whether this can be another name for a model: paths are compared, otherwise the last parts of names."""
        own, other = Path(self.id).expanduser(), Path(model).expanduser()
        if not self.id or self.id == model:
            return True
        if own.exists() and other.exists():
            return own.resolve() == other.resolve()
        bundled = BUNDLED.get(model)
        if bundled is not None and self.id == bundled.original:
            return True
        return _last(self.id) == _last(model)


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
    """Tell whether a hub model was downloaded before."""
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # a path, not a hub id
        return False
