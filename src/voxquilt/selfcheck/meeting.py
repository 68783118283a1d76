"""Gives the processes of a self-check a temporary folder in common, which rank 0 makes, fills and removes."""

import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from voxquilt.distributed.environment import is_external, is_first, slurm_tasks
from voxquilt.errors import ConfigError
from voxquilt.filesystem import write_json

# Names the folder to processes that Lightning starts for rank 0.
_VARIABLE = "VOXQUILT_SELFCHECK"
_READY, _VERDICT = "ready.json", "verdict.json"
# Seconds in which rank 0 has prepared everything, running the network on its host included.
_PATIENCE = 600
# Seconds in which the other processes read how it ended.
_GOODBYE = 30


@contextmanager
def shared_folder() -> Iterator[Path]:
    """The folder, until the block ends."""
    if not is_first():
        yield Path(os.environ[_VARIABLE]) if not is_external() else _agreed()
        return
    folder = _agreed() if is_external() else Path(tempfile.mkdtemp(prefix="voxquilt-selfcheck-"))
    if is_external():
        shutil.rmtree(folder, ignore_errors=True)  # of a job that was killed
        folder.mkdir(mode=0o700)
    os.environ[_VARIABLE] = str(folder)
    try:
        yield folder
    finally:
        os.environ.pop(_VARIABLE, None)
        shutil.rmtree(folder, ignore_errors=True)


def announce(folder: Path, content: Mapping[str, Any]) -> None:
    """Tell the other processes what was prepared."""
    write_json(folder / _READY, dict(content))


def announce_error(folder: Path, message: str) -> None:
    """Tell the processes of a launcher why nothing was prepared, and wait until they know, before the folder goes."""
    announce(folder, {"error": message})
    _wait_until_known(folder / _READY)


def announce_verdict(folder: Path, *, ok: bool) -> None:
    """Tell the other processes whether nothing is off, which decides about their exit status too."""
    write_json(folder / _VERDICT, {"ok": ok})
    _wait_until_known(folder / _VERDICT)


def wait_for_verdict(folder: Path) -> bool:
    """Whether rank 0 has found nothing off."""
    return bool(_read_when_there(folder / _VERDICT).get("ok"))


def wait_for_first(folder: Path) -> dict[str, Any]:
    """What rank 0 has prepared.

    Raises:
        ConfigError: it has prepared nothing, or elsewhere.
    """
    content = _read_when_there(folder / _READY)
    if not content:
        raise ConfigError(
            f"run.selfcheck: rank 0 has prepared nothing in {folder}. On several nodes, set TMPDIR to a folder of a "
            f"file system that all of them see."
        )
    if "error" in content:
        raise ConfigError(content["error"])
    return content


def _read_when_there(path: Path) -> dict[str, Any]:
    """A file's content once rank 0 has written it; nothing if it never does."""
    began = psutil.Process().create_time()
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        # Launchers start all processes within a minute of each other; an older file is another job's.
        if path.is_file() and path.stat().st_mtime > began - 60:
            content = json.loads(path.read_text("utf-8"))
            path.with_suffix(f".{uuid.uuid4().hex}").touch()  # says that it is known
            return content
        time.sleep(0.1)
    return {}


def _wait_until_known(path: Path) -> None:
    """Wait for the processes of a launcher; those that Lightning starts have ended before the folder goes."""
    others = int(os.environ.get("WORLD_SIZE") or slurm_tasks()) - 1 if is_external() else 0
    end = time.monotonic() + _GOODBYE
    while len(list(path.parent.glob(f"{path.stem}.*"))) - 1 < others and time.monotonic() < end:
        time.sleep(0.1)


def _agreed() -> Path:
    """A folder that all processes of a launcher name alike."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    name = "-".join(os.environ[key] for key in names if key in os.environ).replace(os.sep, "_")
    return Path(tempfile.gettempdir()) / f"voxquilt-selfcheck-{getattr(os, 'getuid', int)()}-{name}"
