"""Quilts patches back into a volume, with the interface that TorchIO users know."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from voxquilt.errors import BatchError, ConfigError, GridError, LedgerError, PatchShapeError
from voxquilt.geometry.frame import AXES, Padding, Triple, to_triple
from voxquilt.geometry.grid import Grid
from voxquilt.geometry.slab_split import Part, all_rows
from voxquilt.stitching.accumulator import Accumulator
from voxquilt.stitching.blend import Blend, to_blend
from voxquilt.stitching.buffer_pool import BufferPool
from voxquilt.stitching.execution import execution_on
from voxquilt.stitching.ledger import Ledger
from voxquilt.stitching.streaming import FinishedPlanes, SlabStream
from voxquilt.stitching.sum_type import SumType

_UNKNOWN = "channels and type are unknown, as every patch is skipped: add an empty batch (0, C, I, J, K)."


@runtime_checkable
class Placed(Protocol):
    """Where patches lie: the part of a GridSampler that a GridAggregator needs."""

    @property
    def grid(self) -> Grid: ...
    @property
    def padding(self) -> Padding: ...


class GridAggregator:
    """Quilts the patches of a GridSampler back into a volume.

    The interface is TorchIO 1.x's and so are the results, with these differences: patches may come in any order, sums
    are float32 (float64 for float64 patches and integers) whatever the patches are, a missing or repeated patch is an
    error, and memory is one volume, since weights are normalised beforehand (see `voxquilt.stitching.blend`). Where
    integer patches agree on a voxel, their mean is exactly that integer.

    >>> import voxquilt
    >>> sampler = voxquilt.GridSampler(torch.rand(1, 20, 18, 16), patch_size=8, patch_overlap=4)
    >>> aggregator = GridAggregator(sampler, "hann")
    >>> for patch in sampler:
    ...     outputs = patch["image"]["data"][None] + 1  # a network's outputs for a batch of one patch
    ...     aggregator.add_batch(outputs, patch["location"][None])
    >>> aggregator.get_output_tensor().shape
    torch.Size([1, 20, 18, 16])

    With a consumer it streams: patches come start by start along `axis` (in any order within a start), and planes are
    handed over as soon as no later patch covers them. Then memory is a ring of as many planes as a patch has, however
    long the volume is (see `voxquilt.stitching.streaming`). Several processes may share a volume: each aggregates a
    `part` of it.

    Args:
        sampler: The sampler that cut the patches, or another object with its grid and padding.
        overlap_mode: 'crop', 'average', 'hann', 'gaussian', or a `voxquilt.stitching.blend.Blend`.
        downsampling_factor: How many times fewer voxels the patches have than the sampler's, an integer or three.
        device: Where sums are kept.
        dtype: Type in which sums are accumulated; None is float32, or float64 for patches of float64 or integers; for
            'crop', which only copies, the patches' own type.
        consumer: Called with finished planes, in order.
        axis: Axis along which to stream; the grid's `streaming_axis` needs the least memory.
        buffers: Memory that volumes reuse one after the other.
        skipped: Numbers of patches that never come. Where other patches overlap them, those are averaged alone; voxels
            that no patch covers (for 'crop': whose owner is skipped) have the fill.
        fill: A value for all channels, or one per channel.
        part: The rows along `axis` whose patches come, while streaming; the others come to other aggregators.
            Neighbours exchange sums: `head` of one is given to `join` of the other. `skipped` has patches of all parts.

    Raises:
        ConfigError: (a ValueError) an unknown overlap_mode, or a part without a consumer or along another axis.
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
        consumer: Callable[[FinishedPlanes], None] | None = None,
        axis: int = 0,
        buffers: BufferPool | None = None,
        skipped: Iterable[int] = (),
        fill: float | Sequence[float] = 0.0,
        part: Part | None = None,
    ) -> None:
        if part is not None:
            _check_part(part, axis, streams=consumer is not None)
        self.factor = to_triple(downsampling_factor, "downsampling_factor", minimum=1)
        self.padding = sampler.padding
        self.grid = sampler.grid.downsampled(self.factor)
        part = part or all_rows(self.grid, axis)
        self.ledger = Ledger(sampler.grid, skipped, part)
        self.device = torch.device(device)
        self.dtype = dtype
        self._blend = to_blend(overlap_mode)
        self._axis = axis
        self._fill = fill if self.ledger.skipped else None
        self._buffers = buffers or BufferPool()
        self._consumer = consumer
        self._stream: SlabStream | None = None
        self._sums: Accumulator | None = None

    def add_batch(self, batch: Shaped[Tensor, "b c pi pj pk"], locations: Int[Tensor, "b 6"] | np.ndarray) -> None:
        """Add patches.

        Args:
            batch: (B, C, pi, pj, pk), any dtype.
            locations: (B, 6) as in the sampler's patches: i0, j0, k0, i1, j1, k1, end exclusive.

        Raises:
            BatchError: (a ValueError) another number of locations than of patches.
            PatchShapeError: (a RuntimeError) a wrong shape or location, other channels than before, or a type that the
                sums cannot hold.
            LedgerError: (a RuntimeError and AssertionError) a patch came before, or, while streaming, too early.
        """
        _check_batch(batch, locations, self.grid.patch_size, self.factor)
        numbers = [self.ledger.grid.find(location) for location in locations.tolist()]
        if self.finished:
            self.ledger.enter(numbers)  # raises an error unless the batch is empty
            return
        # Without the graph, which would hold every activation of a network that is called without no_grad.
        batch = batch.detach()
        sums = self._sums or self._make_accumulator(batch)
        sums.check(batch.shape, batch.dtype)
        stream = self._stream
        if self._consumer is not None:
            stream = stream or SlabStream(sums, self.ledger, self._consumer)
            stream.check(batch.shape, batch.dtype, numbers)
        self.ledger.enter(numbers)
        # The batch is accepted; one that is refused must not decide channels and type.
        self._sums, self._stream = sums, stream
        if stream is not None:
            stream.add(batch, numbers)
            return
        sums.add(batch, numbers)
        if self.finished:
            sums.finish_all()

    @property
    def finished(self) -> bool:
        """Whether every plane is finished; while streaming, handed over, including those shared with the next part."""
        if self._consumer is not None:
            return self._stream is not None and self._stream.finished
        return self._sums is not None and self.ledger.missing == 0

    def head(self) -> list[Tensor] | None:
        """The sums of the first planes, before division, which the part before this one needs for its `join`.

        Returns:
            (C, I, J, K) on the host with only these planes along the axis, and if patches are skipped the (1, I, J, K)
            sums of weights; None until they are complete; [] if no part is before this one.
        """
        if self._consumer is None or self.ledger.part.first == 0:
            return []
        return None if self._stream is None else self._stream.head()

    def join(self, head: list[Tensor]) -> None:
        """Add the `head` of the part that follows this one, and hand over the last planes.

        Raises:
            BatchError: (a ValueError) no part follows, or no batch has shown channels and type.
            PatchShapeError: (a RuntimeError) the head has other shapes or types than that of the part that follows.
            LedgerError: (a RuntimeError and AssertionError) a patch of this part is missing, or a head came before.
        """
        if self.ledger.part.stop == self.grid.counts[self.ledger.part.axis]:
            raise BatchError(f"no part follows {self.ledger.part}: there is no head to join.")
        self.ledger.check_complete()
        if self._stream is None:
            raise BatchError(_UNKNOWN)
        self._stream.join(head)

    def check_finished(self) -> None:
        """Raises LedgerError, naming what is missing: a patch's location, or the head of the part that follows."""
        self.ledger.check_complete()
        if not self.finished:
            raise LedgerError(f"planes of {self.ledger.part} are not finished: the head of the next part is missing.")

    def scores(self) -> Shaped[Tensor, "c i j k"]:
        """The finished volume on the sampler's padded grid; not a copy, except for means of integers.

        Raises:
            LedgerError: a patch is missing.
            BatchError: the aggregator streams, so it never holds a whole volume.
        """
        self.ledger.check_complete()
        if self._consumer is not None:
            raise BatchError("a streaming aggregator hands its planes to the consumer and keeps no volume.")
        if self._sums is None:
            raise BatchError(_UNKNOWN)
        return self._sums.planes.to(self._sums.types.output)

    def get_output_tensor(self) -> Shaped[Tensor, "c i j k"]:
        """The finished volume, without the sampler's padding.

        'crop' keeps the dtype of the patches, except that int64 becomes int32 with a RuntimeWarning where it fits, as
        in TorchIO; the others give float32, or float64 for float64 patches.

        Raises:
            LedgerError: a patch is missing.
            GridError: the padding is not a multiple of downsampling_factor.
        """
        output = _without_padding(self.scores(), self.padding, self.factor)
        return _without_int64(output) if output.dtype == torch.int64 else output.clone()

    def to(self, device: torch.device) -> None:
        """Move all sums to another device, and keep those to come there."""
        self.device = device
        if self._sums is not None:
            self._sums.to(device)

    def close(self) -> None:
        """Release the memory for the next volume; a streaming aggregator does so itself when it is finished."""
        if self._sums is not None:
            self._sums.close()
        self._sums = None

    def _make_accumulator(self, batch: Tensor) -> Accumulator:
        """An accumulator for the channels and the type of a batch."""
        window = None if self._consumer is None else self.grid.patch_size[self._axis]
        types = SumType.of_patches(batch.dtype, self._blend, self.dtype, self._fill)
        return Accumulator(
            self.grid, self._blend, self._axis, window, channels=batch.shape[1], types=types,
            device=self.device, buffers=self._buffers, fill=self._fill, execution=execution_on(self.device),
        )  # fmt: skip


def _check_part(part: Part, axis: int, *, streams: bool) -> None:
    if part.axis != axis or not streams:
        raise ConfigError(f"{part} is aggregated while streaming along its axis: give a consumer and axis={part.axis}.")


def _check_batch(batch: Tensor, locations: Tensor | np.ndarray, patch_size: Triple, factor: Triple) -> None:
    if batch.ndim != 5:
        raise PatchShapeError(f"a batch is (B, C, I, J, K); this one has {batch.ndim} axes: {tuple(batch.shape)}.")
    if tuple(locations.shape[1:]) != (6,):
        raise BatchError(f"locations are (B, 6); these are {tuple(locations.shape)}.")
    if len(batch) != len(locations):
        raise BatchError(f"the batch has {len(batch)} patches but there are {len(locations)} locations.")
    if tuple(batch.shape[2:]) != patch_size:
        after = "" if factor == (1, 1, 1) else f" after downsampling by {factor}"
        raise PatchShapeError(
            f"patches of {tuple(batch.shape[2:])} voxels: the shape does not match the shape of the target "
            f"location, {patch_size}{after}."
        )


def _without_padding(output: Tensor, padding: Padding, factor: Triple) -> Tensor:
    kept = []
    for axis, n, f, (before, after) in zip(AXES, output.shape[1:], factor, padding, strict=True):
        if before % f or after % f:
            raise GridError(f"axis {axis}: padding {before}, {after} is not a multiple of downsampling_factor {f}.")
        kept.append(slice(before // f, n - after // f))
    return output[:, *kept]


def _without_int64(output: Tensor) -> Tensor:
    limits = torch.iinfo(torch.int32)
    if output.min() < limits.min or output.max() > limits.max:
        warnings.warn("the output stays int64, since its values do not fit int32.", RuntimeWarning, stacklevel=3)
        return output.clone()
    warnings.warn("the output is converted from int64 to int32.", RuntimeWarning, stacklevel=3)
    return output.int()
