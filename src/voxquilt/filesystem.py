"""Writes files that appear under their final name only when they are complete, and reads them back."""

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from io import BufferedWriter
from pathlib import Path
from typing import Any

from voxquilt.errors import OutputError
from voxquilt.text import escaped

TEMPORARY = r"\..+\.(?P<pid>\d+)\.voxquilt"
"""Matches the name of a file that is being written: its final name, the machine, and the process that writes it."""


def temporary_suffix(pid: int) -> str:
    """The end of the names of files that a process on this machine is writing."""
    return f".{socket.gethostname()}.{pid}.voxquilt"


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BufferedWriter]:
    """A file that takes the place of `path` when the block ends without an error; otherwise nothing is left of it.

    The temporary file lies in the same folder, since a file cannot be moved between file systems in one step, and is
    hidden, so that another run does not take it for an input.

    Args:
        path: The file.
        durable: Whether to wait until the content is on the disk, which a power failure then does not undo.

    Raises:
        OutputError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}{temporary_suffix(os.getpid())}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path}: writing failed: {error.strerror or error}. No partial file is left.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON completely or not at all."""
    with replacing(path) as file:
        # What is escaped of a name is an escape of JSON as well.
        file.write((escaped(json.dumps(content, indent=2, ensure_ascii=False, default=str)) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; empty if there is no such file, or if another program wrote it."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def conf_dir() -> Path:
    """The configuration's folder: inside the package in a wheel, at the top of a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


def checksum(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
