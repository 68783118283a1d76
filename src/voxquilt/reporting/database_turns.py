"""Lets processes open a database in turn: MLflow makes its tables as if no other process did so at the same time."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # without locks they open it at once
    fcntl = None

_FILE = "sqlite:///"


@contextlib.contextmanager
def turn(uri: object) -> Iterator[None]:
    """Wait until no other process is in such a block with the same database, such as another shard of the run.

    Args:
        uri: Where runs are logged. Only databases in files have turns; the lock is on their folder, and leaves no file.
    """
    descriptor = None
    if fcntl is not None and isinstance(uri, str) and uri.startswith(_FILE):
        with contextlib.suppress(OSError):  # no such folder, or a file system without locks
            descriptor = os.open(Path(uri.removeprefix(_FILE)).absolute().parent, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
