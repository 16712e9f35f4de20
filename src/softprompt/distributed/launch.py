"""How this process was launched: alone, or as one of several that train together.

`torchrun` and `accelerate launch` say so in the environment. Here it is only read: neither PyTorch nor accelerate is
imported.
"""

from __future__ import annotations

import os

_COUNT, _LOCAL_COUNT = "WORLD_SIZE", "LOCAL_WORLD_SIZE"


def count() -> int:
    """Return how many processes were launched."""
    return int(os.environ.get(_COUNT, "1")) if "LOCAL_RANK" in os.environ else 1  # some clusters set only the former


def rank() -> int:
    """Return this process's number among all; number 0 alone writes and prints."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def local_count() -> int:
    """Return how many of them share this machine."""
    return int(os.environ.get(_LOCAL_COUNT, count())) if count() > 1 else 1


def local_rank() -> int:
    """Return this process's number on this machine."""
    return int(os.environ["LOCAL_RANK"]) if count() > 1 else 0


def leave_the_others() -> None:
    """Go on as a process that was launched alone."""
    os.environ.update({_COUNT: "1", _LOCAL_COUNT: "1"})


def fewer_than_asked_for() -> bool:
    """Tell whether `accelerate launch` was asked for several processes on the CPU and, without MPI, started one."""
    return {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys() and "LOCAL_RANK" not in os.environ
