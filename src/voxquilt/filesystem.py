"""How does a file appear? Under its final name only when it is complete, whatever happens meanwhile."""

import contextlib
import os
import socket
from collections.abc import Iterator
from io import BufferedWriter
from pathlib import Path

from voxquilt.errors import OutputError

TEMPORARY = r"\..+\.(?P<pid>\d+)\.voxquilt"
"""Matches the name of a file that is being written: whose it will be, and which process on which machine writes."""


def temporary_suffix(pid: int) -> str:
    """How names of files end that a process on this machine is writing."""
    return f".{socket.gethostname()}.{pid}.voxquilt"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BufferedWriter]:
    """A file that takes the place of `path` when the block ends without an error; otherwise nothing is left of it.

    The temporary file lies in the same folder, since a file cannot be moved between file systems in one step, and is
    hidden, so that it is no input of another run.

    Raises:
        OutputError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}{temporary_suffix(os.getpid())}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path}: writing failed: {error.strerror or error}. No partial file is left.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
