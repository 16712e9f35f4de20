"""Ensembles: several prompts for one task, run as one (Lester et al. 2021, section 6)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from softprompt.data.templates import Format
from softprompt.errors import PromptError
from softprompt.model.frozen import FrozenModel
from softprompt.prompt.registry import ENSEMBLE, find, member_name
from softprompt.prompt.soft_prompt import (
    FORMAT_VERSION,
    BasePrompt,
    Record,
    SoftPrompt,
    read_json,
    read_soft_prompt,
    require_fit,
)
from softprompt.storage import strict_json, write_folder, write_text

_MEMBER = re.compile(r"member-[1-9][0-9]{0,2}")


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Prompts for the same task and model; the probabilities that they give are averaged.

    A text is run behind each of them, in one batch.

    Attributes:
        members: two or more.
        record: what they are for; its metrics are the ensemble's.
    """

    members: tuple[SoftPrompt, ...]
    record: Record

    @property
    def format(self) -> Format:
        """How rows become text."""
        return self.members[0].format

    @property
    def num_virtual_tokens(self) -> int:
        """P of the longest member: so many positions are taken before a text."""
        return max(member.num_virtual_tokens for member in self.members)

    def save(self, folder: str | Path) -> Path:
        """Write the folder: `member-1`, `member-2`, …, which PEFT reads one by one, and `ensemble.json`.

        Raises:
            PromptError: the folder exists and holds something else than an ensemble.
            StorageError: it cannot be written.
        """
        path = Path(folder)
        if path.exists() and not ((path / ENSEMBLE).is_file() and all(_ours(file.name) for file in path.iterdir())):
            raise PromptError(f"{path} exists and is not an ensemble; give a new folder")
        names = [member_name(number) for number, _ in enumerate(self.members, start=1)]
        with write_folder(path) as aside:
            for name, prompt in zip(names, self.members, strict=True):
                prompt.save(aside / name)
            record = {
                "format_version": FORMAT_VERSION,
                "members": names,
                "metrics": self.record.metrics,
                "data": self.record.data,
            }
            write_text(aside / ENSEMBLE, json.dumps(strict_json(record), indent=2, allow_nan=False) + "\n")
        return path


def _ours(name: str) -> bool:
    return name == ENSEMBLE or bool(_MEMBER.fullmatch(name))


Prompt: TypeAlias = SoftPrompt | Ensemble  # what users load
AnyPrompt: TypeAlias = Prompt | BasePrompt


def make_ensemble(
    prompts: Sequence[SoftPrompt], metrics: Mapping[str, float], data: Mapping[str, str] | None = None
) -> Ensemble:
    """Return an ensemble of prompts, what it reached, and the hashes of its rows (None: those of the first member).

    Raises:
        PromptError: they are for different tasks or models.
    """
    for number, prompt in enumerate(prompts, start=1):
        if (prompt.format, prompt.record.base_model) != (prompts[0].format, prompts[0].record.base_model):
            raise PromptError(f"{member_name(number)} is for another task or model than {member_name(1)}")
    room = min(prompt.record.max_length for prompt in prompts)  # a text has to fit behind the longest
    own: dict[str, object] = {"metrics": dict(metrics), "max_length": room, "label_bias": {}}  # the members have theirs
    if data:
        own["data"] = dict(data)
    return Ensemble(tuple(prompts), prompts[0].record.model_copy(update=own))


def load_prompt(prompt: str | Path) -> Prompt:
    """Read a prompt's folder, or an ensemble's; one that PEFT wrote for a prompt or a prefix will do.

    Args:
        prompt: a folder, or `NAME` or `NAME@VERSION` of a prompt that `softprompt prompts add` keeps.

    Raises:
        PromptError: no such prompt, a missing file, a pickle, a wrong shape, or values that are not finite.
    """
    path = find(prompt)
    file = path / ENSEMBLE
    if not file.is_file():
        return read_soft_prompt(path)
    loaded = read_json(file)
    try:
        names = [str(name) for name in loaded["members"]]
        metrics = {str(name): float(value) for name, value in loaded["metrics"].items() if value is not None}
        data = {str(name): str(value) for name, value in loaded.get("data", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PromptError(f"{file} is damaged: {error}; save or export the ensemble again") from error
    known = all(_MEMBER.fullmatch(name) and (path / name).is_dir() for name in names)
    if not (known and len(set(names)) == len(names) >= 2):
        raise PromptError(f"{file} is damaged: it must name two or more folders beside it, member-1 and so on")
    prompts = [read_soft_prompt(path / name) for name in names]
    try:
        return make_ensemble(prompts, metrics, data)
    except PromptError as error:
        raise PromptError(f"{path}: {error}") from error


def require_all_fit(prompt: Prompt, model: FrozenModel) -> None:
    """Make sure that a prompt, or every member of an ensemble, belongs to a model.

    Raises:
        PromptError: it was trained on another.
    """
    for member in prompt.members:
        require_fit(member, model)
