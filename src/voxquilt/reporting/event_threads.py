"""Leaves the errors of TensorBoard's writing threads to those who write, who get them at their next call."""

import threading
from collections.abc import Callable
from typing import Any


class _Hook:
    """Handles errors of threads as before, but for TensorBoard's, which the thread raises again where it is asked.

    Args:
        before: What handled them.
    """

    def __init__(self, before: Callable[[Any], Any]) -> None:
        self._before = before

    def __call__(self, args: Any) -> None:
        """Handle an error; see `threading.excepthook`."""
        if not type(args.thread).__module__.startswith("tensorboard."):
            self._before(args)


def leave_errors_to_writers() -> None:
    """Print no traceback where a thread of TensorBoard's cannot write, as on a full disk."""
    if not isinstance(threading.excepthook, _Hook):
        threading.excepthook = _Hook(threading.excepthook)
