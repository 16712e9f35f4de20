"""What happens on Ctrl-C (SIGINT), SIGTERM (schedulers, containers) and SIGHUP (a closed terminal).

- Each of them raises a KeyboardInterrupt, SIGTERM and SIGHUP its subclass `Terminated` (`raise_on_termination`).
- Training then saves its state and raises it further (`Trainer.run`). A write that has begun is finished first
  (`defer_signals`). A comparison keeps the results of finished methods.
- Of several processes, all stop after the same step: the next all-reduce tells each that one was asked to stop
  (`stop_together`).
- The command prints "stopped" with what continues the run, and exits with 130, 143 or 129 (`exit_code`). Further
  signals within 2 seconds are ignored: launchers send several.
- In a library call, SIGTERM and SIGHUP then end the process as they would without us (`save_before_exit`).

Signals reach only the main thread: in other threads nothing is changed. Neither is a signal that the program handles
or ignores itself (`nohup`).
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

from softprompt.distributed.launch import world_size

_INTERRUPT = int(signal.SIGINT)
_TERMINATING = tuple(int(getattr(signal, name)) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_IGNORED_SECONDS = 2.0  # after a signal, in which further ones are ignored
_requested: list[int] = []
_Handler: TypeAlias = Callable[[int, FrameType | None], object]
_Caught: TypeAlias = tuple[_Handler, int, FrameType | None]


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP asked the process to stop.

    Attributes:
        number: the number of the signal.
    """

    def __init__(self, number: int = int(signal.SIGTERM)) -> None:
        super().__init__("terminated")
        self.number = number


def exit_code(stop: KeyboardInterrupt) -> int:
    """Return the exit code of a command: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, as in shells."""
    return 128 + (stop.number if isinstance(stop, Terminated) else _INTERRUPT)


@contextmanager
def raise_on_termination() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise `Terminated` instead of ending the process at once.

    Schedulers and launchers send several signals: those that follow within 2 seconds are ignored.
    """
    raised: list[float] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        if not raised or time.monotonic() - raised[-1] > _IGNORED_SECONDS:
            raised.append(time.monotonic())
            raise KeyboardInterrupt if number == _INTERRUPT else Terminated(number)

    default = [number for number in _TERMINATING if signal.getsignal(number) is signal.SIG_DFL]
    if signal.getsignal(_INTERRUPT) is signal.default_int_handler:
        default.append(_INTERRUPT)
    with _install_handlers(dict.fromkeys(default, stop)):
        yield


@contextmanager
def save_before_exit() -> Iterator[None]:
    """Let a library call save on SIGTERM and SIGHUP; then the signal ends the process as usual."""
    try:
        with raise_on_termination():
            yield
    except Terminated as stop:
        if _in_main_thread() and signal.getsignal(stop.number) is signal.SIG_DFL:
            os.kill(os.getpid(), stop.number)
        raise


@contextmanager
def defer_signals() -> Iterator[None]:
    """Delay signals that ask to stop until the end of the block, even if it fails."""
    caught: list[_Caught] = []

    def delayed(handler: _Handler) -> Callable[[int, FrameType | None], None]:
        return lambda number, frame: caught.append((handler, number, frame))

    handlers = {number: signal.getsignal(number) for number in (_INTERRUPT, *_TERMINATING)}
    try:
        with _install_handlers({number: delayed(handler) for number, handler in handlers.items() if callable(handler)}):
            yield
    finally:
        _call(caught)


def _call(caught: list[_Caught]) -> None:
    """Call the delayed handlers, all of them even if one raises."""
    if caught:
        handler, number, frame = caught[0]
        try:
            handler(number, frame)
        finally:
            _call(caught[1:])


@contextmanager
def stop_together() -> Iterator[None]:
    """Delay signals until the next all-reduce, so that all processes stop after the same step.

    `Processes.all_reduce` reads them with `stop_requests`. Launchers send SIGINT and SIGTERM to all processes.
    """
    if world_size() == 1 or not _in_main_thread():
        yield
        return
    numbers = (_INTERRUPT, *_TERMINATING)
    with _install_handlers(dict.fromkeys(numbers, lambda caught, _: _requested.append(caught))):
        try:
            yield
            _requested.clear()
        except KeyboardInterrupt:
            _requested.clear()
            raise


def stop_requests() -> tuple[bool, bool]:
    """Tell whether Ctrl-C, and whether a signal to terminate, is delayed by `stop_together`."""
    return _INTERRUPT in _requested, any(number in _requested for number in _TERMINATING)


@contextmanager
def _install_handlers(handlers: dict[int, _Handler]) -> Iterator[None]:
    """Install signal handlers; restore the previous ones at the end."""
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
            if usual is not None:  # None: it was not installed from Python
                signal.signal(number, usual)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
