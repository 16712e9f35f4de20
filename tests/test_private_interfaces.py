"""Private names of other packages are listed, bounded and not needed to be right."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from softprompt import private_interfaces
from softprompt.model.backends import onednn
from softprompt.model.backends.bloom import alibi_slopes
from softprompt.model.backends.verify import freeze
from softprompt.private_interfaces import PRIVATE, onednn_product
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "softprompt"
# Submodules that these packages document; anything else is imported from the package itself.
DOCUMENTED = {
    "torch": {"distributed", "nn", "nn.functional", "nn.utils.rnn", "overrides", "utils.checkpoint"},
    "transformers": {"utils", "modeling_outputs"},
    "sacrebleu": {"metrics.bleu", "metrics.chrf", "tokenizers.tokenizer_13a"},
    "peft": set(),
    "accelerate": set(),
}
DOCUMENTED["torch"] |= {"utils.tensorboard"}
TREES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in SOURCE.rglob("*.py")
}


def own_names() -> set[str]:
    """All names that the package gives to anything of its own."""
    names = {"_replace"}  # of named tuples
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                of_self = isinstance(node, ast.Name) or (isinstance(node.value, ast.Name) and node.value.id == "self")
                names |= {node.id if isinstance(node, ast.Name) else node.attr} if of_self else set()
    return names


def foreign(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Private names of others: attributes, texts given to getattr and its like, imports."""
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Attribute):
            found = [node.attr]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            found = [str(node.args[1].value)] if isinstance(node.args[1], ast.Constant) else []
        elif isinstance(node, ast.ImportFrom):
            found = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found = [] if (node.module or "").startswith(("softprompt", "__future__")) else found
        elif isinstance(node, ast.Import):
            found = [part for alias in node.names for part in alias.name.split(".")]
        yield from (name for name in found if name.startswith("_") and not name.startswith("__") and name not in own)


def test_every_private_name_is_in_the_table_with_the_modules_that_use_it() -> None:
    own = own_names()
    used: dict[str, set[str]] = {}
    for module, tree in TREES.items():
        for name in foreign(tree, own):
            used.setdefault(name, set()).add(module)
    assert used == {name: set(entry.used_in) for name, entry in PRIVATE.items()}


@pytest.mark.parametrize(
    "line",
    [
        "torch._C._get_tracing_state()",
        "from torch._inductor import config",
        "import torch._dynamo",
        "hook = getattr(module, '_hf_hook', None)",
        "config._attn_implementation = 'eager'",
        "from transformers.utils import _LazyModule",
    ],
)
def test_the_search_finds_private_names(line: str) -> None:
    assert list(foreign(ast.parse(line), own_names()))


def test_nothing_is_imported_from_modules_that_their_packages_do_not_document() -> None:
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in named:
                package, _, inner = name.partition(".")
                if package in DOCUMENTED:
                    assert not inner or inner in DOCUMENTED[package], f"{module} imports {name}"


def test_all_packages_have_upper_bounds_that_the_tested_versions_keep() -> None:
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [line.split("#")[0].split(";")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    tested = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines if line)}
    optional = project["optional-dependencies"]
    extras = [each for extra in optional if extra not in ("test", "lint") for each in optional[extra]]
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        bounds = {specifier.operator for specifier in requirement.specifier}
        assert bounds == {">=", "<"}, str(requirement)
        assert tested[canonicalize_name(requirement.name)] in requirement.specifier, str(requirement)
    assert {entry.package for entry in PRIVATE.values()} <= {
        canonicalize_name(Requirement(each).name) for each in project["dependencies"]
    }


class Gone:
    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"'_OpNamespace' 'mkldnn' object has no attribute {name!r}")


class Raising:
    def _linear_pointwise(self, *_args: object) -> torch.Tensor:
        raise RuntimeError("expected at most 5 argument(s) but received 6")


class Changed:
    def _linear_pointwise(self, inputs: torch.Tensor, weight: torch.Tensor, *_rest: object) -> torch.Tensor:
        return inputs @ weight.t()  # without the bias


@pytest.mark.parametrize("operators", [Gone(), Raising(), Changed()], ids=["gone", "raises", "changed"])
def test_without_the_onednn_product_pytorchs_own_is_used_and_said_once(
    operators: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: True)
    onednn_product.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, private_interfaces.__name__):
            assert freeze(tiny_model("llama"), tiny_tokenizer()).backend.name == "packed"
            assert freeze(tiny_model("gpt2"), tiny_tokenizer()).backend.name == "packed"
        assert caplog.text.count("multiplies more slowly than it could") == 1
    finally:
        onednn_product.cache_clear()


def test_model_without_pluggable_attention_gets_the_padded_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    kind = type(model.config)

    def ignored(self: Any, name: str, value: object) -> None:
        object.__setattr__(self, "_renamed" if name == "_attn_implementation" else name, value)

    monkeypatch.setattr(kind, "__setattr__", ignored)
    assert freeze(model, tiny_tokenizer()).backend.name == "padded"


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 12, 16, 20, 112])
def test_blooms_slopes_are_those_of_transformers(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(heads), theirs)
