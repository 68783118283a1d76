"""Lays grids of patches: Cartesian products of starts along each axis."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from operator import index

import numpy as np

from voxquilt.errors import GridError, PatchShapeError
from voxquilt.geometry.frame import AXES, Location, Triple, to_triple
from voxquilt.geometry.placement import PLACEMENTS


def overlap_of_step(patch_size: Triple, step: float) -> Triple:
    """Voxels that neighbours share, an even number, if patches are about `step` patch sizes apart.

    >>> overlap_of_step((96, 96, 25), 0.5)
    (48, 48, 12)
    """
    i, j, k = (min(2 * int(p * (1 - step) / 2), p - 1) for p in patch_size)
    return i, j, k


def make_grid(
    shape: Iterable[int],
    patch_size: int | Iterable[int],
    patch_overlap: int | Iterable[int] = 0,
    *,
    placement: str = "regular",
    step: float | None = None,
) -> "Grid":
    """Overlapping patches of one size that cover a volume.

    Args:
        shape: Voxels of the volume along i, j, k.
        patch_size: Voxels of a patch, an integer or three.
        patch_overlap: Voxels that neighbours share, an even integer or three.
        placement: How patches are placed along an axis; see `voxquilt.geometry.placement`.
        step: Distance between patches as a share of their size, in place of `patch_overlap`.

    Raises:
        GridError: a patch larger than the volume, an overlap that is negative, odd, or not below the patch size, a step
            that is not above 0 and at most 1, both of them, or a placement whose patches do not cover the volume.
    """
    shape = to_triple(shape, "a volume's shape", minimum=1)
    patch_size = to_triple(patch_size, "patch_size", minimum=1)
    patch_overlap = to_triple(patch_overlap, "patch_overlap")
    if step is not None:
        if isinstance(step, bool) or not isinstance(step, int | float) or not 0 < step <= 1:
            raise GridError(f"step is a share of the patch size above 0 and at most 1; it is {step!r}.")
        if any(patch_overlap):
            raise GridError(f"give patch_overlap ({patch_overlap}) or step ({step}), and not both.")
        patch_overlap = overlap_of_step(patch_size, step)
    for axis, n, p, o in zip(AXES, shape, patch_size, patch_overlap, strict=True):
        if p > n:
            raise GridError(
                f"axis {axis} has {n} voxels but the patch needs {p}: patch_size cannot be larger than the image "
                f"size; set padding_mode or use a smaller patch_size."
            )
        if o >= p:
            raise GridError(f"axis {axis}: patch_overlap {o} must be smaller than patch size {p}.")
        if o % 2:
            raise GridError(f"axis {axis}: patch_overlap must be even, half for each neighbour; it is {o}.")
    lay = PLACEMENTS.load(placement)
    starts = []
    for axis, n, p, o in zip(AXES, shape, patch_size, patch_overlap, strict=True):
        exact = step is not None and placement != "regular"  # whose patches are whole voxels apart
        along = tuple(lay(n, p, p * step if exact and step is not None else p - o))
        _check_starts(along, n, p, f"axis {axis}: the placement {placement!r}")
        starts.append(along)
    return Grid(shape, patch_size, patch_overlap, (starts[0], starts[1], starts[2]))


def _check_starts(starts: tuple[int, ...], size: int, patch: int, what: str) -> None:
    """Raise GridError where patches leave voxels out, or reach beyond the volume."""
    gaps = any(not 0 < b - a <= patch for a, b in pairwise(starts))
    if not starts or starts[0] != 0 or starts[-1] != size - patch or gaps:
        raise GridError(f"{what} does not cover {size} voxels by patches of {patch}: they start at {_listed(starts)}.")


@dataclass(frozen=True)
class Grid:
    """The patches of a volume: every combination of a start along i, one along j and one along k.

    Neighbours share `patch_overlap` voxels, or more where patches are closer.
    """

    shape: Triple
    patch_size: Triple
    patch_overlap: Triple
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    def __post_init__(self) -> None:
        # Whatever they were given as, since what is made of a grid is kept for volumes whose grids are equal.
        for name in ("shape", "patch_size", "patch_overlap"):
            object.__setattr__(self, name, tuple(map(index, getattr(self, name))))
        object.__setattr__(self, "starts", tuple(tuple(map(index, along)) for along in self.starts))

    @cached_property
    def counts(self) -> Triple:
        """Patches along i, j and k."""
        i, j, k = (len(s) for s in self.starts)
        return i, j, k

    def __len__(self) -> int:
        return prod(self.counts)

    def place(self, index: int) -> Triple:
        """A patch's numbers along i, j and k; k runs fastest."""
        _, nj, nk = self.counts
        return index // (nj * nk), index // nk % nj, index % nk

    def location(self, index: int) -> Location:
        """(i0, j0, k0, i1, j1, k1) of a patch, end exclusive."""
        i, j, k = (s[n] for s, n in zip(self.starts, self.place(index), strict=True))
        pi, pj, pk = self.patch_size
        return i, j, k, i + pi, j + pj, k + pk

    @cached_property
    def locations(self) -> np.ndarray:
        """(n, 6) int64, every patch's location in grid order."""
        starts = np.stack(np.meshgrid(*self.starts, indexing="ij"), -1).reshape(-1, 3).astype(np.int64)
        return np.hstack([starts, starts + np.array(self.patch_size, dtype=np.int64)])

    @cached_property
    def _numbers_by_start(self) -> tuple[dict[int, int], ...]:
        return tuple({start: n for n, start in enumerate(starts)} for starts in self.starts)

    @property
    def streaming_axis(self) -> int:
        """The axis along which a patch is the smallest part of the volume, so that streaming takes the least memory."""
        return min(range(3), key=lambda axis: self.patch_size[axis] / self.shape[axis])

    @cached_property
    def streaming_order(self) -> np.ndarray:
        """(n,) patch numbers, all patches of one start along the streaming axis before those of the next."""
        return self.order_along(self.streaming_axis)

    def order_along(self, axis: int) -> np.ndarray:
        """(n,) patch numbers, all patches of one start along an axis before those of the next."""
        numbers = np.arange(len(self)).reshape(self.counts)
        return np.moveaxis(numbers, axis, 0).ravel()

    def find(self, location: Iterable[int]) -> int:
        """The number of the patch at a location: the inverse of `location`.

        Raises:
            PatchShapeError: the grid has no patch there.
        """
        location = tuple(int(v) for v in location)
        sizes = tuple(end - start for start, end in zip(location[:3], location[3:], strict=True))
        place = [numbers.get(start) for numbers, start in zip(self._numbers_by_start, location[:3], strict=True)]
        if sizes != self.patch_size or None in place:
            raise PatchShapeError(
                f"no patch of the grid lies at {location}; its patches are {self.patch_size} voxels and start at "
                f"{_listed(self.starts[0])} along i, {_listed(self.starts[1])} along j, {_listed(self.starts[2])} "
                f"along k."
            )
        i, j, k = (n for n in place if n is not None)
        _, nj, nk = self.counts
        return (i * nj + j) * nk + k

    def downsampled(self, factor: Triple) -> "Grid":
        """The same grid on voxels that are `factor` times larger, for a network whose output is smaller than its input.

        Raises:
            GridError: a patch, a step or the volume is not a multiple of the factor, so patches would not line up.
        """
        for axis, f, n, p, starts in zip(AXES, factor, self.shape, self.patch_size, self.starts, strict=True):
            for what, size in (("patch size", p), ("volume", n), *(("patch start", s) for s in starts)):
                if size % f:
                    raise GridError(
                        f"axis {axis}: {what} {size} is not a multiple of downsampling_factor {f}, so output patches "
                        f"would not line up; choose patch_size and patch_overlap so, and pad (divisible_by)."
                    )
        shape, patch, overlap = (
            to_triple([v // f for v, f in zip(t, factor, strict=True)], "a downsampled size")
            for t in (self.shape, self.patch_size, self.patch_overlap)
        )
        i, j, k = (tuple(s // f for s in starts) for starts, f in zip(self.starts, factor, strict=True))
        return Grid(shape, patch, overlap, (i, j, k))


def _listed(starts: tuple[int, ...]) -> str:
    return ", ".join(map(str, starts)) if len(starts) <= 6 else f"{starts[0]}, {starts[1]}, ... {starts[-1]}"
