"""Keeps the neighbours of native voxels on the devices on which they are needed."""

from collections.abc import Sequence

import torch
from jaxtyping import Int32
from torch import Tensor

from voxquilt.geometry.axis_map import Neighbours


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
        self._copies: dict[torch.device, list[Neighbours]] = {torch.device("cpu"): self.on_host}
        self._pairs: dict[torch.device, list[Int32[Tensor, "t 2"]]] = {}

    def on(self, device: torch.device) -> list[Neighbours]:
        """Copies on a device, which are made once, and without waiting for it."""
        if device not in self._copies:
            with torch.inference_mode(False):
                self._copies[device] = [along.to(device) for along in self.on_host]
        return self._copies[device]

    def pairs(self, device: torch.device) -> list[Int32[Tensor, "t 2"]]:
        """The first and the last of each target voxel's neighbours side by side, as kernels read them, on a device."""
        if device not in self._pairs:
            with torch.inference_mode(False):
                stacked = [torch.stack([along.below, along.above], 1).int() for along in self.on_host]
                self._pairs[device] = [pairs.to(device, non_blocking=True) for pairs in stacked]
        return self._pairs[device]
