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
from softprompt.prompt.layout import ENSEMBLE, member_name
from softprompt.prompt.record import FORMAT_VERSION, Record
from softprompt.prompt.soft_prompt import BasePrompt, SoftPrompt
from softprompt.storage import strict_json, write_folder, write_text

_MEMBER = re.compile(r"member-[1-9][0-9]{0,2}")


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Prompts for the same task and model, whose probabilities are averaged; a text is run after all of them at once.

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
        """P of the longest member: the positions that are used before a text."""
        return max(member.num_virtual_tokens for member in self.members)

    def save(self, folder: str | Path) -> Path:
        """Write the folder: `member-1`, `member-2`, …, each of which PEFT reads, and `ensemble.json`.

        Raises:
            PromptError: the folder exists and is not an ensemble.
            StorageError: it cannot be written.
        """
        path = Path(folder)
        if path.exists() and not (
            (path / ENSEMBLE).is_file() and all(f.name == ENSEMBLE or is_member_name(f.name) for f in path.iterdir())
        ):
            raise PromptError(f"{path} exists and is not an ensemble; give a new folder")
        names = [member_name(number) for number, _ in enumerate(self.members, start=1)]
        record = {
            "format_version": FORMAT_VERSION,
            "members": names,
            "metrics": self.record.metrics,
            "data": self.record.data,
        }
        with write_folder(path) as new:
            for name, member in zip(names, self.members, strict=True):
                member.save(new / name)
            write_text(new / ENSEMBLE, json.dumps(strict_json(record), indent=2, allow_nan=False) + "\n")
        return path


Prompt: TypeAlias = SoftPrompt | Ensemble  # what users load
AnyPrompt: TypeAlias = Prompt | BasePrompt


def make_ensemble(
    prompts: Sequence[SoftPrompt], metrics: Mapping[str, float], data: Mapping[str, str] | None = None
) -> Ensemble:
    """Return the ensemble of some prompts.

    Args:
        prompts: two or more.
        metrics: the ensemble's, on the validation rows.
        data: hashes of its rows; None for those of the first prompt.

    Raises:
        PromptError: the prompts are for different tasks or models.
    """
    for number, prompt in enumerate(prompts, start=1):
        if (prompt.format, prompt.record.base_model) != (prompts[0].format, prompts[0].record.base_model):
            raise PromptError(f"{member_name(number)} is for another task or model than {member_name(1)}")
    shortest = min(prompt.record.max_length for prompt in prompts)  # a text has to fit after the longest prompt
    own: dict[str, object] = {"metrics": dict(metrics), "max_length": shortest, "label_bias": {}}  # members have theirs
    if data:
        own["data"] = dict(data)
    return Ensemble(tuple(prompts), prompts[0].record.model_copy(update=own))


def is_member_name(name: str) -> bool:
    """Tell whether a folder can be that of an ensemble's member."""
    return bool(_MEMBER.fullmatch(name))
