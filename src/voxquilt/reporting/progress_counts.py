"""How far is a run, all processes together, and how long will it take from here? Counted, not shown."""

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import monotonic, perf_counter
from typing import Any

import torch
from torch import Tensor

from voxquilt.reporting.manifest import Row

try:
    import resource
except ImportError:  # Windows
    resource = None


@dataclass
class RunProgress:
    """Counts patches and subjects of a run.

    A subject's last patch counts when its files are written, so that all is done only when all is there. The patches of
    a subject that failed count as done too: they do not come any more.

    Args:
        planned: Patches of each subject, from its headers.
        processes: How many there are.
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
    _came: int = 0
    _left_out: int = 0
    _began: float = field(default_factory=monotonic)

    def news(self, message: Mapping[str, Any]) -> None:
        """Take what a process says: its rank, the patches it has predicted, and those of its latest subjects."""
        rank = int(message["rank"])
        self._predicted[rank] = int(message["predicted"])
        for subject, count in message["of"].items():
            self.current = subject
            if subject not in self._finished:
                self._open[rank, subject] = int(count)

    def row(self, row: Row) -> None:
        """A subject is done or has failed."""
        self._finished.add(row.subject)
        for key in [key for key in self._open if key[1] == row.subject]:
            del self._open[key]
        self._settled += self.planned.get(row.subject, 0)
        self.failed += row.status == "failed"
        self.done += row.status == "done"
        self._came += row.patches
        self._left_out += row.skipped

    @property
    def subjects(self) -> int:
        """To be predicted, in all."""
        return len(self.planned)

    @property
    def total(self) -> int:
        """Patches, in all."""
        return sum(self.planned.values())

    @property
    def patches(self) -> int:
        """Patches that are done with."""
        open_: dict[str, int] = {}
        for (_, subject), count in self._open.items():
            open_[subject] = open_.get(subject, 0) + count
        held = sum(min(count, max(0, self.planned.get(subject, 0) - 1)) for subject, count in open_.items())
        return self._settled + held

    @property
    def predicted(self) -> int:
        """Patches that went through the network, of all processes."""
        return sum(self._predicted.values())

    def rate(self, now: float | None = None) -> float:
        """Predicted patches a second since the run began; what was left out does not count."""
        seconds = (monotonic() if now is None else now) - self._began
        return self.predicted / seconds if seconds > 0 else 0.0

    def left(self, now: float | None = None) -> float | None:
        """Seconds that the rest will take at this rate; None before anything has been predicted."""
        rate = self.rate(now)
        if not rate:
            return None
        # Of the rest as many will be left out (data.skip) as were of subjects that are done.
        share = self._came / (self._came + self._left_out) if self._came else 1.0
        return (self.total - self.patches) * share / rate

    def as_json(self) -> dict[str, Any]:
        """For run.log=json."""
        left = self.left()
        return {
            "subjects": self.subjects, "done": self.done, "failed": self.failed, "patches": self.patches,
            "patches_total": self.total, "patches_per_second": round(self.rate(), 3),
            "seconds_left": None if left is None else round(left, 1), "subject": self.current,
        }  # fmt: skip


# Seconds between two messages, of rank 0 to itself and of the others to it.
_EVERY = (0.25, 1.0)


@dataclass
class ProcessCounts:
    """Counts from when it is made.

    Args:
        rank: Of the process.
        device: Where its network is.
    """

    rank: int
    device: torch.device
    _patches: int = 0
    _of: dict[str, int] = field(default_factory=dict)
    _touched: set[str] = field(default_factory=set)
    _told: float = 0.0
    _voxels: int = 0
    _began: float = field(default_factory=perf_counter)

    def restart(self) -> None:
        """Leave out the time until now."""
        self._began = perf_counter()

    def count(self, patches: Tensor, subjects: Mapping[str, int]) -> None:
        """A (B, C, I, J, K) batch has been predicted, of which each subject has so many."""
        self._patches += len(patches)
        self._voxels += patches[:, 0].numel()
        for subject, count in subjects.items():
            self._of[subject] = self._of.get(subject, 0) + count
            self._touched.add(subject)

    def news(self) -> dict[str, Any] | None:
        """What others do not know yet, for `voxquilt.reporting.progress_counts.RunProgress`; None where it was told a
        moment ago."""
        if perf_counter() - self._told < _EVERY[self.rank > 0]:
            return None
        touched, self._touched, self._told = self._touched, set(), perf_counter()
        # Subjects that are over are not counted any further.
        of, self._of = {one: self._of[one] for one in touched}, {one: self._of[one] for one in touched}
        return {"rank": self.rank, "predicted": self._patches, "of": of}

    def summary(self) -> dict[str, Any]:
        """For the record: memory in MiB, seconds since the loop began."""
        cuda = self.device.type == "cuda"
        found: dict[str, Any] = {
            "rank": self.rank,
            "host": platform.node(),
            "device": torch.cuda.get_device_name(self.device) if cuda else self.device.type,
            "patches": self._patches,
            "voxels": self._voxels,
            "seconds": round(perf_counter() - self._began, 3),
        }
        if resource is not None:
            unit = 1 if sys.platform == "darwin" else 2**10
            found["peak_memory_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
        if cuda:
            found["peak_device_memory_mib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**20, 1)
        return found
