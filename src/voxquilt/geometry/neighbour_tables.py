"""Keeps the neighbours of native voxels on the devices on which they are needed."""

from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Int32
from torch import Tensor

from voxquilt.geometry.axis_map import Neighbours
from voxquilt.geometry.device_queue import queue_on


class NeighbourTables:
    """The source's voxels around each target voxel along each of the target's axes, on the host and on devices.

    Args:
        on_host: Along each of the target's axes.
    """

    def __init__(self, on_host: Sequence[Neighbours]) -> None:
        self.on_host = list(on_host)
        self._copies: dict[Hashable, list[Neighbours]] = {}
        self._pairs: dict[Hashable, list[Int32[Tensor, "t 2"]]] = {}

    def on(self, device: torch.device) -> list[Neighbours]:
        """Copies on a device, which are made once for each of its queues, and without waiting for it."""
        if device.type == "cpu":
            return self.on_host
        queue = queue_on(device)
        if queue not in self._copies:
            with torch.inference_mode(False):
                self._copies[queue] = [along.to(device) for along in self.on_host]
        return self._copies[queue]

    def pairs(self, device: torch.device) -> list[Int32[Tensor, "t 2"]]:
        """The first and the last of each target voxel's neighbours side by side, as kernels read them, on a device."""
        queue = queue_on(device)
        if queue not in self._pairs:
            with torch.inference_mode(False):
                stacked = [torch.stack([along.below, along.above], 1).int() for along in self.on_host]
                self._pairs[queue] = [pairs.to(device, non_blocking=True) for pairs in stacked]
        return self._pairs[queue]
