"""Patches in, the whole volume out: which patches have come, and what is their weighted sum?"""

import warnings
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from voxquilt.blend import Blend, to_blend
from voxquilt.errors import BatchError, GridError, LedgerError, PatchShapeError
from voxquilt.geometry import AXES, Padding, Triple, to_triple
from voxquilt.grid import Grid


@runtime_checkable
class Placed(Protocol):
    """Where patches lie: what a GridAggregator needs to know of a GridSampler."""

    @property
    def grid(self) -> Grid: ...
    @property
    def padding(self) -> Padding: ...


class Ledger:
    """Which patches of a grid are in: one bit a patch."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.arrived = np.zeros(grid.counts, dtype=bool)
        self.missing = len(grid)

    def enter(self, places: list[Triple]) -> None:
        """Note that patches have come; either all of them are entered or, on an error, none.

        Raises:
            LedgerError: one has come before.
        """
        again = [place for n, place in enumerate(places) if self.arrived[place] or place in places[:n]]
        if again:
            raise LedgerError(f"a patch came twice: {self._names(again)}. Each patch is added once.")
        for place in places:
            self.arrived[place] = True
        self.missing -= len(places)

    def check_complete(self) -> None:
        """Raises LedgerError, naming the first locations, when a patch is missing."""
        if self.missing:
            holes = [(int(i), int(j), int(k)) for i, j, k in np.argwhere(~self.arrived)[:4]]
            raise LedgerError(
                f"{self.missing} of {len(self.grid)} patches are missing, among them {self._names(holes)}. "
                f"Add every patch of the sampler before asking for the output."
            )

    def _names(self, places: list[Triple]) -> str:
        _, nj, nk = self.grid.counts
        return ", ".join(str(self.grid.location((i * nj + j) * nk + k)) for i, j, k in places[:4])


class GridAggregator:
    """Quilts the patches of a GridSampler back into a volume, in any order of arrival.

    The interface is TorchIO 1.x's and so are the results, with these differences: sums are float32 (float64 for float64
    patches) whatever the patches are, a missing or repeated patch is an error, and memory is one volume, since weights
    are normalised beforehand (see `voxquilt.blend`).

    Args:
        sampler: The sampler that cut the patches, or anything else that has its grid and padding.
        overlap_mode: 'crop', 'average', 'hann', 'gaussian', or a `voxquilt.blend.Blend`.
        downsampling_factor: How many times fewer voxels the patches have than the sampler's, an integer or three.
        device: Where sums are kept.

    Raises:
        ConfigError: (a ValueError) an unknown overlap_mode.
        GridError: (a ValueError) the grid is not a multiple of downsampling_factor.
    """

    def __init__(
        self,
        sampler: Placed,
        overlap_mode: str | Blend = "crop",
        *,
        downsampling_factor: int | Iterable[int] = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.factor = to_triple(downsampling_factor, "downsampling_factor", minimum=1)
        self.padding = sampler.padding
        self.grid = sampler.grid.downsampled(self.factor)
        self.ledger = Ledger(sampler.grid)
        self.device = torch.device(device)
        self._blend = to_blend(overlap_mode)
        self._axes = [self._blend.axis_weights(self.grid, axis) for axis in range(3)]
        self._sums: Tensor | None = None

    def add_batch(self, batch: Shaped[Tensor, "b c pi pj pk"], locations: Int[Tensor, "b 6"] | np.ndarray) -> None:
        """Add patches.

        Args:
            batch: (B, C, pi, pj, pk), any dtype.
            locations: (B, 6) as the sampler gave them: i0, j0, k0, i1, j1, k1, end exclusive.

        Raises:
            BatchError: (a ValueError) as many locations as patches are needed.
            PatchShapeError: (a RuntimeError) wrong shape, channels or place, or a type that the first's cannot hold.
            LedgerError: (a RuntimeError and AssertionError) a patch came before.
        """
        if batch.ndim != 5:
            raise PatchShapeError(f"a batch is (B, C, I, J, K); this one has {batch.ndim} axes: {tuple(batch.shape)}.")
        if tuple(locations.shape[1:]) != (6,):
            raise BatchError(f"locations are (B, 6); these are {tuple(locations.shape)}.")
        if len(batch) != len(locations):
            raise BatchError(f"the batch has {len(batch)} patches but there are {len(locations)} locations.")
        if tuple(batch.shape[2:]) != self.grid.patch_size:
            after = "" if self.factor == (1, 1, 1) else f" after downsampling by {self.factor}"
            raise PatchShapeError(
                f"patches of {tuple(batch.shape[2:])} voxels: the shape does not match the shape of the target "
                f"location, {self.grid.patch_size}{after}."
            )
        places = [self.ledger.grid.find(location) for location in locations.tolist()]
        sums = self._room_for(batch)
        self.ledger.enter(places)
        # From here on the batch is taken: a refused one decides neither channels nor type.
        self._sums = sums
        if self._blend.averages:
            self._axes = [weights.to(sums) for weights in self._axes]
        # Without their history, which would hold every activation of a network that is called without no_grad.
        for patch, place in zip(batch.detach(), places, strict=True):
            self._add(sums, patch, place)

    def scores(self) -> Shaped[Tensor, "c i j k"]:
        """The finished volume on the sampler's padded grid, not copied.

        Raises:
            LedgerError: a patch is missing.
        """
        self.ledger.check_complete()
        assert self._sums is not None  # a grid has at least one patch
        return self._sums

    def get_output_tensor(self) -> Shaped[Tensor, "c i j k"]:
        """The finished volume, without the sampler's padding.

        'crop' keeps the dtype of the patches, except that int64 becomes int32 with a RuntimeWarning where it fits, as
        in TorchIO; the others give float32, or float64 for float64 patches.

        Raises:
            LedgerError: a patch is missing.
            GridError: the padding is not a multiple of downsampling_factor.
        """
        output = self.scores()
        keep = []
        for axis, n, f, (before, after) in zip(AXES, self.grid.shape, self.factor, self.padding, strict=True):
            if before % f or after % f:
                raise GridError(f"axis {axis}: padding {before}, {after} is not a multiple of downsampling_factor {f}.")
            keep.append(slice(before // f, n - after // f))
        output = output[:, keep[0], keep[1], keep[2]]
        return _without_int64(output) if output.dtype == torch.int64 else output.clone()

    def _room_for(self, batch: Tensor) -> Tensor:
        channels, dtype = batch.shape[1], self._dtype(batch.dtype)
        if self._sums is None:
            # Every voxel is copied into exactly once, or summed up from zero. Not an inference tensor, since those can
            # be changed neither outside inference mode nor in another thread.
            make = torch.zeros if self._blend.averages else torch.empty
            with torch.inference_mode(False):
                return make((channels, *self.grid.shape), dtype=dtype, device=self.device)
        if channels != len(self._sums):
            raise PatchShapeError(f"patches with {channels} channels after patches with {len(self._sums)}.")
        if dtype != self._sums.dtype and torch.promote_types(dtype, self._sums.dtype) != self._sums.dtype:
            raise PatchShapeError(
                f"patches of {batch.dtype} after patches of {self._sums.dtype}, which cannot hold them."
            )
        return self._sums

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype.is_complex:
            raise BatchError(f"patches are {dtype}; complex numbers cannot be quilted; give two channels.")
        if not self._blend.averages:
            return dtype
        return torch.float64 if dtype == torch.float64 else torch.float32

    def _add(self, sums: Tensor, patch: Tensor, place: Triple) -> None:
        for axis, n in enumerate(place):
            first, count = (0, self.grid.patch_size[axis]) if self._blend.averages else _owned(self._axes[axis][n])
            patch = patch.narrow(axis + 1, first, count)
            sums = sums.narrow(axis + 1, self.grid.starts[axis][n] + first, count)
        if self._blend.averages:
            i, j, k = (weights[n] for weights, n in zip(self._axes, place, strict=True))
            sums.addcmul_(patch.to(sums), i[:, None, None] * j[:, None] * k)
        else:
            sums.copy_(patch)


def _owned(weights: Tensor) -> tuple[int, int]:
    """Where a window of zeros and ones has its ones: the first and how many."""
    owned = weights.nonzero()
    return int(owned[0]), len(owned)


def _without_int64(output: Tensor) -> Tensor:
    limits = torch.iinfo(torch.int32)
    if output.min() < limits.min or output.max() > limits.max:
        warnings.warn("the output stays int64, since its values do not fit int32.", RuntimeWarning, stacklevel=3)
        return output.clone()
    warnings.warn("the output is converted from int64 to int32.", RuntimeWarning, stacklevel=3)
    return output.int()
