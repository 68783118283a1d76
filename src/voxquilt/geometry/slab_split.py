"""Splits a grid into rows for several processes, whose neighbours exchange the planes that they share.

A row is all patches of one start along an axis. Where patches are averaged, the planes that the last row before a
boundary and the first row after it share are summed by both processes; the process before the boundary finishes them:

    rows of one part      |=================|
                                |=================|
    rows of the next                  |=================|
                                            |=================|
    finished by one       |-----------------------|
    by the next                                   |-----------|
    summed by both                    [low    high)

Plane `high` is also sent back: voxels of native space that lie between two planes need both.
"""

from dataclasses import dataclass

import numpy as np

from voxquilt.errors import ConfigError
from voxquilt.geometry.frame import AXES
from voxquilt.geometry.grid import Grid


@dataclass(frozen=True)
class Part:
    """Rows `first` to `stop`, end exclusive, of a grid along `axis`: what one process predicts of a volume.

    Raises:
        ConfigError: (a ValueError) no such axis, or no rows.
    """

    axis: int
    first: int
    stop: int

    def __post_init__(self) -> None:
        if self.axis not in range(3) or not 0 <= self.first < self.stop:
            raise ConfigError(f"a part is at least one row along axis 0, 1 or 2; this one is {self}.")

    def patches(self, grid: Grid) -> np.ndarray:
        """(n,) numbers of the part's patches, row by row.

        Raises:
            ConfigError: (a ValueError) the grid has fewer rows.
        """
        rows = grid.counts[self.axis]
        if self.stop > rows:
            raise ConfigError(f"a part of rows {self.first} to {self.stop} along {AXES[self.axis]}: there are {rows}.")
        return grid.order_along(self.axis).reshape(rows, -1)[self.first : self.stop].ravel()


def all_rows(grid: Grid, axis: int) -> Part:
    """All rows along an axis."""
    return Part(axis, 0, grid.counts[axis])


def split_rows(grid: Grid, ranks: int) -> list[Part]:
    """One part per process, or fewer if the grid has fewer rows.

    They lie along the axis that leaves the largest part smallest; of several such axes, along the one that needs the
    least memory. Rows are divided as evenly as possible.
    """

    def cost(axis: int) -> tuple[float, float]:
        rows = grid.counts[axis]
        largest = -(-rows // min(ranks, rows))
        return largest / rows, grid.patch_size[axis] / grid.shape[axis]

    axis = min(range(3), key=cost)
    rows = grid.counts[axis]
    parts = min(ranks, rows)
    return [Part(axis, rows * n // parts, rows * (n + 1) // parts) for n in range(parts)]
