"""Which planes are complete while patches come row by row, and who gets them? The consumer, or the part before."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.errors import LedgerError, PatchShapeError
from voxquilt.geometry.frame import AXES, Triple
from voxquilt.geometry.grid import Grid
from voxquilt.geometry.slab_split import Part
from voxquilt.stitching.blend import Blend
from voxquilt.stitching.blended import Blended
from voxquilt.stitching.ledger import Ledger


@dataclass(frozen=True)
class FinishedPlanes:
    """Planes `start` to `stop`, end exclusive, along `axis` that are complete.

    `scores` is (C, I, J, K) with only these planes along the axis, on the sampler's padded (and downsampled) grid. It
    is a view of memory that is used again: what is to be kept must be copied before the consumer returns.
    """

    axis: int
    start: int
    stop: int
    scores: Shaped[Tensor, "c i j k"]


class SlabStream:
    """Hands over planes as soon as no later patch touches them.

        patches of row n      |=================|
        patches of row n + 1            |=================|
        complete after row n  |=========|                     handed over, and their place in the ring is free

    The first planes of a part that follows another are the other's to finish: they are kept as its `head`.

    Args:
        ledger: Which patches come.
        grid: Where they lie, downsampled.
        blend: Their shares.
        part: The rows that come.
        consumer: Called with each finished FinishedPlanes, in order.
    """

    def __init__(
        self, ledger: Ledger, grid: Grid, blend: Blend, part: Part, consumer: Callable[[FinishedPlanes], None]
    ) -> None:
        self._grid, self._part, self._axis, self._consumer = grid, part, part.axis, consumer
        # Patches that are missing in each row, and the first row where some are.
        rows = np.moveaxis(~ledger.arrived, part.axis, 0).reshape(grid.counts[part.axis], -1)
        self._waiting: list[int] = rows.sum(1).tolist()
        self._front = part.first
        self._begin, self._end = (boundary(grid, blend, part.axis, row) for row in (part.first, part.stop))
        # Up to here planes have left.
        self._plane = self._begin.low
        self._head: list[list[Tensor]] = []

    def check_order(self, places: list[Triple]) -> None:
        """Raises LedgerError, naming both rows, for a patch that comes before its turn."""
        front, waiting = self._front, self._waiting.copy()
        for place in places:
            while front + 1 < self._part.stop and waiting[front] <= 0:
                front += 1
            if place in self._part and place[self._axis] > front:
                where = [self._grid.starts[self._axis][n] for n in (place[self._axis], front)]
                raise LedgerError(
                    f"a patch that starts at {where[0]} along {AXES[self._axis]} came while {waiting[front]} of those "
                    f"at {where[1]} are missing; streaming takes them start by start, see Grid.streaming_order."
                )
            waiting[place[self._axis]] -= 1

    def add(self, blended: Blended, patches: Iterable[tuple[Tensor, Triple]]) -> None:
        """Add (C, pi, pj, pk) patches, each with its numbers along i, j, k, and hand over what they complete."""
        # Planes of which all patches are skipped leave first: in the ring they are where the next ones will be.
        self._release(blended)
        for patch, place in patches:
            blended.add(patch, place)
            self._waiting[place[self._axis]] -= 1
            self._release(blended)

    def join(self, blended: Blended, head: list[Tensor]) -> None:
        """Take in the head of the part that follows, and hand over the planes that were waiting for it.

        Raises:
            PatchShapeError: it is not what this part's neighbour would send.
        """
        shape = list(self._grid.shape)
        shape[self._axis] = self._end.high + 1 - self._end.low
        wanted = [((channels, *shape), dtype) for channels, dtype in blended.forms]
        found = [(tuple(planes.shape), planes.dtype) for planes in head]
        if found != wanted:
            raise PatchShapeError(f"the head of the next part is {found}; wanted is {wanted}.")
        blended.join(self._end.low, head)
        self._hand_over(blended, self._end.high + 1)

    def head(self) -> list[Tensor] | None:
        """What the part before needs of this one; see GridAggregator.head."""
        if self._part.first == 0:
            return []
        if self._plane <= self._begin.high:
            return None
        # Not inference tensors, which could not be received into where they are sent from.
        with torch.inference_mode(False):
            return [torch.cat(pieces, self._axis + 1).contiguous() for pieces in zip(*self._head, strict=True)]

    @property
    def follows(self) -> bool:
        """Whether another part follows, whose head is needed."""
        return self._part.stop < self._grid.counts[self._axis]

    @property
    def finished(self) -> bool:
        """Whether all planes have been handed over."""
        return self._plane == self._end.high + self.follows

    def _release(self, blended: Blended) -> None:
        starts = self._grid.starts[self._axis]
        while self._front < self._part.stop and self._waiting[self._front] == 0:
            self._front += 1
            self._hand_over(blended, self._end.low if self._front == self._part.stop else starts[self._front])

    def _hand_over(self, blended: Blended, until: int) -> None:
        dim, high = self._axis + 1, self._begin.high
        # A blend that copies begins behind the first row's start, perhaps behind the next one's.
        for plane, raw in blended.raw(self._plane, max(self._plane, until)):
            count = raw[0].shape[dim]
            shared = min(max(high - plane, 0), count)
            if self._part.first and plane <= high:
                kept = min(shared + 1, count)
                self._head.append([planes.narrow(dim, 0, kept).to("cpu", copy=True) for planes in raw])
            if shared < count:
                own = blended.finish([planes.narrow(dim, shared, count - shared) for planes in raw])
                self._consumer(FinishedPlanes(self._axis, plane + shared, plane + count, own))
            blended.clear(raw)
        self._plane = max(self._plane, until)


@dataclass(frozen=True)
class Boundary:
    """Planes `low` to `high`, end exclusive, have contributions from rows on either side, those from `high` on of later
    rows alone."""

    low: int
    high: int


def boundary(grid: Grid, blend: Blend, axis: int, row: int) -> Boundary:
    """The boundary before a row; before the first and after the last it is the volume's own."""
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
    """The planes that a part finishes; those of all parts are all planes, each once."""
    return range(*(boundary(grid, blend, part.axis, row).high for row in (part.first, part.stop)))
