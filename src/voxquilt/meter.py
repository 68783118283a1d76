"""What has a process done in a run, and what did it take?"""

import platform
import sys
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

try:
    import resource
except ImportError:  # Windows
    resource = None


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
    _voxels: int = 0
    _began: float = field(default_factory=perf_counter)

    def restart(self) -> None:
        """Leave out the time until now."""
        self._began = perf_counter()

    def count(self, patches: Tensor) -> None:
        """A (B, C, I, J, K) batch has been predicted."""
        self._patches += len(patches)
        self._voxels += patches[:, 0].numel()

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
