"""All-reduce and broadcast between the processes of a run.

Both use gloo on the CPU, even if the models are on GPUs: a step reduces only the P × H numbers of the gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from softprompt.distributed import launch
from softprompt.distributed.signals import Terminated, stop_requests
from softprompt.errors import RunError, is_out_of_memory

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as seen from one of them.

    Attributes:
        rank: the number of this process.
        count: the number of processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def all_reduce(self, work: Callable[[], Tensor], shape: Sequence[int]) -> Tensor:
        """Return the sum of `work`'s results over all processes: `shape`, float64; with one process, the result itself.

        Raises:
            MemoryError: in all processes, if memory ran out in one.
            KeyboardInterrupt: in all processes, if one was asked to stop (see `signals.stop_together`).
            RunError: another process has ended.
        """
        if self.count == 1:
            return work()
        # One tensor: out of memory, Ctrl-C, a signal to terminate, and the sum.
        sums = torch.zeros(3 + math.prod(shape), dtype=torch.float64)
        try:
            sums[3:] = work().flatten()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            sums[0] = 1
        sums[1], sums[2] = stop_requests()
        with _lost_process_errors():
            torch.distributed.all_reduce(sums, group=_group())
        if sums[2]:
            raise Terminated
        if sums[1]:
            raise KeyboardInterrupt
        if sums[0]:
            raise MemoryError("memory ran out in one of the processes")
        return sums[3:].view(*shape)

    def broadcast(self, data: bytes) -> bytes:
        """Return the data of the first process, in all processes.

        Raises:
            RunError: another process has ended.
        """
        if self.count == 1:
            return data
        length = torch.tensor([len(data)])
        with _lost_process_errors():
            torch.distributed.broadcast(length, src=0, group=_group())
            sent = torch.zeros(int(length), dtype=torch.uint8)
            if self.first:
                sent.copy_(torch.from_numpy(np.frombuffer(bytearray(data), np.uint8)))
            torch.distributed.broadcast(sent, src=0, group=_group())
        return sent.numpy().tobytes()


ALONE = Processes()


def launched() -> Processes:
    """Return the processes that the launcher started."""
    return Processes(launch.rank(), launch.world_size())


@functools.cache
def _group() -> ProcessGroup:
    """Join the other processes; in a new group if the script has one, which may be NCCL's."""
    import torch.distributed as dist

    try:
        if dist.is_initialized():
            joined: ProcessGroup = dist.new_group(backend="gloo")
            return joined
        dist.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"cannot join the {launch.world_size() - 1} other processes: {error}; start all of them with torchrun"
        ) from error
    assert dist.group.WORLD is not None
    return dist.group.WORLD


@contextmanager
def _lost_process_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's: a connection is closed
        raise RunError(
            "another process of the run has ended, so the run cannot continue; the same command with --resume "
            "continues from the last saved step"
        ) from error
