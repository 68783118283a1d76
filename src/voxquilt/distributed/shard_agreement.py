"""Gives independent processes the same numbers, which the first one computes and the others read from a file."""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from voxquilt.errors import OutputError

try:
    import fcntl
except ImportError:  # without locks each process computes the numbers
    fcntl = None


def agreed(path: Path, key: str, make: Callable[[], Sequence[int]]) -> list[int]:
    """The numbers that `make` returns in the first process; others wait for it, or read them from the file.

    Args:
        path: The file; numbers with another key are replaced.
        key: Identifies what the numbers are computed from.
        make: Computes them.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", encoding="utf-8") as file:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            file.seek(0)
            numbers = _numbers_in(file.read(), key)
            if numbers is None:
                numbers = list(make())
                file.truncate(0)
                json.dump({"key": key, "numbers": numbers}, file)
                file.flush()
                os.fsync(file.fileno())
            return numbers
    except OSError as error:
        raise OutputError(f"{path}: writing failed: {error.strerror}.") from error


def _numbers_in(text: str, key: str) -> list[int] | None:
    try:
        content = json.loads(text)
    except ValueError:  # empty, or written by a process that died meanwhile
        return None
    return content["numbers"] if isinstance(content, dict) and content.get("key") == key else None
