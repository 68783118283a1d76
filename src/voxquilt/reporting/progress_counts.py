"""Counts the patches and subjects of a run and of each process, and estimates the time left."""

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import monotonic, perf_counter
from typing import Any

import torch

from voxquilt.reporting.manifest import Row

try:
    import resource
except ImportError:  # Windows
    resource = None


@dataclass
class RunProgress:
    """Counts patches and subjects of a run.

    A subject's last patch counts once its files are written, so that a run is complete only when all files are. All
    patches of a failed subject count as done.

    Args:
        planned: Patches of each subject, computed from headers.
        processes: Number of processes.
    """

    planned: Mapping[str, int]
    processes: int = 1
    done: int = 0
    failed: int = 0
    current: str = ""
    _finished: set[str] = field(default_factory=set)
    _open: dict[tuple[int, str], int] = field(default_factory=dict)
    _predicted: dict[int, int] = field(default_factory=dict)
    _settled: int = 0
    _row_patches: int = 0
    _row_skipped: int = 0
    _began: float = field(default_factory=monotonic)

    def news(self, message: Mapping[str, Any]) -> None:
        """Take a message of ProcessCounts: a rank, its predicted patches, and those of its latest subjects."""
        rank = int(message["rank"])
        self._predicted[rank] = int(message["predicted"])
        for subject, count in message["of"].items():
            self.current = subject
            if subject not in self._finished:
                self._open[rank, subject] = int(count)

    def row(self, row: Row) -> None:
        """Count a subject that is done or has failed."""
        self._finished.add(row.subject)
        for key in [key for key in self._open if key[1] == row.subject]:
            del self._open[key]
        self._settled += self.planned.get(row.subject, 0)
        self.failed += row.status == "failed"
        self.done += row.status == "done"
        self._row_patches += row.patches
        self._row_skipped += row.skipped

    @property
    def subjects(self) -> int:
        """Number of subjects to predict."""
        return len(self.planned)

    @property
    def total(self) -> int:
        """Number of patches."""
        return sum(self.planned.values())

    @property
    def patches(self) -> int:
        """Patches that are done."""
        open_: dict[str, int] = {}
        for (_, subject), count in self._open.items():
            open_[subject] = open_.get(subject, 0) + count
        held = sum(min(count, max(0, self.planned.get(subject, 0) - 1)) for subject, count in open_.items())
        return self._settled + held

    @property
    def predicted(self) -> int:
        """Patches that the networks of all processes have predicted."""
        return sum(self._predicted.values())

    def rate(self, now: float | None = None) -> float:
        """Predicted patches per second since the run began; patches that were left out do not count."""
        seconds = (monotonic() if now is None else now) - self._began
        return self.predicted / seconds if seconds > 0 else 0.0

    def left(self, now: float | None = None) -> float | None:
        """Estimated seconds to the end of the run; None before any patch has been predicted."""
        rate = self.rate(now)
        if not rate:
            return None
        # The same share of patches will be left out (data.skip) as in the subjects that are done.
        share = self._row_patches / (self._row_patches + self._row_skipped) if self._row_patches else 1.0
        return (self.total - self.patches) * share / rate

    def as_json(self) -> dict[str, Any]:
        """The counts for run.log=json."""
        left = self.left()
        return {
            "subjects": self.subjects, "done": self.done, "failed": self.failed, "patches": self.patches,
            "patches_total": self.total, "patches_per_second": round(self.rate(), 3),
            "seconds_left": None if left is None else round(left, 1), "subject": self.current,
        }  # fmt: skip


# Seconds between two messages to rank 0: of rank 0 itself, and of the other ranks.
_INTERVALS = (0.25, 1.0)


@dataclass
class ProcessCounts:
    """Counts what one process predicts, from the creation of this object.

    Args:
        rank: The process's rank.
        device: The device of its network.
    """

    rank: int
    device: torch.device
    _patches: int = 0
    _of: dict[str, int] = field(default_factory=dict)
    _touched: set[str] = field(default_factory=set)
    _sent_at: float = 0.0
    _voxels: int = 0
    _began: float = field(default_factory=perf_counter)

    def restart(self) -> None:
        """Start the clock again, so that the time until now does not count."""
        self._began = perf_counter()

    def count(self, subjects: Mapping[str, int], voxels: int) -> None:
        """Count the patches of a predicted batch by subject, and the voxels of all of them."""
        self._patches += sum(subjects.values())
        self._voxels += voxels
        for subject, count in subjects.items():
            self._of[subject] = self._of.get(subject, 0) + count
            self._touched.add(subject)

    def news(self) -> dict[str, Any] | None:
        """A message for RunProgress; None if the last one was sent a moment ago."""
        if perf_counter() - self._sent_at < _INTERVALS[self.rank > 0]:
            return None
        touched, self._touched, self._sent_at = self._touched, set(), perf_counter()
        # Subjects without patches since the last message are finished, and their counts are dropped.
        self._of = {subject: self._of[subject] for subject in touched}
        return {"rank": self.rank, "predicted": self._patches, "of": dict(self._of)}

    def summary(self) -> dict[str, Any]:
        """The process's part of the run's record: memory in MiB, seconds since the loop began."""
        cuda = self.device.type == "cuda"
        summary: dict[str, Any] = {
            "rank": self.rank,
            "host": platform.node(),
            "device": torch.cuda.get_device_name(self.device) if cuda else self.device.type,
            "patches": self._patches,
            "voxels": self._voxels,
            "seconds": round(perf_counter() - self._began, 3),
        }
        if resource is not None:
            unit = 1 if sys.platform == "darwin" else 2**10
            summary["peak_memory_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
        if cuda:
            summary["peak_device_memory_mib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**20, 1)
        return summary
