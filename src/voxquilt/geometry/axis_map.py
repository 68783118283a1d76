"""Maps the voxels of an axis of a volume to those of another, and gives the weights of their interpolation."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

# The pole of the filter that turns voxels into coefficients of a cubic spline, and how far the filter is followed: its
# weights shrink by the pole from voxel to voxel, and those beyond are below 1e-9.
_POLE, _REACH = 3**0.5 - 2, 16
# Weights along an axis that are kept for volumes to come: 8 MiB of float64.
_KEPT = 2**20


class Neighbours(NamedTuple):
    """The source voxels that are read along an axis for each target voxel.

    Args:
        below, above: The first and the last of them.
        share: The weight of `above` where there are only the two, 0 where a voxel is copied.
        weights: The weights of all source voxels, for cubic splines and `by_weights`; None where only the two are read.
    """

    below: Int[Tensor, " t"]
    above: Int[Tensor, " t"]
    share: Float[Tensor, " t"]
    weights: Float[Tensor, "t s"] | None = None

    @property
    def copies(self) -> bool:
        """Whether every target voxel is a copy of a source voxel."""
        return self.weights is None and not self.share.any()

    def by_weights(self, source_size: int) -> "Neighbours":
        """The same with the weights of all source voxels, by which interpolating is a product of matrices."""
        if self.copies or self.weights is not None:
            return self
        weights = torch.zeros(len(self.share), source_size, device="cpu")
        weights.scatter_add_(1, self.below[:, None], 1 - self.share[:, None])
        weights.scatter_add_(1, self.above[:, None], self.share[:, None])
        return self._replace(weights=weights)

    def part(self, where: slice, low: int, high: int) -> "Neighbours":
        """Those of some target voxels, in a source of which only the voxels `low` to `high` (inclusive) are at hand."""
        weights = None if self.weights is None else self.weights[where, low : high + 1]
        return Neighbours(self.below[where] - low, self.above[where] - low, self.share[where], weights)

    def to(self, device: torch.device) -> "Neighbours":
        """The same on a device, without waiting for it."""
        return Neighbours(*(None if t is None else t.to(device, non_blocking=True) for t in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class AxisMap:
    """Maps target voxel x to `scale * x + offset` on axis `axis` of the source.

    Args:
        axis: The source's axis.
        size: Voxels along the target's axis.
        scale, offset: Scale and offset in source voxels.
        within: The range of source voxels that may be read, end exclusive, where the source is padded; None for all.
        order: Order of interpolation: 0 takes the nearest voxel, 1 is linear, 3 a cubic spline.
        reverses_source: Whether, with a negative scale, it is the source that is reversed, and not the target: of two
            nearest voxels the one further along the axis that is not reversed is taken.
    """

    axis: int
    size: int
    scale: float
    offset: float
    within: tuple[int, int] | None = None
    order: int = 1
    reverses_source: bool = False

    def neighbours(self, source_size: int) -> Neighbours:
        """The source voxels around each target voxel, and their weights.

        Beyond the centres of the outermost voxels that may be read, their values are repeated. The tensors are shared
        by all who ask, and must not be changed.
        """
        find = _neighbours if self.is_small(source_size) else _neighbours.__wrapped__
        return find(self, source_size)

    def is_small(self, source_size: int, *, by_weights: bool = False) -> bool:
        """Whether the neighbours, perhaps with the weights of all source voxels, may be kept for volumes to come."""
        return (self.order < 3 and not by_weights) or self.size * source_size <= _KEPT

    def _find_neighbours(self, source_size: int) -> Neighbours:
        first, stop = self.within or (0, source_size)
        x = self._positions(first, stop)
        # Positions that are integers up to rounding must copy, not interpolate.
        x = torch.where((x - x.round()).abs() < 1e-6, x.round(), x)
        if self.order == 0:
            x = (x - 0.5).ceil() if self.scale < 0 and self.reverses_source else (x + 0.5).floor()
        x = x + first
        if self.order == 3 and (x != x.round()).any():
            return _spline(x, first, stop, source_size)
        x = x.clamp(first, stop - 1)
        below = x.floor().long()
        return Neighbours(below, (below + 1).clamp(max=stop - 1), (x - below).float())

    def sides(self, source_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """The source voxels on both sides of each target voxel, and the weight of the second, in float64.

        With order 1; nothing is rounded to whole voxels, so that weights are those of scipy.ndimage.zoom to the bit
        where the borders of the two volumes meet.
        """
        if self.order == 0:
            below = self.neighbours(source_size).below
            return below, below, torch.zeros(len(below), dtype=torch.float64)
        first, stop = self.within or (0, source_size)
        is_reversed = self.scale < 0 and self.reverses_source
        x = self._positions(first, stop, counted_back=is_reversed).clamp(0, stop - first - 1)
        low = x.floor().long()
        high = (low + 1).clamp(max=stop - first - 1)
        share = x - low
        if is_reversed:
            return stop - 1 - low, stop - 1 - high, share
        return first + low, first + high, share

    def without_spline(self) -> "AxisMap":
        """The same with an order of at most 1, from whose neighbours the nearest is told."""
        return replace(self, order=min(self.order, 1))

    def _positions(self, first: int, stop: int, *, counted_back: bool = False) -> Tensor:
        """Positions of the target voxels among the source's voxels from `first` to `stop`, float64.

        They are counted from `first`, so that rounding is the same with any padding before it; or, if `counted_back`,
        from the last voxel back.
        """
        x = torch.arange(self.size, dtype=torch.float64, device="cpu")
        # Where the borders of the two volumes meet, in the order of operations of others (scipy, torch, nnU-Net), by
        # whose rounding it is decided which of two voxels at the same distance is the nearest.
        exact = (stop - first) / self.size
        start, end = (self.scale * (end - 0.5) + self.offset + 0.5 for end in (0, self.size))
        if abs(min(start, end) - first) < 1e-6 and abs(max(start, end) - stop) < 1e-6:
            if self.scale > 0 or counted_back:
                return exact * (x + 0.5) - 0.5
            if self.reverses_source:
                return stop - first - 1 - (exact * (x + 0.5) - 0.5)
            return exact * (x.flip(0) + 0.5) - 0.5
        x = x * self.scale + (self.offset - first)
        # Halfway between two voxels up to rounding is halfway.
        x = torch.where((2 * x - (2 * x).round()).abs() < 1e-6, (2 * x).round() / 2, x)
        return stop - first - 1 - x if counted_back else x


AxisMaps = tuple[AxisMap, AxisMap, AxisMap]


# The volumes of a cohort are often alike. Few, since a cubic spline's weights take megabytes.
@lru_cache(maxsize=16)
def _neighbours(axis_map: AxisMap, source_size: int) -> Neighbours:
    # Whoever is first to ask, others may ask outside of its mode. Nor is its default device asked, which is not changed
    # here: torch would compile a network again that runs meanwhile, in any thread.
    with torch.inference_mode(False):
        return axis_map._find_neighbours(source_size)


def _spline(x: Tensor, first: int, stop: int, source_size: int) -> Neighbours:
    """Interpolation by the cubic spline through all voxels, the outermost of which are repeated endlessly.

    A voxel's coefficients are a filter of its neighbours with weights that fall as powers of a pole (M. Unser,
    "Splines: a perfect fit for signal and image processing", IEEE Signal Processing Magazine 16(6), 1999), so that each
    voxel's weight is known in closed form. The result is that of scipy.ndimage.zoom(order=3, mode="nearest",
    grid_mode=True).
    """
    reach = torch.arange(-_REACH, _REACH + 1, device="cpu")
    filtered = -6 * _POLE / (1 - _POLE**2) * _POLE ** reach.abs().double()
    base = x.floor()
    weights = torch.zeros(len(x), source_size, dtype=torch.float64, device="cpu")
    for step in range(-1, 3):  # the four pieces of the spline around a position
        distance = (x - base - step).abs()
        piece = torch.where(
            distance < 1, (4 - 6 * distance**2 + 3 * distance**3) / 6, (2 - distance).clamp(min=0) ** 3 / 6
        )
        index = (base.long()[:, None] + step + reach).clamp(first, stop - 1)
        weights.scatter_add_(1, index, piece[:, None] * filtered)
    below = (base.long() - 1 - _REACH).clamp(first, stop - 1)
    above = (base.long() + 2 + _REACH).clamp(first, stop - 1)
    return Neighbours(below, above, (x - base).float(), weights)
