"""Resamples planes of model space to native space as they come."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from voxquilt.geometry.axis_map import AxisMaps, Neighbours
from voxquilt.geometry.frame import Triple
from voxquilt.geometry.neighbour_tables import NeighbourTables
from voxquilt.geometry.resample import interpolate
from voxquilt.geometry.space import Where


@dataclass(frozen=True)
class Piece:
    """A box of native voxels, and the scores from which it is interpolated.

    Args:
        where: Slices along the native axes.
        source: (C, si, sj, sk), only the voxels of the scores around the box.
    """

    where: Where
    source: Shaped[Tensor, "c si sj sk"]
    _maps: AxisMaps
    _neighbours: list[Neighbours]
    _on_device: list[Neighbours]
    _linear: bool

    def restored(self, channels: Int[Tensor, " k"] | None = None) -> Shaped[Tensor, "d ti tj tk"]:
        """The scores of the box, for all channels or those given."""
        source = self.source if channels is None else self.source.index_select(0, channels)
        return interpolate(source, self._maps, self._neighbours, linear=self._linear, on_device=self._on_device)


@dataclass(frozen=True)
class Slab:
    """Planes of native voxels that are complete, and the scores from which they are interpolated.

    Args:
        where: Slices along the native axes: some planes along one, and all voxels along the others.
        start: The first plane of `planes` among all planes of the scores.
        planes: (C, si, sj, sk).
    """

    where: Where
    start: int
    planes: Shaped[Tensor, "c si sj sk"]


class Restorer:
    """Resamples scores to native space while their planes come in order.

    A native plane needs at most two model planes, or 36 for a cubic spline.

    Args:
        maps: Maps from native voxels to the scores (`Space.in_scores`).
        axis: The scores' axis along which planes come.
        shape: Voxels of the scores along i, j, k.
        linear: Whether to interpolate, or to take the nearest voxel, as labels require.
        voxels: Approximate number of values per piece.
        tile: The largest number of native voxels of a piece along each axis, whose interpolation is a product of
            matrices: fastest, but not equal to the bit however planes are handed over. None for whole rows.
        planes: Only native planes whose lower plane of the scores is in this range are handed out. `feed` takes the
            scores' planes of this range and the plane behind it. None for all planes.
    """

    def __init__(
        self,
        maps: AxisMaps,
        axis: int,
        shape: Triple,
        *,
        linear: bool = True,
        voxels: int = 2**22,
        tile: int | None = None,
        planes: range | None = None,
    ) -> None:
        self.axis = [m.axis for m in maps].index(axis)
        """The native axis that runs along `axis`."""
        self._across, self._along = sorted((n for n in range(3) if n != self.axis), key=lambda n: -maps[n].size)
        self._maps, self.source_axis, self._linear = maps, axis, linear
        self._voxels, self._tile = voxels, tile
        by_weights = tile is not None
        are_small = all(m.is_small(shape[m.axis], by_weights=by_weights) for m in maps)
        self.tables = (_tables if are_small else _tables.__wrapped__)(maps, self.axis, shape, linear, by_weights)
        self._neighbours = self.tables.on_host
        # Native planes in the order in which their model planes come, and how many have been handed out.
        self._ascending = maps[self.axis].scale > 0
        # The first and last plane of the scores that each native plane needs, in the order in which these come.
        order = 1 if self._ascending else -1
        self._below, self._above = (side.tolist()[::order] for side in self._neighbours[self.axis][:2])
        planes = range(shape[axis]) if planes is None else planes
        self._done, self._until = (bisect_left(self._below, end) for end in (planes.start, planes.stop))
        first, stop, size = self._done, self._until, maps[self.axis].size
        self.native = range(first, stop) if self._ascending else range(size - stop, size - first)
        """The planes along `self.axis` that are handed out."""
        # Planes that later native planes need too, and the first of them.
        self._kept: Tensor | None = None
        self._kept_from = 0

    def feed(self, start: int, planes: Shaped[Tensor, "c si sj sk"]) -> Iterator[Piece]:
        """Take planes from `start` on, which follow those of the last call; hand out complete native voxels."""
        for slab in self.slabs(start, planes):
            yield from self.pieces(slab)

    def slabs(self, start: int, planes: Shaped[Tensor, "c si sj sk"]) -> Iterator[Slab]:
        """Take planes as `feed` does; hand out complete native planes, at most two slabs of them."""
        dim = self.source_axis + 1
        stop = start + planes.shape[dim]
        ready = min(bisect_left(self._above, stop), self._until)
        held = min(bisect_left(self._below, start), ready)
        if self._done < held:
            # These lie between the last planes of the previous calls and the first of this one.
            assert self._kept is not None
            more = planes.narrow(dim, 0, max(0, self._above[held - 1] + 1 - start))
            yield self._slab(torch.cat([self._kept.to(more.device), more], dim), self._kept_from, held)
        if self._done < ready:
            yield self._slab(planes, start, ready)
        self._keep(self._below[ready] if ready < self._until else stop, start, planes)

    def _keep(self, first: int, start: int, planes: Tensor) -> None:
        """Keep the planes from `first` on for the next call, of those kept before and those that start at `start`."""
        dim = self.source_axis + 1
        stop = start + planes.shape[dim]
        new = planes.narrow(dim, max(first - start, 0), stop - max(first, start)) if first < stop else None
        if new is not None and first < start and self._kept is not None:
            older = self._kept.narrow(dim, first - self._kept_from, start - first)
            new = torch.cat([older.to(new.device), new], dim)
        self._kept, self._kept_from = None if new is None else new.clone(), first

    def pieces(self, slab: Slab) -> Iterator[Piece]:
        """Divide a slab into pieces."""
        planes, along = slab.planes, slab.where[self.axis]
        rows, columns = self._maps[self._across].size, self._maps[self._along].size
        # On a GPU small pieces have no advantage in the cache, and each takes the start of many kernels.
        larger = 8 if planes.is_cuda else 1
        budget = max(1, larger * self._voxels // len(planes))
        # Memory is best read plane by plane, or, if planes lie along its fastest axis, row by row for many planes.
        fastest = planes.stride(self.source_axis + 1) == 1
        step = min(along.stop - along.start, max(1, budget // (columns if fastest else rows * columns)))
        # A single plane of many channels is large. Memory for small pieces stays in the cache and is reused; first use
        # of new memory from the operating system takes longer than interpolating.
        high, wide = max(1, min(rows, budget // step // columns)), columns
        if self._tile is not None:
            step = high = wide = self._tile
        firsts = range(along.start, along.stop, step), range(0, rows, high), range(0, columns, wide)
        for first, row, column in product(*firsts):
            where = [slice(first, min(first + step, along.stop))] * 3
            where[self._across] = slice(row, min(row + high, rows))
            where[self._along] = slice(column, min(column + wide, columns))
            yield self._piece(planes, slab.start, (where[0], where[1], where[2]))

    def _slab(self, planes: Tensor, start: int, until: int) -> Slab:
        """The native planes from `_done` on, up to `until`, which are done then."""
        where, total = [slice(0, m.size) for m in self._maps], self._maps[self.axis].size
        first, stop = (self._done, until) if self._ascending else (total - until, total - self._done)
        where[self.axis] = slice(first, stop)
        self._done = until
        return Slab((where[0], where[1], where[2]), start, planes)

    def _piece(self, planes: Tensor, start: int, where: Where) -> Piece:
        neighbours: list[Neighbours] = []
        on_device: list[Neighbours] = []
        for n, (m, w) in enumerate(zip(self._maps, where, strict=True)):
            along = self._neighbours[n]
            low, high = int(along.below[w].min()), int(along.above[w].max())
            planes = planes.narrow(m.axis + 1, low - (start if n == self.axis else 0), high - low + 1)
            neighbours.append(along.part(w, low, high))
            if planes.device.type != "cpu":
                on_device.append(self.tables.on(planes.device)[n].part(w, low, high))
        return Piece(where, planes, self._maps, neighbours, on_device or neighbours, self._linear)


# For the volumes of a cohort that are alike. Few, since the weights of splines and tiles take megabytes.
@lru_cache(maxsize=4)
def _tables(maps: AxisMaps, axis: int, shape: Triple, linear: bool, by_weights: bool) -> NeighbourTables:
    """The neighbours that a Restorer needs, whose native planes come along `axis`."""
    with torch.inference_mode(False):  # whoever is first to ask, others may ask outside of it
        neighbours = [(m if linear else m.without_spline()).neighbours(shape[m.axis]) for m in maps]
        if by_weights:
            neighbours = [n.by_weights(shape[m.axis]) for n, m in zip(neighbours, maps, strict=True)]
        along = neighbours[axis]
        if maps[axis].order < 3 or along.weights is None:
            # A plane that is copied need not wait for the plane above it.
            neighbours[axis] = along._replace(above=torch.where(along.share > 0, along.above, along.below))
    return NeighbourTables(neighbours)
