"""From native to model space, and back: which model coordinate does each native voxel have?

The two frames differ by axis permutation, flips, a spacing per axis and padding. All of these act on one axis at a
time: the mapping is three lines  x_model = scale * x_native + offset,  and interpolating is three 1-D interpolations.

    native axis   |   0   |   1   |   2   |   3   |   4   |   5   |     0.8 mm, six voxels
    model axis    |     0     |     1     |     2     |                 1.6 mm, three voxels on the same centre
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from voxquilt.geometry.frame import Frame, Triple, closest_axes, parse_axcodes, to_spacing, to_triple

Neighbours = tuple[Tensor, Tensor, Tensor]
Where = tuple[slice, slice, slice]


@dataclass(frozen=True)
class AxisMap:
    """Target voxel x lies at `scale * x + offset` on axis `axis` of the source.

    Args:
        axis: The source's axis.
        size: Voxels along the target's axis.
        scale, offset: In source voxels.
        within: The first source voxel that may be read and the one behind the last, where the source is padded; None
            for all of them.
    """

    axis: int
    size: int
    scale: float
    offset: float
    within: tuple[int, int] | None = None

    def neighbours(self, source_size: int) -> Neighbours:
        """For each target voxel the two source voxels around it, and the share of the second (0 on a source voxel).

        Beyond the centres of the outermost voxels that may be read their values are repeated.
        """
        first, stop = self.within or (0, source_size)
        x = torch.arange(self.size, dtype=torch.float64) * self.scale + self.offset
        # Coordinates that are whole but for rounding must copy, not interpolate.
        x = torch.where((x - x.round()).abs() < 1e-6, x.round(), x).clamp(first, stop - 1)
        below = x.floor().long()
        return below, (below + 1).clamp(max=stop - 1), (x - below).float()


AxisMaps = tuple[AxisMap, AxisMap, AxisMap]


@dataclass(frozen=True)
class Space:
    """A native frame, the model frame beside it, and for each native axis its map into model voxels."""

    native: Frame
    model: Frame
    maps: AxisMaps

    def in_scores(self, padding: Iterable[tuple[int, int]], factor: Triple) -> "AxisMaps":
        """The maps into a network's output: shifted by the sampler's padding, shrunk by a downsampling factor.

        A voxel of the output lies in the middle of the `factor` voxels it was made of. What was predicted for the
        padding is never read: it says nothing of the volume.
        """
        pads = [before for before, _ in padding]
        i, j, k = (
            replace(
                m,
                scale=m.scale / f,
                offset=(m.offset + pads[m.axis] - (f - 1) / 2) / f,
                within=_unpadded(pads[m.axis], self.model.shape[m.axis], f),
            )
            for m in self.maps
            for f in [factor[m.axis]]
        )
        return i, j, k


def make_space(native: Frame, orientation: str | None, spacing: float | Iterable[float | None] | None) -> Space:
    """The model frame of a native frame.

    Axes are permuted and flipped to the nearest anatomical direction, never rotated: an oblique affine stays oblique.
    With a spacing, the model grid has whole voxels of exactly that size on the centre of the native field of view.

    Args:
        native: The file's frame.
        orientation: Three letters such as 'RAS' (see nibabel's axcodes), or None to keep the file's axes.
        spacing: mm, one number or three along the model's axes; None keeps the file's.

    Raises:
        ConfigError: an orientation or a spacing that is none.
    """
    world, signs = closest_axes(native.affine)
    wanted, directions = (world, signs) if orientation is None else parse_axcodes(orientation)
    order = [world.index(w) for w in wanted]  # the native axis of each model axis
    maps: dict[int, AxisMap] = {}
    affine, shape = np.eye(4), []
    affine[:3, 3] = native.affine[:3, 3]
    for axis, (n, mm) in enumerate(zip(order, to_spacing(spacing), strict=True)):
        ratio = 1.0 if mm is None else mm / native.spacing[n]
        # Rounding before comparing sizes: 0.9999999 mm of a float32 header is not another spacing than 1 mm.
        ratio = 1.0 if abs(ratio - 1) < 1e-4 else ratio
        size = max(1, round(native.shape[n] / ratio))
        flip = directions[axis] * signs[n]
        step = native.affine[:3, n] * ratio * flip
        # native = (model - (size - 1) / 2) * ratio * flip + (native size - 1) / 2
        affine[:3, axis] = step
        affine[:3, 3] += native.affine[:3, n] * (native.shape[n] - 1) / 2 - step * (size - 1) / 2
        scale = flip / ratio
        maps[n] = AxisMap(axis, native.shape[n], scale, (size - 1) / 2 - scale * (native.shape[n] - 1) / 2)
        shape.append(size)
    return Space(native, Frame(to_triple(shape, "model shape"), affine), (maps[0], maps[1], maps[2]))


def _unpadded(before: int, size: int, factor: int) -> tuple[int, int]:
    """The voxels of an output, end exclusive, that were made of the volume alone, `size` voxels behind the padding.

    Where the volume fills no voxel of the output, those that have a part of it.
    """
    first, stop = -(-before // factor), (before + size) // factor
    return (first, stop) if first < stop else (before // factor, -(-(before + size) // factor))


def inverse(maps: AxisMaps, shape: Triple) -> AxisMaps:
    """Maps the other way, from model voxels of a volume of `shape` into native voxels."""
    back: dict[int, AxisMap] = {
        m.axis: AxisMap(axis, shape[m.axis], 1 / m.scale, -m.offset / m.scale) for axis, m in enumerate(maps)
    }
    return back[0], back[1], back[2]


def resample(
    source: Shaped[Tensor, "c si sj sk"], maps: AxisMaps, *, linear: bool = True
) -> Shaped[Tensor, "c ti tj tk"]:
    """The source at the target's voxels.

    Where maps only permute, flip and crop, values are copied in their own type. Otherwise linear interpolation gives
    float32, and `linear=False` takes the nearest voxel.
    """
    return _interpolated(source, maps, [m.neighbours(source.shape[m.axis + 1]) for m in maps], linear=linear)


def _interpolated(source: Tensor, maps: AxisMaps, neighbours: list[Neighbours], *, linear: bool = True) -> Tensor:
    # The axis that shrinks most comes first. This is asked of scales, not of sizes, so that a slab and the whole are
    # interpolated in one order and equal each other to the bit.
    for m, found in sorted(zip(maps, neighbours, strict=True), key=lambda pair: -abs(pair[0].scale)):
        source = _along(source, m.axis + 1, found, linear=linear)
    i, j, k = (m.axis + 1 for m in maps)
    return source.permute(0, i, j, k)


def _along(source: Tensor, dim: int, neighbours: Neighbours, *, linear: bool) -> Tensor:
    below, above, share = neighbours  # on the host, where looking at them stops no GPU
    if not linear:
        below, share = torch.where(share > 0.5, above, below), torch.zeros_like(share)
    if not share.any():
        return _pick(source, dim, below)
    shares = share.reshape([-1 if axis == dim else 1 for axis in range(4)])
    source = source if source.dtype == torch.float64 else source.float()
    first, second = (source.index_select(dim, index.to(source.device)) for index in (below, above))
    return torch.lerp(first, second, shares.to(source))


def _pick(source: Tensor, dim: int, index: Tensor) -> Tensor:
    first, count = int(index[0]), len(index)
    if torch.equal(index, torch.arange(first, first + count)):
        return source.narrow(dim, first, count)
    return source.index_select(dim, index.to(source.device))


@dataclass(frozen=True)
class Piece:
    """A box of native voxels, and the scores it is interpolated from.

    Args:
        where: Slices along the native axes.
        source: (C, si, sj, sk), the scores' voxels around the box and no others.
    """

    where: Where
    source: Shaped[Tensor, "c si sj sk"]
    _maps: AxisMaps
    _neighbours: list[Neighbours]
    _linear: bool

    @property
    def copied(self) -> bool:
        """Whether every voxel is one of the source, and nothing is interpolated."""
        return not self._linear or not any(share.any() for _, _, share in self._neighbours)

    def restored(self, channels: Int[Tensor, " k"] | None = None) -> Shaped[Tensor, "d ti tj tk"]:
        """The scores of the box: all channels, or some."""
        source = self.source if channels is None else self.source.index_select(0, channels)
        return _interpolated(source, self._maps, self._neighbours, linear=self._linear)


class Restorer:
    """Brings scores to native space while their planes come in order: a native plane needs two model planes at most.

    Args:
        maps: From native voxels into the scores (`Space.in_scores`).
        axis: The scores' axis along which planes come.
        shape: Voxels of the scores along i, j, k.
        linear: Interpolate, or take the nearest voxel, as labels need it.
        voxels: About how many values are handed out at once.
        tile: The most native voxels of a piece along each axis; None for whole rows.
        planes: Native planes are handed out whose lower plane of the scores is one of these. The scores' planes are fed
            from the first of these on, up to the one behind the last. None for all.
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
        self._maps, self._source_axis, self._linear = maps, axis, linear
        self._voxels, self._tile = voxels, tile
        self._neighbours = [m.neighbours(shape[m.axis]) for m in maps]
        below, above, share = self._neighbours[self.axis]
        # Where a plane is copied, the one above it is not waited for.
        self._neighbours[self.axis] = below, torch.where(share > 0, above, below), share
        # Native planes in the order in which their model planes come, and how many have been handed out.
        self._ascending = maps[self.axis].scale > 0
        ends = torch.tensor([0, shape[axis]] if planes is None else [planes.start, planes.stop])
        self._done, self._until = torch.searchsorted(self._ordered()[0], ends).tolist()
        first, stop, size = self._done, self._until, maps[self.axis].size
        self.native = range(first, stop) if self._ascending else range(size - stop, size - first)
        """The planes along `self.axis` that are handed out."""
        self._last: Tensor | None = None

    def feed(self, start: int, planes: Shaped[Tensor, "c si sj sk"]) -> Iterator[Piece]:
        """Take the planes from `start` on, which follow those before, and hand out native voxels that are complete."""
        dim = self._source_axis + 1
        stop = start + planes.shape[dim]
        below, above, _ = self._ordered()
        ready = min(int(torch.searchsorted(above, torch.tensor(stop))), self._until)
        held = int(torch.searchsorted(below, torch.tensor(start)))
        if self._done < min(held, ready):
            # These lie between the last plane before and the first of these.
            assert self._last is not None
            yield from self._pieces(torch.cat([self._last, planes.narrow(dim, 0, 1)], dim), start - 1, min(held, ready))
        yield from self._pieces(planes, start, ready)
        self._last = None
        if ready < self._until and below[ready] < stop:
            self._last = planes.narrow(dim, planes.shape[dim] - 1, 1).clone()

    def _pieces(self, planes: Tensor, start: int, until: int) -> Iterator[Piece]:
        rows, columns = self._maps[self._across].size, self._maps[self._along].size
        # A GPU has no cache to stay in, and each small piece costs it the start of many kernels.
        larger = 8 if planes.is_cuda else 1
        room, total = max(1, larger * self._voxels // len(planes)), self._maps[self.axis].size
        # Memory is read best plane by plane, or, where planes run along its fastest axis, many of them row by row.
        fastest = planes.stride(self._source_axis + 1) == 1
        step = min(max(1, until - self._done), max(1, room // (columns if fastest else rows * columns)))
        # A plane of many channels is large itself. In small pieces memory stays in the cache, and is not asked anew of
        # the operating system for each: its first touch costs more than interpolating.
        high, wide = max(1, min(rows, room // step // columns)), columns
        if self._tile is not None:
            step = high = wide = self._tile * (4 if planes.is_cuda else 1)
        while self._done < until:
            count = min(step, until - self._done)
            first = self._done if self._ascending else total - self._done - count
            for row, column in product(range(0, rows, high), range(0, columns, wide)):
                where = [slice(first, first + count)] * 3
                where[self._across] = slice(row, min(row + high, rows))
                where[self._along] = slice(column, min(column + wide, columns))
                yield self._piece(planes, start, (where[0], where[1], where[2]))
            self._done += count

    def _piece(self, planes: Tensor, start: int, where: Where) -> Piece:
        found: list[Neighbours] = []
        for n, (m, w) in enumerate(zip(self._maps, where, strict=True)):
            below, above, share = (t[w] for t in self._neighbours[n])
            low, high = int(below.min()), int(above.max())
            planes = planes.narrow(m.axis + 1, low - (start if n == self.axis else 0), high - low + 1)
            found.append((below - low, above - low, share))
        return Piece(where, planes, self._maps, found, self._linear)

    def _ordered(self) -> Neighbours:
        below, above, share = self._neighbours[self.axis]
        return (below, above, share) if self._ascending else (below.flip(0), above.flip(0), share.flip(0))
