"""What has a process done in a run, and what did it take?"""

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

try:
    import resource
except ImportError:  # Windows
    resource = None

# Seconds between two messages, of rank 0 to itself and of the others to it.
_EVERY = (0.25, 1.0)


@dataclass
class Meter:
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
        """What others do not know yet, for `voxquilt.reporting.progress_counts.Tally`; None where it was told a moment
        ago."""
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
