"""How do processes that do not know of each other come to the same numbers? The first works them out, in a file."""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from voxquilt.errors import OutputError

try:
    import fcntl
except ImportError:  # without locks each process works them out
    fcntl = None


def agreed(path: Path, key: str, make: Callable[[], Sequence[int]]) -> list[int]:
    """What `make` gives, called by the first process that comes; those who come meanwhile wait, later ones read it.

    Args:
        path: Where it is kept; numbers with another key are replaced.
        key: Tells what they are made of.
        make: Gives them.

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
            numbers = _numbers(file.read(), key)
            if numbers is None:
                numbers = list(make())
                file.truncate(0)
                json.dump({"key": key, "numbers": numbers}, file)
                file.flush()
                os.fsync(file.fileno())
            return numbers
    except OSError as error:
        raise OutputError(f"{path}: writing failed: {error.strerror}.") from error


def _numbers(text: str, key: str) -> list[int] | None:
    try:
        found = json.loads(text)
    except ValueError:  # empty, or of a process that died while it wrote
        return None
    return found["numbers"] if isinstance(found, dict) and found.get("key") == key else None
