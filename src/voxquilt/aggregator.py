"""Patches in, the whole volume out: which patches have come, and what is their weighted sum?"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from voxquilt.blend import Blend, to_blend
from voxquilt.buffers import Buffers
from voxquilt.errors import BatchError, GridError, LedgerError, PatchShapeError
from voxquilt.geometry import AXES, Padding, Triple, to_triple
from voxquilt.grid import Grid
from voxquilt.ledger import Ledger
from voxquilt.sums import Sums


@runtime_checkable
class Placed(Protocol):
    """Where patches lie: what a GridAggregator needs to know of a GridSampler."""

    @property
    def grid(self) -> Grid: ...
    @property
    def padding(self) -> Padding: ...


@dataclass(frozen=True)
class Slab:
    """Planes `start` to `stop`, end exclusive, along `axis` that are complete.

    `scores` is (C, I, J, K) with only these planes along the axis, on the sampler's padded (and downsampled) grid. It
    is a view of memory that is used again: what is to be kept must be copied before the consumer returns.
    """

    axis: int
    start: int
    stop: int
    scores: Shaped[Tensor, "c i j k"]


class GridAggregator:
    """Quilts the patches of a GridSampler back into a volume.

    The interface is TorchIO 1.x's and so are the results, with these differences: patches may come in any order, sums
    are float32 (float64 for float64 patches) whatever the patches are, a missing or repeated patch is an error, and
    memory is one volume, since weights are normalised beforehand (see `voxquilt.blend`).

    With a consumer it streams: patches come start by start along `axis` (in any order within a start), and planes are
    handed over as soon as no later patch touches them. Then memory is a ring of as many planes as a patch has, however
    long the volume is.

        patches of start n      |=================|
        patches of start n + 1            |=================|
        complete after start n  |=========|                     handed over, and their place in the ring is free

    Args:
        sampler: The sampler that cut the patches, or anything else that has its grid and padding.
        overlap_mode: 'crop', 'average', 'hann', 'gaussian', or a `voxquilt.blend.Blend`.
        downsampling_factor: How many times fewer voxels the patches have than the sampler's, an integer or three.
        device: Where sums are kept.
        dtype: Of the sums; None is float32, or float64 for float64 patches. 'crop' sums nothing and keeps the patches'.
        consumer: Called with each finished Slab, in order.
        axis: Along which to stream; the grid's `streaming_axis` needs the least memory.
        buffers: Where memory comes from and goes to.
        skipped: Numbers of patches that never come. Where others overlap them, those are averaged alone; voxels that
            no patch has (of crop: whose owner is skipped) hold the fill.
        fill: A value for all channels, or one for each.

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
        dtype: torch.dtype | None = None,
        consumer: Callable[[Slab], None] | None = None,
        axis: int = 0,
        buffers: Buffers | None = None,
        skipped: Iterable[int] = (),
        fill: float | Sequence[float] = 0.0,
    ) -> None:
        self.factor = to_triple(downsampling_factor, "downsampling_factor", minimum=1)
        self.padding = sampler.padding
        self.grid = sampler.grid.downsampled(self.factor)
        self.ledger = Ledger(sampler.grid, skipped)
        self.device = torch.device(device)
        self.dtype = dtype
        self._blend = to_blend(overlap_mode)
        self._axes = [self._blend.axis_weights(self.grid, n) for n in range(3)]
        self._fill = fill
        self._consumer = consumer
        self._axis = axis
        self._buffers = buffers or Buffers()
        self._sums: Sums | None = None
        # The weights that came, where some patches never come.
        self._cover: Sums | None = None
        # Patches that are missing at each start along the axis, and the first start where some are.
        self._waiting = np.moveaxis(~self.ledger.arrived, axis, 0).reshape(self.grid.counts[axis], -1).sum(1).tolist()
        self._front = 0

    def add_batch(self, batch: Shaped[Tensor, "b c pi pj pk"], locations: Int[Tensor, "b 6"] | np.ndarray) -> None:
        """Add patches.

        Args:
            batch: (B, C, pi, pj, pk), any dtype.
            locations: (B, 6) as the sampler gave them: i0, j0, k0, i1, j1, k1, end exclusive.

        Raises:
            BatchError: (a ValueError) as many locations as patches are needed.
            PatchShapeError: (a RuntimeError) wrong shape, channels or place, or a type that the first's cannot hold.
            LedgerError: (a RuntimeError and AssertionError) a patch came before, or, while streaming, too early.
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
        self._check_order(places)
        sums = self._room_for(batch)
        self.ledger.enter(places)
        # From here on the batch is taken: a refused one decides neither channels nor type.
        self._sums = sums
        # Planes of which all patches are skipped leave first: in the ring they are where the next ones will be.
        self._release(sums)
        # Without their history, which would hold every activation of a network that is called without no_grad.
        for patch, place in zip(batch.detach(), places, strict=True):
            sums.add(patch, place)
            if self._cover is not None:
                self._cover.add(patch.new_ones(1, dtype=self._cover.dtype).expand_as(patch[:1]), place)
            self._waiting[place[self._axis]] -= 1
            self._release(sums)

    def scores(self) -> Shaped[Tensor, "c i j k"]:
        """The finished volume on the sampler's padded grid, not copied.

        Raises:
            LedgerError: a patch is missing.
            BatchError: the aggregator streams, so there never is a whole volume.
        """
        self.ledger.check_complete()
        if self._consumer is not None:
            raise BatchError("a streaming aggregator hands its planes to the consumer and keeps no volume.")
        if self._sums is None:
            raise BatchError("every patch is skipped: an empty batch (0, C, I, J, K) tells channels and type.")
        return self._sums.planes

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

    def close(self) -> None:
        """Leave the memory to the next volume; a streaming aggregator does so itself when it is complete."""
        for sums in (self._sums, self._cover):
            if sums is not None:
                sums.close()
        self._sums = self._cover = None

    def _check_order(self, places: list[Triple]) -> None:
        if self._consumer is None:
            return
        front, waiting = self._front, self._waiting.copy()
        for place in places:
            while front + 1 < len(waiting) and waiting[front] <= 0:
                front += 1
            if place[self._axis] > front:
                where = [self.grid.starts[self._axis][n] for n in (place[self._axis], front)]
                raise LedgerError(
                    f"a patch that starts at {where[0]} along {AXES[self._axis]} came while {waiting[front]} of those "
                    f"at {where[1]} are missing; streaming takes them start by start, see Grid.streaming_order."
                )
            waiting[place[self._axis]] -= 1

    def _room_for(self, batch: Tensor) -> Sums:
        channels, dtype, sums = batch.shape[1], self._dtype(batch.dtype), self._sums
        if sums is None:
            return self._opened(channels, dtype)
        if channels != sums.channels:
            raise PatchShapeError(f"patches with {channels} channels after patches with {sums.channels}.")
        if dtype != sums.dtype and torch.promote_types(dtype, sums.dtype) != sums.dtype:
            raise PatchShapeError(f"patches of {batch.dtype} after patches of {sums.dtype}, which cannot hold them.")
        return sums

    def _opened(self, channels: int, dtype: torch.dtype) -> Sums:
        window = None if self._consumer is None else self.grid.patch_size[self._axis]
        make = partial(
            Sums, self.grid, self._blend, self._axes, self._axis, window, device=self.device, buffers=self._buffers
        )
        if self.ledger.skipped:
            if isinstance(self._fill, Sequence) and len(self._fill) != channels:
                raise BatchError(f"fill has {len(self._fill)} values for patches with {channels} channels.")
            # Of the same type, so that a voxel that one patch has is divided by the very weight it was multiplied with.
            weights = dtype if dtype.is_floating_point else torch.float32
            self._cover = make(channels=1, dtype=weights, blank=True)
        return make(channels=channels, dtype=dtype)

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype.is_complex:
            raise BatchError(f"patches are {dtype}; complex numbers cannot be quilted; give two channels.")
        if self.dtype is not None:
            return self.dtype
        if not self._blend.averages:
            return dtype
        return torch.float64 if dtype == torch.float64 else torch.float32

    def _release(self, sums: Sums) -> None:
        """Hand over, or in a whole volume finish, the planes that are complete."""
        starts = self.grid.starts[self._axis]
        if self._front == len(starts):
            return  # an empty batch after the last
        while self._front < len(starts) and self._waiting[self._front] == 0:
            first, self._front = starts[self._front], self._front + 1
            stop = starts[self._front] if self._front < len(starts) else self.grid.shape[self._axis]
            if self._consumer is None:
                continue
            if self._cover is not None:
                for (_, planes), (_, cover) in zip(
                    sums.finished(first, stop), self._cover.finished(first, stop), strict=True
                ):
                    self._fill_up(planes, cover)
                    self._cover.clear(cover)
            for plane, planes in sums.finished(first, stop):
                self._consumer(Slab(self._axis, plane, plane + planes.shape[self._axis + 1], planes))
                sums.clear(planes)
        if self._front == len(starts):
            if self._consumer is not None:
                self.close()
            elif self._cover is not None:
                self._fill_up(sums.planes, self._cover.planes)

    def _fill_up(self, planes: Tensor, cover: Tensor) -> None:
        """Divide by the weights that came; where none came, there is the fill."""
        empty = cover[0] == 0
        if self._blend.averages:
            planes.div_(cover.masked_fill(empty, 1))
        fills = self._fill if isinstance(self._fill, Sequence) else repeat(self._fill)
        for channel, fill in zip(planes, fills, strict=False):
            channel.masked_fill_(empty, fill)


def _without_int64(output: Tensor) -> Tensor:
    limits = torch.iinfo(torch.int32)
    if output.min() < limits.min or output.max() > limits.max:
        warnings.warn("the output stays int64, since its values do not fit int32.", RuntimeWarning, stacklevel=3)
        return output.clone()
    warnings.warn("the output is converted from int64 to int32.", RuntimeWarning, stacklevel=3)
    return output.int()
