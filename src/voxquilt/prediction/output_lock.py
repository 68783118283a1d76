"""Who may write into an output folder? One run at a time, or the shards of one run; a lock dies with its process."""

import contextlib
import errno
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

from voxquilt.errors import ConfigError
from voxquilt.filesystem import TEMPORARY, temporary_suffix

try:
    import fcntl
except ImportError:  # Windows has other locks; a run there is not protected from a second one
    fcntl = None

log = logging.getLogger("voxquilt")

_NAME = ".voxquilt.lock"
# Seconds that a shard waits for who holds the folder alone: another shard does so only while it begins or ends.
_PATIENCE = 5.0


@contextlib.contextmanager
def locked(folder: Path, shard: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """Hold a folder against other runs, and remove what dead ones left half written.

    The operating system drops the lock when the process ends, however it ends. The shards of one run hold it together.

    Args:
        folder: Made if it is missing.
        shard: (index, count) of this run.

    Raises:
        ConfigError: another run holds it, or the folder cannot be made.
    """
    index, count = shard
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_held(folder / _NAME, f"shards of {count}" if count > 1 else ""))
            if count > 1:
                stack.enter_context(_held(folder / f".voxquilt_{index}_of_{count}.lock"))
            _remove_temporaries(folder, everybody=count == 1)
        except _Busy as error:
            raise ConfigError(
                f"another run is writing to {folder} ({error}); wait for it, or choose another output_dir."
            ) from None
        except OSError as error:
            raise ConfigError(f"output_dir={folder} cannot be written: {error.strerror}.") from error
        yield


class _Busy(Exception):
    """Somebody holds the lock; the message says who."""


@contextlib.contextmanager
def _held(path: Path, shared: str = "") -> Iterator[None]:
    """The lock file, which is gone when its last holder is; `shared` names those who may hold it together."""
    deadline, alone = monotonic() + _PATIENCE, True
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(open(path, "a+", encoding="utf-8"))
            if fcntl is None:
                break
            alone = _locks(file.fileno(), fcntl.LOCK_EX)
            if not alone and not (shared and _locks(file.fileno(), fcntl.LOCK_SH)):
                if not shared or monotonic() > deadline:
                    raise _Busy(_read(path))
                sleep(0.05)
                continue
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                    break  # else it was removed by its holder while this process waited to open it
        if alone:
            file.truncate(0)
            file.write(f"{shared or f'process {os.getpid()} on {socket.gethostname()}'}\n")
            file.flush()
        elif _read(path) != shared:
            raise _Busy(_read(path))
        if fcntl is not None and shared and alone:
            # For the others of its kind. Nobody comes between: a holder who is alone is replaced by itself.
            fcntl.flock(file.fileno(), fcntl.LOCK_SH)
        try:
            yield
        finally:
            if fcntl is None or not shared or _locks(file.fileno(), fcntl.LOCK_EX):
                path.unlink(missing_ok=True)


def _locks(descriptor: int, kind: int) -> bool:
    assert fcntl is not None
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        log.warning("this file system has no locks (%s): a second run in the folder is not noticed.", error.strerror)
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip() or "it has just begun"
    except OSError:
        return "it has just ended"


def _remove_temporaries(folder: Path, *, everybody: bool) -> None:
    """Files that dead processes did not finish; beside other shards, only of this machine's dead."""
    with os.scandir(folder) as entries:
        found = [(entry.path, match) for entry in entries if (match := re.fullmatch(TEMPORARY, entry.name))]
    for path, match in found:
        pid = int(match["pid"])
        if everybody or (path.endswith(temporary_suffix(pid)) and not _lives(pid)):
            with contextlib.suppress(OSError):
                os.unlink(path)
                log.info("removed %s, which a run that died had begun.", path)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
