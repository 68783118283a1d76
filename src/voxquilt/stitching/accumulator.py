"""Accumulates weighted patches in planes along one axis: all planes of a volume, or a ring as long as a patch."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from math import prod

import torch
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.errors import BatchError, PatchShapeError
from voxquilt.geometry.grid import Grid
from voxquilt.stitching.blend import Blend
from voxquilt.stitching.buffer_pool import BufferPool
from voxquilt.stitching.execution import ON_HOST, Execution
from voxquilt.stitching.kernels.loading import load_blend_add
from voxquilt.stitching.patch_shares import patch_shares
from voxquilt.stitching.sum_type import SumType


class Accumulator:
    """Blends patches in planes of one volume; plane p along `axis` is kept at p modulo `window`.

    Args:
        grid: Where patches lie.
        blend: The weights of patches.
        axis: Axis along which planes are kept.
        window: Number of planes in memory, at least as many as a patch has; None for the whole volume.
        channels: Channels of the patches.
        types: Types of sums and of finished planes.
        device: Where sums are kept.
        buffers: Memory that volumes reuse one after the other.
        fill: Values of voxels that no patch covers, one per channel or one for all; None if every patch comes.
        execution: Whether kernels add patches.

    Raises:
        BatchError: (a ValueError) another number of fill values than channels.
    """

    def __init__(
        self,
        grid: Grid,
        blend: Blend,
        axis: int,
        window: int | None,
        *,
        channels: int,
        types: SumType,
        device: torch.device,
        buffers: BufferPool,
        fill: float | Sequence[float] | None = None,
        execution: Execution = ON_HOST,
    ) -> None:
        if isinstance(fill, Sequence) and len(fill) != channels:
            raise BatchError(f"fill has {len(fill)} values for patches with {channels} channels.")
        self.channels, self.types, self.device = channels, types, device
        self.grid, self.blend, self._axis, self._buffers = grid, blend, axis, buffers
        self._window = grid.shape[axis] if window is None else window
        voxels, self._fill = prod(grid.shape) // grid.shape[axis] * self._window, fill
        self._weights, self._floor, self._owned = patch_shares(blend, grid, types.sums, device)
        patch = grid.patch_size if blend.averages else (0,)
        with torch.inference_mode(False):
            self._product = torch.empty(patch, dtype=types.sums, device=device)
        # Sums of weights have the type of the sums: one patch's voxel is divided by exactly the weight that it had.
        of_weights = types.sums if types.sums.is_floating_point else torch.float32
        kept = [(channels, types.sums), (1, of_weights)][: 1 if fill is None and self._floor is None else 2]
        self._memory = [buffers.take(n * voxels, dtype, device) for n, dtype in kept]
        self._planes = [
            _view_planes(memory, n, grid, axis, window) for memory, (n, _) in zip(self._memory, kept, strict=True)
        ]
        # A blend that copies writes every voxel, unless patches are missing.
        self._blank = [blend.averages, True][: len(kept)]
        for planes, blank in zip(self._planes, self._blank, strict=True):
            if blank:
                planes.zero_()
        uses_kernel = execution.kernels and blend.averages and self._floor is None
        self._kernel = load_blend_add(grid, axis, self._weights, self._planes) if uses_kernel else None

    @property
    def planes(self) -> Shaped[Tensor, "c i j k"]:
        """The sums of all planes in memory."""
        return self._planes[0]

    @property
    def layouts(self) -> list[tuple[int, torch.dtype]]:
        """Channels and types of what is kept: sums, and where these do not sum to 1 also sums of weights."""
        return [(len(planes), planes.dtype) for planes in self._planes]

    def check(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Refuse patches of another shape or other channels, or of a type that the sums cannot hold.

        Raises:
            PatchShapeError: the shape, the channels or the type is wrong.
            BatchError: complex numbers.
        """
        if tuple(shape[2:]) != self.grid.patch_size:
            raise PatchShapeError(
                f"patches of {tuple(shape[2:])} voxels: the shape does not match the shape of the target "
                f"location, {self.grid.patch_size}."
            )
        if shape[1] != self.channels:
            raise PatchShapeError(f"patches with {shape[1]} channels after patches with {self.channels}.")
        types = SumType.of_patches(dtype, self.blend, self.types.wanted, self._fill)
        kept = self.types.sums
        if types.sums != kept and torch.promote_types(types.sums, kept) != kept:
            raise PatchShapeError(f"patches of {dtype} after patches of {kept}, which cannot hold them.")

    def add(self, batch: Shaped[Tensor, "b c pi pj pk"], numbers: Sequence[int]) -> None:
        """Add patches with their weights, or copy the voxels that they own.

        Args:
            batch: Patches of any type; along a ring, all of one row.
            numbers: Their numbers in the grid.
        """
        # Means of floating-point patches are not rounded.
        if len(batch) and batch.is_floating_point() and self.types.rounds:
            self.types = replace(self.types, rounds=False)
        if len(batch) and self._kernel is not None and self._kernel.takes(batch):
            self._kernel(batch, numbers)
            return
        for patch, number in zip(batch, numbers, strict=True):
            self._add_patch(patch, number)

    def join(self, start: int, raw: list[Shaped[Tensor, "_ i j k"]]) -> None:
        """Add planes from `start` on that were accumulated by another process: one tensor for each of `layouts`."""
        dim = self._axis + 1
        for kept, planes in zip(self._planes, raw, strict=True):
            values = planes.to(self.device)
            for plane, count, place in _pieces(start, planes.shape[dim], self._window):
                into, other = kept.narrow(dim, place, count), values.narrow(dim, plane - start, count)
                if self.blend.averages:
                    into.add_(other)
                else:
                    into.copy_(other)

    def raw(self, start: int, stop: int) -> Iterator[tuple[int, list[Tensor]]]:
        """The planes `start` to `stop` of each of `layouts`, in the pieces in which they lie in memory.

        Yields:
            The first plane of a piece, and its tensors.
        """
        for plane, count, place in _pieces(start, stop - start, self._window):
            yield plane, [planes.narrow(self._axis + 1, place, count) for planes in self._planes]

    def finish(self, raw: list[Tensor]) -> Shaped[Tensor, "c i j k"]:
        """Turn complete planes into scores; in place, unless the type of scores is another. Call it once per plane."""
        planes, *covers = raw
        for cover in covers:
            if self.blend.averages:
                planes.div_(cover.masked_fill(cover == 0, 1))
        if self.types.rounds:
            _round_if_near(planes)
        for cover in covers:
            empty = cover[0] == 0
            fills = self._fill if isinstance(self._fill, Sequence) else repeat(self._fill or 0.0)
            for channel, fill in zip(planes, fills, strict=False):
                channel.masked_fill_(empty, fill)
        return planes.to(self.types.output)

    def finish_all(self) -> None:
        """Finish every plane, where the whole volume is in memory."""
        for _, raw in self.raw(0, self.grid.shape[self._axis]):
            self.finish(raw)

    def clear(self, start: int, stop: int) -> None:
        """Clear the memory of the planes `start` to `stop` for the planes that follow."""
        for _, count, place in _pieces(start, stop - start, self._window):
            for planes, blank in zip(self._planes, self._blank, strict=True):
                if blank:
                    planes.narrow(self._axis + 1, place, count).zero_()

    def to(self, device: torch.device) -> None:
        """Move the sums to another device."""
        with torch.inference_mode(False):
            memory = [torch.empty_like(old, device=device) for old in self._memory]
            self._product = torch.empty_like(self._product, device=device)
        for new, old in zip(memory, self._memory, strict=True):
            new.copy_(old)
        self._planes = [
            new.as_strided(planes.shape, planes.stride(), planes.storage_offset())
            for new, planes in zip(memory, self._planes, strict=True)
        ]
        self._weights = [weights.to(device) for weights in self._weights]
        self._memory, self.device, self._kernel = memory, device, None

    def close(self) -> None:
        """Release the memory for the next volume; further calls do nothing."""
        for memory in self._memory:
            self._buffers.give(memory)
        self._memory, self._planes, self._kernel = [], [], None

    def _add_patch(self, patch: Shaped[Tensor, "c pi pj pk"], number: int) -> None:
        place, first = self.grid.place(number), [0, 0, 0]
        weights = patch
        if self.blend.averages:
            i, j, k = (along[n] for along, n in zip(self._weights, place, strict=True))
            weights = torch.mul(i[:, None, None], j[:, None] * k, out=self._product)
            weights = weights if self._floor is None else weights.clamp_(min=self._floor)
        else:
            for n, along in enumerate(self._owned):
                first[n], count = along[place[n]]
                patch = patch.narrow(n + 1, first[n], count)
        starts = [along[n] + skip for along, n, skip in zip(self.grid.starts, place, first, strict=True)]
        dim, plane = self._axis + 1, starts[self._axis]
        columns = [_select_patch(planes, self._axis, starts, patch) for planes in self._planes]
        for start, count, kept in _pieces(plane, patch.shape[dim], self._window):
            into, *covers = (planes.narrow(dim, kept, count) for planes in columns)
            values = patch.narrow(dim, start - plane, count)
            if self.blend.averages:
                shares = weights.narrow(self._axis, start - plane, count)
                # On a GPU, a conversion of its own would be one kernel more.
                into.addcmul_(values.to(into.device) if into.is_cuda else values.to(into), shares)
                for cover in covers:
                    cover.add_(shares)
            else:
                into.copy_(values)
                for cover in covers:
                    cover.fill_(1)


def _view_planes(memory: Shaped[Tensor, " n"], channels: int, grid: Grid, axis: int, window: int | None) -> Tensor:
    """The first of some memory as planes (C, I, J, K) of the whole volume or, of a ring, only `window` of them."""
    shape = list(grid.shape)
    shape[axis] = window or shape[axis]
    with torch.inference_mode(False):
        flat = memory[: channels * prod(shape)]
        if window is None or axis == 2:
            # Patches are contiguous along k: the sums must be so too, or adding takes at least twice as long.
            return flat.view(channels, *shape)
        # Plane by plane, so that finished planes are contiguous.
        del shape[axis]
        return flat.view(window, channels, *shape).movedim(0, axis + 1)


def _pieces(plane: int, count: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(first plane, number of planes, index in memory) of planes that lie together in a ring of `window` planes."""
    stop = plane + count
    while plane < stop:
        place = plane % window
        count = min(stop - plane, window - place)
        yield plane, count, place
        plane += count


def _select_patch(planes: Tensor, axis: int, starts: list[int], patch: Tensor) -> Tensor:
    """The voxels of all planes along an axis that a patch covers within them."""
    for n in range(3):
        if n != axis:
            planes = planes.narrow(n + 1, starts[n], patch.shape[n + 1])
    return planes


def _round_if_near(values: Tensor) -> None:
    """Round, in place, values that differ from an integer by no more than the rounding error of their sum.

    In double precision that error is at most 1e-11 of the value, for some thousands of patches per voxel; a mean of
    different integers is further from an integer, since every blend gives a patch at least 4e-11 of a shared voxel.
    """
    share = 1e-11 if values.dtype == torch.float64 else 16 * torch.finfo(values.dtype).eps
    nearest = values.round()
    near = (values - nearest).abs_() <= nearest.abs().clamp_(min=1).mul_(share)
    torch.where(near, nearest, values, out=values)
