"""Hands over planes of a volume as soon as they are complete, while patches come row by row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.errors import BatchError, LedgerError, PatchShapeError
from voxquilt.geometry.frame import AXES
from voxquilt.geometry.grid import Grid
from voxquilt.geometry.slab_split import Part
from voxquilt.stitching.accumulator import Accumulator
from voxquilt.stitching.blend import Blend
from voxquilt.stitching.ledger import Ledger


@dataclass(frozen=True)
class FinishedPlanes:
    """Planes `start` to `stop`, end exclusive, along `axis` that are complete.

    `scores` is (C, I, J, K) with only these planes along the axis, on the sampler's padded (and downsampled) grid. It
    is a view of memory that is reused: the consumer must copy what it keeps before it returns.
    """

    axis: int
    start: int
    stop: int
    scores: Shaped[Tensor, "c i j k"]


class SlabStream:
    """Hands over planes as soon as no later patch covers them.

        patches of row n      |=================|
        patches of row n + 1            |=================|
        complete after row n  |=========|                     handed over; their memory in the ring is free

    The first planes of a part that follows another are finished by the other part: they are kept as the `head`.

    Args:
        sums: Where patches are accumulated: a ring of planes.
        ledger: Which patches of which part come.
        consumer: Called with finished planes, in order.
    """

    def __init__(self, sums: Accumulator, ledger: Ledger, consumer: Callable[[FinishedPlanes], None]) -> None:
        self._sums, self._ledger, self._consumer = sums, ledger, consumer
        self._grid, self._part, self._axis = sums.grid, ledger.part, ledger.part.axis
        # Patches that are missing in each row, and the first row where some are.
        self._waiting = ledger.missing_in_rows(self._axis)
        self._front = self._part.first
        first, stop = self._part.first, self._part.stop
        self._begin, self._end = (boundary(self._grid, sums.blend, self._axis, row) for row in (first, stop))
        # The first plane that has not been handed over.
        self._plane = self._begin.low
        self._head: list[list[Tensor]] = []

    def check(self, shape: Sequence[int], dtype: torch.dtype, numbers: Sequence[int]) -> None:
        """Refuse a batch that cannot be added, before any of its patches is.

        Args:
            shape: Shape of the batch, (B, C, pi, pj, pk).
            dtype: Type of the batch.
            numbers: Numbers of its patches in the grid.

        Raises:
            PatchShapeError: patches of another shape, of other channels, or of a type that the sums cannot hold.
            LedgerError: a patch comes before those of an earlier row are complete; both rows are named.
        """
        self._sums.check(shape, dtype)
        front, waiting = self._front, self._waiting.copy()
        for number in numbers:
            while front + 1 < self._part.stop and waiting[front] <= 0:
                front += 1
            row = self._row(number)
            if front < row < self._part.stop:
                where = [self._grid.starts[self._axis][n] for n in (row, front)]
                raise LedgerError(
                    f"a patch that starts at {where[0]} along {AXES[self._axis]} came while {waiting[front]} of those "
                    f"at {where[1]} are missing; streaming takes them start by start, see Grid.streaming_order."
                )
            waiting[row] -= 1

    def add(self, batch: Shaped[Tensor, "b c pi pj pk"], numbers: Sequence[int]) -> None:
        """Add patches, each with its number in the grid, and hand over the planes that they complete."""
        # Planes whose patches are all skipped are handed over first: the next planes need their memory in the ring.
        self._release()
        first = 0
        for row, same_row in groupby(numbers, self._row):
            stop = first + len(list(same_row))
            self._sums.add(batch[first:stop], numbers[first:stop])
            self._waiting[row] -= stop - first
            self._release()
            first = stop
        if self.finished:
            self.close()

    def join(self, head: list[Tensor]) -> None:
        """Add the head of the part that follows, and hand over the planes that were waiting for it.

        Raises:
            BatchError: no part follows.
            PatchShapeError: the head is not that of the part that follows.
            LedgerError: a patch of this part is missing, or a head came before.
        """
        if not self.has_next:
            raise BatchError(f"no part follows {self._part}: there is no head to join.")
        self._ledger.check_complete()
        if self.finished:
            raise LedgerError(f"a head came twice to {self._part}.")
        shape = list(self._grid.shape)
        shape[self._axis] = self._end.high + 1 - self._end.low
        wanted = [((channels, *shape), dtype) for channels, dtype in self._sums.layouts]
        received = [(tuple(planes.shape), planes.dtype) for planes in head]
        if received != wanted:
            raise PatchShapeError(f"the head of the next part is {received}; wanted is {wanted}.")
        self._sums.join(self._end.low, head)
        self._hand_over(self._end.high + 1)
        self.close()

    def head(self) -> list[Tensor] | None:
        """The sums that the part before needs; see GridAggregator.head."""
        if self._part.first == 0:
            return []
        if self._plane <= self._begin.high:
            return None
        # Not inference tensors, which cannot be modified outside of inference mode.
        with torch.inference_mode(False):
            return [torch.cat(pieces, self._axis + 1).contiguous() for pieces in zip(*self._head, strict=True)]

    @property
    def head_size(self) -> int:
        """Number of tensors of a head: sums, and for some blends sums of weights."""
        return len(self._sums.layouts)

    @property
    def has_next(self) -> bool:
        """Whether another part follows, whose head this one needs."""
        return self._part.stop < self._grid.counts[self._axis]

    @property
    def finished(self) -> bool:
        """Whether all planes have been handed over."""
        return self._plane == self._end.high + self.has_next

    def check_finished(self) -> None:
        """Raises LedgerError, naming what is missing: a patch's location, or the head of the part that follows."""
        self._ledger.check_complete()
        if not self.finished:
            raise LedgerError(f"planes of {self._part} are not finished: the head of the next part is missing.")

    def to(self, device: torch.device) -> None:
        """Move all sums to another device, and keep those to come there."""
        self._sums.to(device)

    def close(self) -> None:
        """Release the memory for the next volume."""
        self._sums.close()

    def _row(self, number: int) -> int:
        return self._grid.place(number)[self._axis]

    def _release(self) -> None:
        starts = self._grid.starts[self._axis]
        while self._front < self._part.stop and self._waiting[self._front] == 0:
            self._front += 1
            self._hand_over(self._end.low if self._front == self._part.stop else starts[self._front])

    def _hand_over(self, until: int) -> None:
        dim, high = self._axis + 1, self._begin.high
        # With a blend that copies, planes begin behind the first row's start, and perhaps behind the next row's.
        for plane, raw in self._sums.raw(self._plane, max(self._plane, until)):
            count = raw[0].shape[dim]
            shared = min(max(high - plane, 0), count)
            if self._part.first and plane <= high:
                kept = min(shared + 1, count)
                self._head.append([planes.narrow(dim, 0, kept).to("cpu", copy=True) for planes in raw])
            if shared < count:
                own = self._sums.finish([planes.narrow(dim, shared, count - shared) for planes in raw])
                self._consumer(FinishedPlanes(self._axis, plane + shared, plane + count, own))
            self._sums.clear(plane, plane + count)
        self._plane = max(self._plane, until)


@dataclass(frozen=True)
class Boundary:
    """The planes around the boundary between two rows.

    Args:
        low, high: Planes `low` to `high`, end exclusive, have contributions of rows on both sides; planes from `high`
            on only of later rows.
    """

    low: int
    high: int


def boundary(grid: Grid, blend: Blend, axis: int, row: int) -> Boundary:
    """The boundary before a row; before the first row and after the last it is the volume's end."""
    starts = grid.starts[axis]
    if row == 0:
        return Boundary(0, 0)
    if row == len(starts):
        return Boundary(grid.shape[axis], grid.shape[axis])
    if blend.averages:
        return Boundary(starts[row], starts[row - 1] + grid.patch_size[axis])
    owned = starts[row] + int(blend.axis_weights(grid, axis)[row].nonzero()[0])
    return Boundary(owned, owned)


def planes_of(part: Part, grid: Grid, blend: Blend) -> range:
    """The planes that a part finishes; together the parts finish every plane once."""
    return range(*(boundary(grid, blend, part.axis, row).high for row in (part.first, part.stop)))
