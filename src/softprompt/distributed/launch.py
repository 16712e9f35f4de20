"""The environment of `torchrun` and `accelerate launch`: is this process alone, or one of several that train together?

Neither PyTorch nor accelerate is imported.
"""

from __future__ import annotations

import os

_WORLD_SIZE, _LOCAL_WORLD_SIZE = "WORLD_SIZE", "LOCAL_WORLD_SIZE"


def world_size() -> int:
    """Return how many processes were launched."""
    # Some clusters set WORLD_SIZE for a single process too.
    return int(os.environ.get(_WORLD_SIZE, "1")) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """Return the number of this process; number 0 alone writes and prints."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def local_world_size() -> int:
    """Return how many processes share this machine."""
    return int(os.environ.get(_LOCAL_WORLD_SIZE, world_size())) if world_size() > 1 else 1


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return int(os.environ["LOCAL_RANK"]) if world_size() > 1 else 0


def set_alone() -> None:
    """Continue as if this process had been launched alone."""
    os.environ.update({_WORLD_SIZE: "1", _LOCAL_WORLD_SIZE: "1"})


def is_single_of_accelerate() -> bool:
    """Tell whether `accelerate launch` was given several processes on the CPU and, without MPI, started one."""
    return {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys() and "LOCAL_RANK" not in os.environ
