"""Locks an output folder for one run, or for the shards of one run; a lock ends with its process."""

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
except ImportError:  # Windows has other locks; there a run is not protected against a second run
    fcntl = None

log = logging.getLogger("voxquilt")

_NAME = ".voxquilt.lock"
# Seconds that a shard waits for an exclusive lock: other shards have one only while they begin or end.
_PATIENCE = 5.0


@contextlib.contextmanager
def locked(folder: Path, shard: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """Lock a folder against other runs, and remove the unfinished files of runs that died.

    The operating system drops the lock when the process ends, however it ends. The shards of one run hold it together.

    Args:
        folder: Output folder, made if it is missing.
        shard: (index, count) of this run.

    Raises:
        ConfigError: another run has the lock, or the folder cannot be made.
    """
    index, count = shard
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_hold(folder / _NAME, f"shards of {count}" if count > 1 else ""))
            if count > 1:
                stack.enter_context(_hold(folder / f".voxquilt_{index}_of_{count}.lock"))
            _remove_temporaries(folder, of_all_processes=count == 1)
        except _Busy as error:
            raise ConfigError(
                f"another run is writing to {folder} ({error}); wait for it, or choose another output_dir."
            ) from None
        except OSError as error:
            raise ConfigError(f"output_dir={folder} cannot be written: {error.strerror}.") from error
        yield


class _Busy(Exception):
    """Another process has the lock; the message names it."""


@contextlib.contextmanager
def _hold(path: Path, shared: str = "") -> Iterator[None]:
    """Lock a file, which its last holder removes; `shared` names the processes that may hold it together."""
    deadline, is_exclusive = monotonic() + _PATIENCE, True
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(open(path, "a+", encoding="utf-8"))
            if fcntl is None:
                break
            is_exclusive = _try_lock(file.fileno(), fcntl.LOCK_EX)
            if not is_exclusive and not (shared and _try_lock(file.fileno(), fcntl.LOCK_SH)):
                if not shared or monotonic() > deadline:
                    raise _Busy(_read_holder(path))
                sleep(0.05)
                continue
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                    break  # otherwise its holder removed it before this process had the lock
        if is_exclusive:
            file.truncate(0)
            file.write(f"{shared or f'process {os.getpid()} on {socket.gethostname()}'}\n")
            file.flush()
        elif _read_holder(path) != shared:
            raise _Busy(_read_holder(path))
        if fcntl is not None and shared and is_exclusive:
            # Let other shards in. No other run can take the lock in between, since it is converted, not released.
            fcntl.flock(file.fileno(), fcntl.LOCK_SH)
        try:
            yield
        finally:
            if fcntl is None or not shared or _try_lock(file.fileno(), fcntl.LOCK_EX):
                path.unlink(missing_ok=True)


def _try_lock(descriptor: int, kind: int) -> bool:
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


def _read_holder(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip() or "it has just begun"
    except OSError:
        return "it has just ended"


def _remove_temporaries(folder: Path, *, of_all_processes: bool) -> None:
    """Remove files that dead processes left unfinished; beside other shards, only those of this machine's processes."""
    with os.scandir(folder) as entries:
        temporaries = [(entry.path, match) for entry in entries if (match := re.fullmatch(TEMPORARY, entry.name))]
    for path, match in temporaries:
        pid = int(match["pid"])
        if of_all_processes or (path.endswith(temporary_suffix(pid)) and not _is_alive(pid)):
            with contextlib.suppress(OSError):
                os.unlink(path)
                log.info("removed %s, which a run that died left unfinished.", path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
