"""Where are weighted sums kept? In planes along one axis: those of the whole volume, or a ring as long as a patch."""

from collections.abc import Iterator
from math import prod

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor

from voxquilt.geometry.frame import Triple
from voxquilt.geometry.grid import Grid
from voxquilt.stitching.blend import Blend
from voxquilt.stitching.buffer_pool import BufferPool


class Sums:
    """Weighted sums of patches; plane p along `axis` is kept at p modulo `window`.

    Args:
        grid: Where patches lie.
        blend: Their shares.
        weights: The blend's `axis_weights` along i, j, k.
        axis: Along which planes are kept.
        window: How many planes are in memory, at least as many as a patch has; None for the whole volume.
        channels, dtype, device: Of the sums.
        buffers: Where memory comes from and goes to.
        blank: Start every plane from zero, also where a blend that copies writes each voxel in any case.
    """

    def __init__(
        self,
        grid: Grid,
        blend: Blend,
        weights: list[Float64[Tensor, "_ _"]],
        axis: int,
        window: int | None,
        *,
        channels: int,
        dtype: torch.dtype,
        device: torch.device,
        buffers: BufferPool,
        blank: bool = False,
    ) -> None:
        self.channels, self.dtype, self.device = channels, dtype, device
        self._grid, self._axis, self._buffers = grid, axis, buffers
        self._window = grid.shape[axis] if window is None else window
        self._averages = blend.averages
        self._blank = blank or blend.averages
        self._weights = [w.to(device, dtype) for w in weights] if blend.averages else []
        self._owned = [] if blend.averages else [[_owned(w) for w in along] for along in weights]
        shape = list(grid.shape)
        shape[axis] = self._window
        count = channels * prod(shape)
        self._memory = buffers.take(count, dtype, device)
        with torch.inference_mode(False):
            flat = self._memory[:count]
            self._patch = torch.empty(grid.patch_size if blend.averages else 0, dtype=dtype, device=device)
            if self._blank:
                flat.zero_()
            if window is None or axis == 2:
                # Patches are one piece of memory along k: so must be what they are added to, or adding takes twice as
                # long or more.
                self.planes = flat.view(channels, *shape)
            else:
                # Plane by plane, so that what is handed over is one piece of memory.
                del shape[axis]
                self.planes = flat.view(self._window, channels, *shape).movedim(0, axis + 1)

    def add(self, patch: Shaped[Tensor, "c pi pj pk"], place: Triple) -> None:
        """Add a patch with its weights, or copy the part of it that it owns."""
        first = [0, 0, 0]
        sums, weights = self.planes, patch
        if self._averages:
            i, j, k = (along[n] for along, n in zip(self._weights, place, strict=True))
            weights = torch.mul(i[:, None, None], j[:, None] * k, out=self._patch)
        else:
            for n, along in enumerate(self._owned):
                first[n], count = along[place[n]]
                patch = patch.narrow(n + 1, first[n], count)
        for n in (n for n in range(3) if n != self._axis):
            sums = sums.narrow(n + 1, self._grid.starts[n][place[n]] + first[n], patch.shape[n + 1])
        dim, plane = self._axis + 1, self._grid.starts[self._axis][place[self._axis]] + first[self._axis]
        for start, count, kept in self._pieces(plane, patch.shape[dim]):
            into, values = sums.narrow(dim, kept, count), patch.narrow(dim, start - plane, count)
            if self._averages:
                into.addcmul_(values.to(sums), weights.narrow(self._axis, start - plane, count))
            else:
                into.copy_(values)

    def join(self, start: int, planes: Shaped[Tensor, "c i j k"]) -> None:
        """Add planes from `start` on that were summed elsewhere, or copy them."""
        values = planes.to(self.device)
        for plane, into in self.finished(start, start + planes.shape[self._axis + 1]):
            some = values.narrow(self._axis + 1, plane - start, into.shape[self._axis + 1])
            if self._averages:
                into.add_(some)
            else:
                into.copy_(some)

    def finished(self, start: int, stop: int) -> list[tuple[int, Shaped[Tensor, "c i j k"]]]:
        """The planes `start` to `stop`, in the pieces in which they lie in memory, each with its first plane."""
        dim = self._axis + 1
        return [(p, self.planes.narrow(dim, kept, n)) for p, n, kept in self._pieces(start, stop - start)]

    def clear(self, planes: Shaped[Tensor, "c i j k"]) -> None:
        """Make ready what `finished` gave for the planes to come."""
        if self._blank:
            planes.zero_()

    def to(self, device: torch.device) -> None:
        """Move what is kept to another device."""
        with torch.inference_mode(False):
            memory = torch.empty_like(self._memory, device=device)
            self._patch = torch.empty_like(self._patch, device=device)
        memory.copy_(self._memory)
        self.planes = memory.as_strided(self.planes.shape, self.planes.stride(), self.planes.storage_offset())
        self._weights = [weights.to(device) for weights in self._weights]
        self._memory, self.device = memory, device

    def close(self) -> None:
        """Leave the memory to the next volume."""
        self._buffers.give(self._memory)

    def _pieces(self, plane: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(first plane, how many, where they are kept) of planes that lie together in the ring."""
        stop = plane + count
        while plane < stop:
            kept = plane % self._window
            count = min(stop - plane, self._window - kept)
            yield plane, count, kept
            plane += count


def _owned(weights: Shaped[Tensor, "p"]) -> tuple[int, int]:
    """Where a window of zeros and ones has its ones: the first and how many."""
    owned = weights.nonzero()
    return int(owned[0]), len(owned)
