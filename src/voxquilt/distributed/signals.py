"""How does a run end when it is told to? In order: the open subject is dropped, finished ones are written."""

import os
import signal
import threading
from collections.abc import Callable
from time import monotonic
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Turns SIGTERM and SIGINT into a request, while they are held.

    Lightning's own handling does not suit a predict loop: it ignores SIGTERM there, blocks in a broadcast when one
    process of several gets it, and kills the others on SIGINT while they write.

    Args:
        request: Called with the signal's name and the exit status of a process that it ends, 128 + its number. It must
            return at once, and may be called at any point of the main thread.
    """

    def __init__(self, request: Callable[[str, int], None]) -> None:
        self._request = request
        self._before: dict[signal.Signals, Any] = {}
        self._first = 0.0

    def hold(self) -> None:
        """Take over; in the main thread only, since signals arrive nowhere else."""
        if threading.current_thread() is threading.main_thread():
            # What is ignored stays so, as SIGINT is in a script's background jobs.
            wanted = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in wanted}

    def release(self) -> None:
        """Give back to who had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A group's launcher forwards what the group got too; a person who asks again seconds later means now.
        if self._first and monotonic() - self._first > 2 and number == signal.SIGINT:
            os._exit(128 + number)
        self._first = self._first or monotonic()
        self._request(signal.Signals(number).name, 128 + number)
