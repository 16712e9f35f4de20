"""Signals that ask a process to stop: Ctrl-C (SIGINT), SIGTERM of schedulers and containers, SIGHUP of a lost terminal.

They all become a KeyboardInterrupt, so that what saves on Ctrl-C saves on each of them. Signals reach the main thread
alone: in any other nothing is changed, and neither is a signal that the program handles or ignores itself (`nohup`).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeAlias

from softprompt.distributed.launch import count

_INTERRUPT = int(signal.SIGINT)
_TERMINATING = tuple(int(getattr(signal, name)) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_MOMENTS = 2.0  # seconds
_asked: list[int] = []
_Handler: TypeAlias = Callable[[int, FrameType | None], object]
_Caught: TypeAlias = tuple[_Handler, int, FrameType | None]


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP asks the process to stop.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int = int(signal.SIGTERM)) -> None:
        super().__init__("terminated")
        self.number = number


def exit_code(stop: KeyboardInterrupt) -> int:
    """Return what a command exits with: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, as shells have it."""
    return 128 + (stop.number if isinstance(stop, Terminated) else _INTERRUPT)


@contextmanager
def terminations_raised() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise `Terminated` where they would end the process at once, as Ctrl-C raises.

    Schedulers and launchers send several signals at a time: what follows within moments asks for the same.
    """
    asked: list[float] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        if not asked or time.monotonic() - asked[-1] > _MOMENTS:
            asked.append(time.monotonic())
            raise KeyboardInterrupt if number == _INTERRUPT else Terminated(number)

    usual = [number for number in _TERMINATING if signal.getsignal(number) is signal.SIG_DFL]
    if signal.getsignal(_INTERRUPT) is signal.default_int_handler:
        usual.append(_INTERRUPT)
    with _handled(dict.fromkeys(usual, stop)):
        yield


@contextmanager
def saves_before_it_ends() -> Iterator[None]:
    """Let a library call save when SIGTERM or SIGHUP comes; then the signal does what it would have done without us."""
    try:
        with terminations_raised():
            yield
    except Terminated as stop:
        if _in_main_thread() and signal.getsignal(stop.number) is signal.SIG_DFL:
            os.kill(os.getpid(), stop.number)
        raise


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let signals that ask to stop wait until the block is done, also where it fails."""
    caught: list[_Caught] = []

    def waiting(usual: _Handler) -> Callable[[int, FrameType | None], None]:
        return lambda number, frame: caught.append((usual, number, frame))

    handlers = {number: signal.getsignal(number) for number in (_INTERRUPT, *_TERMINATING)}
    try:
        with _handled({number: waiting(usual) for number, usual in handlers.items() if callable(usual)}):
            yield
    finally:
        _tell(caught)


def _tell(caught: list[_Caught]) -> None:
    """Call the handlers that waited; one may raise, and the others are called all the same."""
    if caught:
        usual, number, frame = caught[0]
        try:
            usual(number, frame)
        finally:
            _tell(caught[1:])


@contextmanager
def stops_together() -> Iterator[None]:
    """Let SIGINT (Ctrl-C) and SIGTERM, which launchers hand on to all processes, wait for the next sum.

    There `stops_asked` is asked, so that all processes stop at the same place.
    """
    if count() == 1 or not _in_main_thread():
        yield
        return
    numbers = (_INTERRUPT, *_TERMINATING)
    with _handled(dict.fromkeys(numbers, lambda caught, _: _asked.append(caught))):
        try:
            yield
            _asked.clear()
        except KeyboardInterrupt:
            _asked.clear()
            raise


def stops_asked() -> tuple[bool, bool]:
    """Tell whether Ctrl-C, and whether a signal to terminate, came while `stops_together`, and nothing stopped yet."""
    return _INTERRUPT in _asked, any(number in _asked for number in _TERMINATING)


@contextmanager
def _handled(handlers: dict[int, _Handler]) -> Iterator[None]:
    """Handle signals; afterwards they are handled as before."""
    if not _in_main_thread():
        yield
        return
    before: dict[int, _Handler | int | None] = {}
    try:
        for number, handler in handlers.items():
            before[number] = signal.getsignal(number)
            signal.signal(number, handler)
        yield
    finally:
        for number, usual in before.items():
            if usual is not None:  # None: it was not Python that set it
                signal.signal(number, usual)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
