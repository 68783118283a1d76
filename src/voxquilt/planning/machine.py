"""How much room has this machine? Memory that a process may still take, its cgroup's limit included, and disk."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

_UNLIMITED = 2**60


def memory_available(root: Path = Path("/")) -> int:
    """Bytes that can be taken before the machine, or the process's cgroup (a container's, SLURM's), is full.

    Args:
        root: Where /proc and /sys are.
    """
    return max(0, min([psutil.virtual_memory().available, *_cgroups(root)]))


def _cgroups(root: Path) -> list[int]:
    """What each limit above this process leaves; of cgroups' versions 1 and 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, used, files = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            limit, used, files = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = top / path.lstrip("/")
        # A container sees itself at the top, whatever its path outside is.
        for folder in (group, *group.parents):
            if folder == top or top in folder.parents:
                found = _left(folder, limit, used, files)
                left += [] if found is None else [found]
    return left


def _left(folder: Path, limit: str, used: str, files: str) -> int | None:
    try:
        most = int((folder / limit).read_text())  # 'max' is none
        taken = int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # Files that were read stay in memory until somebody needs it.
    return most - taken + int(stat.get(files, 0)) if most < _UNLIMITED else None


def disk_free(folder: Path) -> int:
    """Bytes free where a folder is, or will be made."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if os.path.exists(path))).free


@dataclass(frozen=True)
class MachineResources:
    """What a machine has.

    Args:
        memory: Bytes that the run's processes on it may still take.
        disk: Bytes free for outputs.
        processes: Of the run, on this machine.
    """

    memory: int
    disk: int
    processes: int
