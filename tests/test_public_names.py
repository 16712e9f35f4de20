"""The public names: what is declared for type checkers is what can be imported, and nothing else."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import softprompt


def declared() -> dict[str, str]:
    """The names under `if TYPE_CHECKING:` in the package's source, and the module that each comes from."""
    tree = ast.parse(Path(softprompt.__file__).read_text(encoding="utf-8"))
    blocks = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    return {
        alias.asname or alias.name: str(statement.module)
        for block in blocks
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


def test_the_public_names_are_those_declared_for_type_checkers() -> None:
    assert declared()
    assert sorted(softprompt.__all__) == sorted(declared())
    assert list(softprompt.__all__) == sorted(set(softprompt.__all__))


@pytest.mark.parametrize("name", sorted(softprompt.__all__))
def test_each_public_name_is_the_object_of_the_module_that_is_declared(name: str) -> None:
    assert getattr(softprompt, name) is getattr(importlib.import_module(declared()[name]), name)


def test_public_names_are_listed() -> None:
    assert set(dir(softprompt)) >= {*softprompt.__all__, "__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'softprompt' has no attribute 'tuen'"):
        softprompt.tuen  # noqa: B018
    with pytest.raises(ImportError):
        from softprompt import nothing  # noqa: F401


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert softprompt.__version__ == version("softprompt")
