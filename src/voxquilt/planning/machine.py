"""Measures what a machine has free: memory, including the limits of cgroups, and disk."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_UNLIMITED = 2**60


def memory_available(root: Path = Path("/")) -> int:
    """Bytes that can be allocated before the machine, or the process's cgroup (a container's, SLURM's), is full.

    Args:
        root: Where /proc and /sys are.
    """
    return max(0, min([psutil.virtual_memory().available, *_cgroups_available(root)]))


def _cgroups_available(root: Path) -> list[int]:
    """Bytes that each cgroup above this process leaves, for versions 1 and 2 of cgroups."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    available = []
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
                remaining = _read_remaining(folder, limit, used, files)
                available += [] if remaining is None else [remaining]
    return available


def _read_remaining(folder: Path, limit: str, used: str, files: str) -> int | None:
    """Bytes that a cgroup leaves; None where it has no limit."""
    try:
        limit_bytes = int((folder / limit).read_text())  # 'max', which is no limit, is a ValueError
        usage = int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # Files that were read stay in memory until it is needed for something else.
    return limit_bytes - usage + int(stat.get(files, 0)) if limit_bytes < _UNLIMITED else None


def disk_free(folder: Path) -> int:
    """Bytes free on the disk where a folder is, or will be made."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if os.path.exists(path))).free


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU that are free or that this process has already; 2^63 for other devices."""
    if device.type != "cuda":
        return 2**63
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


@dataclass(frozen=True)
class MachineResources:
    """What a machine has free for a run.

    Args:
        memory: Bytes that the run's processes on it may still allocate.
        disk: Bytes free for outputs.
        processes: Number of the run's processes on this machine.
    """

    memory: int
    disk: int
    processes: int
