"""Optional packages, and the extras that install them."""

from __future__ import annotations

from importlib.util import find_spec

from softprompt.errors import InputError

# Package: its extra, its purpose.
OPTIONAL = {
    "matplotlib": ("compare", "reports of compare"),
    "peft": ("compare", "LoRA in compare"),
    "datasets": ("hub", "data sets of the hub"),
    "pyarrow": ("parquet", "Parquet files"),
    "tensorboard": ("tensorboard", "TensorBoard logs"),
    "bitsandbytes": ("quantization", "models in 8 or 4 bits"),
}


def installed(package: str) -> bool:
    """Tell whether a package is installed, without importing it."""
    return find_spec(package) is not None


def require_package(package: str, needed_by: str) -> None:
    """Make sure that a package is installed, before the work that needs it.

    Raises:
        InputError: it is not.
    """
    if not installed(package):
        extra, _ = OPTIONAL[package]
        raise InputError(f"{needed_by} needs the package {package}: pip install 'softprompt[{extra}]'")
