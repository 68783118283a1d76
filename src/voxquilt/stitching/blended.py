"""What do patches come to? Weighted sums, divided by the weights that came where some patches never come."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import repeat

import torch
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.geometry.frame import Triple
from voxquilt.geometry.grid import Grid
from voxquilt.stitching.accumulator import Sums
from voxquilt.stitching.blend import Blend
from voxquilt.stitching.buffer_pool import BufferPool


class Blended:
    """Planes of blended patches.

    Args:
        grid, blend, axis, window, channels, dtype, device, buffers: See Sums.
        fill: What voxels hold that no patch has, a value for each channel or one for all; None where every patch comes.
        integers: Whether patches are of an integer or bool type. Means of these that differ from an integer by no more
            than rounding are made that integer: where all patches of a voxel agree, it comes back exactly.
        output: The type of finished planes; None for that of the sums.
    """

    def __init__(
        self,
        grid: Grid,
        blend: Blend,
        axis: int,
        window: int | None,
        *,
        channels: int,
        dtype: torch.dtype,
        device: torch.device,
        buffers: BufferPool,
        fill: float | Sequence[float] | None = None,
        integers: bool = False,
        output: torch.dtype | None = None,
    ) -> None:
        weights = [blend.axis_weights(grid, n) for n in range(3)]
        make = partial(Sums, grid, blend, weights, axis, window, device=device, buffers=buffers)
        self._averages = blend.averages
        self._fills = fill if isinstance(fill, Sequence) else repeat(fill or 0.0)
        self._sums = make(channels=channels, dtype=dtype)
        # Of the same type, so that a voxel that one patch has is divided by the very weight it was multiplied with.
        of_weights = dtype if dtype.is_floating_point else torch.float32
        self._cover = [] if fill is None else [make(channels=1, dtype=of_weights, blank=True)]
        self.channels, self.dtype, self.output = channels, dtype, output or dtype
        self.integers = integers and blend.averages and dtype in (torch.float32, torch.float64)

    @property
    def forms(self) -> list[tuple[int, torch.dtype]]:
        """Channels and type of what is kept: sums, and the weights that came where some patches do not."""
        return [(kept.channels, kept.dtype) for kept in self._kept]

    @property
    def planes(self) -> Shaped[Tensor, "c i j k"]:
        """The sums, all planes in memory."""
        return self._sums.planes

    def add(self, patch: Shaped[Tensor, "c pi pj pk"], place: Triple) -> None:
        """Add a patch with its weights."""
        self._sums.add(patch, place)
        for cover in self._cover:
            cover.add(patch.new_ones(1, dtype=cover.dtype).expand_as(patch[:1]), place)

    def join(self, start: int, raw: list[Tensor]) -> None:
        """Take in planes from `start` on that were summed elsewhere."""
        for kept, planes in zip(self._kept, raw, strict=True):
            kept.join(start, planes)

    def raw(self, start: int, stop: int) -> Iterator[tuple[int, list[Tensor]]]:
        """The planes `start` to `stop` of what is kept, in the pieces in which they lie in memory, each with its first
        plane."""
        for pieces in zip(*(kept.finished(start, stop) for kept in self._kept), strict=True):
            yield pieces[0][0], [planes for _, planes in pieces]

    def finish(self, raw: list[Tensor]) -> Shaped[Tensor, "c i j k"]:
        """Make scores of planes that are complete, in their place (but for another type); once."""
        planes, *covers = raw
        for cover in covers:
            if self._averages:
                planes.div_(cover.masked_fill(cover == 0, 1))
        if self.integers:
            _round_if_near(planes)
        for cover in covers:
            empty = cover[0] == 0
            for channel, fill in zip(planes, self._fills, strict=False):
                channel.masked_fill_(empty, fill)
        return planes.to(self.output)

    def clear(self, raw: list[Tensor]) -> None:
        """Make ready what `raw` gave for the planes to come."""
        for kept, planes in zip(self._kept, raw, strict=True):
            kept.clear(planes)

    def to(self, device: torch.device) -> None:
        """Move what is kept to another device."""
        for kept in self._kept:
            kept.to(device)

    def close(self) -> None:
        """Leave the memory to the next volume."""
        for kept in self._kept:
            kept.close()

    @property
    def _kept(self) -> list[Sums]:
        return [self._sums, *self._cover]


def _round_if_near(values: Tensor) -> None:
    """Make integers, in place, of values that differ from one by no more than sums of products may be off.

    In double precision that is 1e-11 of the value at most, for some thousands of patches a voxel; a mean of different
    integers is further away, since no blend gives a patch less than 4e-11 of a voxel beside others.
    """
    share = 1e-11 if values.dtype == torch.float64 else 16 * torch.finfo(values.dtype).eps
    whole = values.round()
    near = (values - whole).abs_() <= whole.abs().clamp_(min=1).mul_(share)
    torch.where(near, whole, values, out=values)
