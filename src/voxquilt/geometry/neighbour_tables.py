"""Provides what is asked again and again of the neighbours of native voxels."""

from collections.abc import Sequence

import torch

from voxquilt.geometry.axis_map import Neighbours


class NeighbourTables:
    """The source's voxels around each target voxel along each of the target's axes.

    Args:
        neighbours: Along each of the target's axes, on the host.
    """

    def __init__(self, neighbours: Sequence[Neighbours]) -> None:
        self.neighbours = list(neighbours)
        self.copies = [along.copies for along in neighbours]
        """Whether voxels are copied along each axis."""
        self.last = [int(torch.maximum(along.below, along.above).max()) for along in neighbours]
        """The last voxel that is read along each axis."""
