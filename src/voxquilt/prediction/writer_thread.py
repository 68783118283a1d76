"""Provides the thread that finishes subjects and writes their files while the predict loop goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import BoundedSemaphore

import torch

# One subject is written and one waits; with more, the predict loop waits, so that memory is bounded.
_MAX_QUEUED = 2


class WriterThread:
    """Runs actions one after the other in a thread of its own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="voxquilt-writer")
        self._places = BoundedSemaphore(_MAX_QUEUED)
        self._pending: list[Future[None]] = []

    def submit(self, action: Callable[[], None]) -> None:
        """Queue an action; wait while two are queued."""
        self._places.acquire()
        self._pending.append(self._pool.submit(self._run, action))

    def check(self) -> None:
        """Raise the error of an action, if one failed."""
        for future in [future for future in self._pending if future.done()]:
            self._pending.remove(future)
            future.result()

    def close(self) -> None:
        """Wait until every action is done.

        Raises:
            Exception: the error of an action.
        """
        self._pool.shutdown(wait=True)
        self.check()

    def _run(self, action: Callable[[], None]) -> None:
        try:
            with torch.inference_mode():
                action()
        finally:
            self._places.release()
