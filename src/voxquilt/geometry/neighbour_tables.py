"""Keeps the neighbours of native voxels on the devices on which they are needed."""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Int32
from torch import Tensor

from voxquilt.geometry.axis_map import Neighbours
from voxquilt.geometry.device_queue import queue_on

T = TypeVar("T")

# Queues for which copies are kept: predicting uses one, and others may use one for each volume.
_QUEUES = 2


class NeighbourTables:
    """The source's voxels around each target voxel along each of the target's axes, on the host and on devices.

    Args:
        on_host: Along each of the target's axes.
    """

    def __init__(self, on_host: Sequence[Neighbours]) -> None:
        self.on_host = list(on_host)
        self.copies = [along.copies for along in on_host]
        """Whether voxels are copied along each axis."""
        self.last = [int(torch.maximum(along.below, along.above).max()) for along in on_host]
        """The last voxel that is read along each axis."""
        self._copies: dict[Hashable, list[Neighbours]] = {}
        self._pairs: dict[Hashable, list[Int32[Tensor, "t 2"]]] = {}

    def on(self, device: torch.device) -> list[Neighbours]:
        """Copies on a device, which are made once for each of its queues, and without waiting for it."""
        if device.type == "cpu":
            return self.on_host
        return _kept(self._copies, device, lambda: [along.to(device) for along in self.on_host])

    def pairs(self, device: torch.device) -> list[Int32[Tensor, "t 2"]]:
        """The first and the last of each target voxel's neighbours side by side, as kernels read them, on a device."""
        stacked = (torch.stack([along.below, along.above], 1).int() for along in self.on_host)
        return _kept(self._pairs, device, lambda: [pairs.to(device, non_blocking=True) for pairs in stacked])


def _kept(kept: dict[Hashable, T], device: torch.device, make: Callable[[], T]) -> T:
    """What has been made for a device's current queue, or is made now in place of the oldest."""
    queue = queue_on(device)
    found = kept.get(queue)
    if found is None:
        if len(kept) >= _QUEUES:
            kept.pop(next(iter(kept), None), None)
        with torch.inference_mode(False):
            found = kept[queue] = make()
    return found
