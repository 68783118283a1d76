"""The thread that finishes subjects and writes their files beside the predict loop."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import BoundedSemaphore

import torch

# One subject is being written and one waits; the loop waits for the thread beyond that, so that memory is bounded.
_AT_A_TIME = 2


class WriterThread:
    """Runs actions one after the other in a thread of its own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="voxquilt-writer")
        self._places = BoundedSemaphore(_AT_A_TIME)
        self._pending: list[Future[None]] = []

    def submit(self, action: Callable[[], None]) -> None:
        """Queue an action; waits while two are queued."""
        self._places.acquire()
        self._pending.append(self._pool.submit(self._run, action))

    def check(self) -> None:
        """Raise what ended an action."""
        for future in [future for future in self._pending if future.done()]:
            self._pending.remove(future)
            future.result()

    def close(self) -> None:
        """Wait until every action is done.

        Raises:
            Exception: what ended one of them.
        """
        self._pool.shutdown(wait=True)
        self.check()

    def _run(self, action: Callable[[], None]) -> None:
        try:
            with torch.inference_mode():
                action()
        finally:
            self._places.release()
