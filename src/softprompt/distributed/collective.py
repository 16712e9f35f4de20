"""What several processes do together: adding up what each computed, and handing on what the first one has.

It goes through gloo, on the CPU, also where the models are on GPUs: what is added up in a step are P × H numbers.
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
from softprompt.distributed.signals import Terminated, stops_asked
from softprompt.errors import RunError, is_out_of_memory

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Attributes:
        rank: its number.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.rank == 0

    def total(self, work: Callable[[], Tensor], shape: Sequence[int]) -> Tensor:
        """Return the sum over all processes of what `work` returns, `shape` in float64; alone, what it returns.

        Raises:
            MemoryError: in all processes, where memory ran out in one.
            KeyboardInterrupt: in all processes, where one was asked to stop (see `signals.stops_together`).
            RunError: another process has ended.
        """
        if self.count == 1:
            return work()
        # One tensor: whether memory ran out, whether Ctrl-C and whether a signal to terminate came, and the sum.
        sums = torch.zeros(3 + math.prod(shape), dtype=torch.float64)
        try:
            sums[3:] = work().flatten()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            sums[0] = 1
        sums[1], sums[2] = stops_asked()
        with _lost_processes_told():
            torch.distributed.all_reduce(sums, group=_group())
        if sums[2]:
            raise Terminated
        if sums[1]:
            raise KeyboardInterrupt
        if sums[0]:
            raise MemoryError("memory ran out in one of the processes")
        return sums[3:].view(*shape)

    def share(self, data: bytes) -> bytes:
        """Return the first process's data, in all of them.

        Raises:
            RunError: another process has ended.
        """
        if self.count == 1:
            return data
        length = torch.tensor([len(data)])
        with _lost_processes_told():
            torch.distributed.broadcast(length, src=0, group=_group())
            sent = torch.zeros(int(length), dtype=torch.uint8)
            if self.first:
                sent.copy_(torch.from_numpy(np.frombuffer(bytearray(data), np.uint8)))
            torch.distributed.broadcast(sent, src=0, group=_group())
        return sent.numpy().tobytes()


ALONE = Processes()


def launched() -> Processes:
    """Return the processes that were launched with this one."""
    return Processes(launch.rank(), launch.count())


@functools.cache
def _group() -> ProcessGroup:
    """Join the other processes; a script that has done so already is joined once more, for its group may be NCCL's."""
    import torch.distributed as dist

    try:
        if dist.is_initialized():
            joined: ProcessGroup = dist.new_group(backend="gloo")
            return joined
        dist.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"cannot join the {launch.count() - 1} other processes: {error}; start all of them with torchrun"
        ) from error
    assert dist.group.WORLD is not None
    return dist.group.WORLD


@contextmanager
def _lost_processes_told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's: a connection is closed
        raise RunError(
            "another process of the run has ended, and without it there is no going on; the state of the last saved "
            "step is kept: the same command with --resume goes on from there"
        ) from error
