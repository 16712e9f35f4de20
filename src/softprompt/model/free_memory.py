"""How much memory a device has left, and how freed memory gets back to the system."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import psutil
import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_M_MMAP_THRESHOLD, _LARGE = -3, 2**20


def available_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device; a container's and a shell's limits count."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own cache
    free = psutil.virtual_memory().available
    if resource is not None:
        allowed = resource.getrlimit(resource.RLIMIT_AS)[0]  # ulimit -v
        if allowed != resource.RLIM_INFINITY:
            free = min(free, allowed - psutil.Process().memory_info().vms)
    for folder, limit, used, total in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", ""),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            allowed, in_use = (int(Path(folder, name).read_text()) for name in (limit, used))
            statistics = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such control group, or "max": no limit
            continue
        # Linux caches files that were read, and drops them when memory is needed.
        cached = sum(int(statistics.get(f"{total}{kind}_file", 0)) for kind in ("active", "inactive"))
        free = min(free, allowed - in_use + cached)
    return max(free, 0)


def trim_allocator() -> None:
    """Make glibc return freed memory to the system, now and from now on, instead of keeping holes between tensors.

    Large tensors then get pages of their own, which leave no holes and cost some time to allocate.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):  # other C libraries have none
            library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
            library.malloc_trim(0)
