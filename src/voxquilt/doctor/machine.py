"""Says what a machine has: memory, cores, shared memory, files, disks and caches."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from voxquilt.doctor.line import Line
from voxquilt.example_files import cache_dir
from voxquilt.planning.machine import disk_free, memory_available
from voxquilt.text import gib

_GIB = 2**30
# Open files of a run: inputs that are read ahead, outputs, libraries, sockets of its processes.
_FILES = 1024


def check_machine(root: Path = Path("/")) -> Iterator[Line]:
    """A line each for memory, cores, shared memory, limits, disks and caches.

    Args:
        root: Where /proc, /sys and /dev are.
    """
    available, total = memory_available(root), psutil.virtual_memory().total
    limited = " (a container's or a job's limit)" if available < psutil.virtual_memory().available - _GIB else ""
    yield Line.of(
        "memory", f"{gib(available)} of {gib(total)} free{limited}",
        note="a volume of 512 x 512 x 600 takes about 4 GiB; run.dry_run=true says what yours need."
        if available < 4 * _GIB else "",
    )  # fmt: skip
    yield _check_cores(root)
    yield from _check_shared_memory(root)
    yield from _check_files()
    yield from _check_disks()
    yield from _check_caches()
    encoding = sys.getfilesystemencoding()
    yield Line.of(
        "file names", encoding,
        note="" if encoding.lower().startswith("utf") else "names with letters beyond ASCII fail: set LANG=C.UTF-8.",
    )  # fmt: skip


def core_limit(root: Path = Path("/")) -> float | None:
    """The cores that a cgroup leaves to this process; None without a limit."""
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no limit is 'max'
        pass
    try:
        quota, period = (
            int((root / f"sys/fs/cgroup/cpu/cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
        )
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 else None


def _check_cores(root: Path) -> Line:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit, threads = core_limit(root), torch.get_num_threads()
    cores = usable if limit is None else min(usable, limit)
    note = ""
    if threads > cores + 0.5:
        note = (
            f"torch uses more threads than that, which slows the host down: set OMP_NUM_THREADS={max(1, int(cores))}."
        )
    return Line.of("cores", f"{cores:g} of {os.cpu_count()}, {threads} threads of torch", note=note)


def _check_shared_memory(root: Path) -> Iterator[Line]:
    folder = root / "dev/shm"
    if not folder.is_dir():
        return
    usage = shutil.disk_usage(folder)
    text = f"{gib(usage.free)} of {gib(usage.total)} free in /dev/shm"
    if usage.free >= _GIB:
        yield Line.of("shared memory", text)
        return
    advice = "NCCL and your own DataLoaders with worker processes need more: docker run --shm-size=8g, or --ipc=host."
    if usage.free < _GIB / 16 and torch.cuda.device_count() > 1:
        yield Line.of("shared memory", text, problem=advice)
    else:
        yield Line.of("shared memory", text, note=advice)


def _check_files() -> Iterator[Line]:
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "any number" if soft == resource.RLIM_INFINITY else str(soft)
    note = f"runs of many processes may fail: ulimit -n {hard}" if 0 <= soft < _FILES else ""
    yield Line.of("open files", f"{shown} (ulimit -n)", note=note)


def _check_disks() -> Iterator[Line]:
    for topic, folder, advice in (
        ("disk", Path.cwd(), "choose an output_dir that can be written."),
        ("temporary folder", Path(tempfile.gettempdir()), "set TMPDIR to a folder with room."),
    ):
        free = disk_free(folder)
        text = f"{gib(free)} free in the {'working' if topic == 'disk' else 'temporary'} folder"
        if not os.access(folder, os.W_OK | os.X_OK):
            yield Line.of(topic, text, problem=f"it may not be written: {advice}")
        else:
            yield Line.of(topic, text, note=f"that is little: {advice}" if free < _GIB else "")


def _check_caches() -> Iterator[Line]:
    home = Path.home()
    caches = {
        "cache of examples": ("VOXQUILT_CACHE", cache_dir()),
        "cache of triton": ("TRITON_CACHE_DIR", Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton/cache")),
        "cache of torch.compile": (
            "TORCHINDUCTOR_CACHE_DIR",
            Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()),
        ),
    }
    for topic, (variable, folder) in caches.items():
        # A folder elsewhere than at home is not named: what is printed goes into reports of bugs.
        shown = variable if os.environ.get(variable) else "the temporary folder"
        if not os.environ.get(variable) and folder.is_relative_to(home):
            shown = f"~/{folder.relative_to(home)}"
        existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
        writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
        problem = "" if writable else f"it may not be written: set {variable} to a folder that can be."
        is_needed = topic == "cache of triton" and torch.cuda.is_available()
        yield Line.of(topic, shown, problem=problem if is_needed else "", note=problem)
