"""Turns SIGTERM and SIGINT into requests to end a run in order."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from time import monotonic
from types import FrameType
from typing import Any

from voxquilt.distributed.environment import is_first

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Turns SIGTERM and SIGINT into a request between `hold` and `release`.

    Lightning's own handling does not suit a predict loop: it ignores SIGTERM, blocks in a broadcast when one of several
    processes gets it, and on SIGINT kills the others while they write.

    Args:
        request: Called with the signal's name and the exit status of a process ended by it, 128 + its number. It must
            return at once, and may be called at any point of the main thread.
    """

    def __init__(self, request: Callable[[str, int], None]) -> None:
        self._request = request
        self._handlers: dict[signal.Signals, Any] = {}
        self._first_at = 0.0

    def hold(self) -> None:
        """Replace the handlers; does nothing outside the main thread, where no signal arrives."""
        if threading.current_thread() is threading.main_thread():
            # Ignored signals stay ignored, such as SIGINT in a script's background jobs.
            wanted = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, self._handle) for number in wanted}

    def release(self) -> None:
        """Restore the earlier handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A launcher may forward a signal that the whole group got as well; a second Ctrl-C seconds later means at once.
        if self._first_at and monotonic() - self._first_at > 2 and number == signal.SIGINT:
            os._exit(128 + number)
        self._first_at = self._first_at or monotonic()
        self._request(signal.Signals(number).name, 128 + number)


@contextmanager
def ended_by(*numbers: signal.Signals) -> Iterator[None]:
    """Have signals that nobody handles end the process in order, with a line in place of a traceback, in a block.

    Args:
        numbers: The signals.
    """
    handlers: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        # Those that are ignored stay so, and those of whoever calls this in a program of their own.
        wanted = [n for n in numbers if signal.getsignal(n) in (signal.SIG_DFL, signal.default_int_handler)]
        handlers = {number: signal.signal(number, _end) for number in wanted}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def interrupts_raised() -> Iterator[None]:
    """Have Ctrl-C raise KeyboardInterrupt in a block that handles it, where `ended_by` would end the process."""
    with _in_place_of_end(signal.default_int_handler):
        yield


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Have Ctrl-C end the process at once in a block that imports, where `ended_by` would end it in order.

    Modules being imported may catch any exception, and go on or fail otherwise; and nothing is to be put in order yet.
    """
    with _in_place_of_end(_end_at_once):
        yield


def start(module: str, function: str = "main") -> None:
    """Import a command and run it; Ctrl-C ends it with one line from here on.

    Args:
        module, function: Where the command is; nothing of it is imported before.
    """
    with ended_by(signal.SIGINT):
        with ended_at_once():
            command = getattr(import_module(module), function)
        command()


@contextmanager
def _in_place_of_end(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    is_replaced = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is _end
    if is_replaced:
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        # Lightning ignores further ones once it has got one.
        if is_replaced and signal.getsignal(signal.SIGINT) is handler:
            signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # once more means at once
    _say_stopped(number)
    raise SystemExit(128 + number)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    _say_stopped(number)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError):  # nobody reads on
            stream.flush()
    os._exit(128 + number)


def _say_stopped(number: int) -> None:
    if is_first():
        print(f"voxquilt: stopped by {signal.Signals(number).name}", file=sys.stderr)
