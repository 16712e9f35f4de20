"""Packages that only some of the work needs, and the extras that bring them."""

from __future__ import annotations

from importlib.util import find_spec

from softprompt.errors import InputError

# Package: the extra that brings it, what it is for.
OPTIONAL = {
    "matplotlib": ("compare", "reports of compare"),
    "peft": ("compare", "LoRA in compare"),
    "datasets": ("hub", "data sets of the hub"),
    "pyarrow": ("parquet", "Parquet files"),
    "tensorboard": ("tensorboard", "TensorBoard logs"),
    "bitsandbytes": ("quantization", "models in 8 or 4 bits"),
}


def missing() -> list[str]:
    """Return the packages that are not installed."""
    return [package for package in OPTIONAL if find_spec(package) is None]


def require_package(package: str, needed_by: str) -> None:
    """Make sure that a package is there, before work begins that needs it.

    Raises:
        InputError: it is not installed.
    """
    if find_spec(package) is None:
        extra, _ = OPTIONAL[package]
        raise InputError(f"{needed_by} needs the package {package}: pip install 'softprompt[{extra}]'")
