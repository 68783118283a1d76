"""Resamples volumes by linear or nearest-neighbour interpolation, one axis at a time."""

from collections.abc import Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.geometry.axis_map import AxisMap, AxisMaps, Neighbours


def resample(
    source: Shaped[Tensor, "c si sj sk"], maps: AxisMaps, *, linear: bool = True
) -> Shaped[Tensor, "c ti tj tk"]:
    """Resample a volume at the target's voxels.

    Where maps only permute, flip and crop, values are copied in their own type. Otherwise interpolation, of the order
    that each map has, gives float32 (float64 for float64), and `linear=False` takes the nearest voxel.
    """
    near = [(m if linear else m.without_spline()).neighbours(source.shape[m.axis + 1]) for m in maps]
    return interpolate(source, maps, near, linear=linear)


def resample_image(source: Shaped[Tensor, "c si sj sk"], maps: AxisMaps) -> Shaped[Tensor, "c ti tj tk"]:
    """Resample an image; a cubic spline is computed in float64 and kept within the image's values.

    A spline swings beyond the values that it passes through. As in scikit-image's `resize`, what lies outside each
    channel's range becomes the end of that range; where slices are interpolated each by itself, each slice's.
    """
    neighbours = [m.neighbours(source.shape[m.axis + 1]) for m in maps]
    if all(along.weights is None for along in neighbours):
        return interpolate(source, maps, neighbours)
    slices = [n for n, m in enumerate(maps) if m.order == 0]
    i, j, k = (m.axis + 1 for m in maps)
    shape = [len(source), *(m.size for m in maps)]
    result = torch.empty(shape, dtype=torch.float32, device=source.device)
    for channel, into in zip(source.split(1), result.split(1), strict=True):
        low, high = (reduce(channel, _others(maps, slices), keepdim=True) for reduce in (torch.amin, torch.amax))
        for n in slices:  # the slice that each of the target's is
            index = neighbours[n].below.to(source.device)
            low, high = (ends.index_select(maps[n].axis + 1, index) for ends in (low, high))
        low, high = (ends.permute(0, i, j, k).float() for ends in (low, high))
        _interpolate_into(into, channel, maps, neighbours)
        torch.clamp(into, low, high, out=into)
    return result


def _others(maps: AxisMaps, slices: Sequence[int]) -> list[int]:
    """The source's axes that are not across slices."""
    return [m.axis + 1 for n, m in enumerate(maps) if n not in slices]


def _interpolate_into(
    result: Tensor, source: Tensor, maps: AxisMaps, neighbours: Sequence[Neighbours], planes: int = 16
) -> None:
    """Write what `interpolate` makes in float64, of which only some planes are in memory, to a tensor of float32."""
    # In the order in which voxels lie in memory, along which matrices are multiplied without rearranging them.
    order = sorted(range(3), key=lambda axis: -source.stride(axis + 1))
    source, dims = source.permute(0, *(axis + 1 for axis in order)), [order.index(axis) + 1 for axis in range(3)]
    (axis_map, host, device), *others = _steps(maps, neighbours, [along.to(source.device) for along in neighbours])
    dim, target_dim = dims[axis_map.axis], maps.index(axis_map) + 1
    for start in range(0, axis_map.size, planes):
        where = slice(start, min(start + planes, axis_map.size))
        low, high = int(host.below[where].min()), int(host.above[where].max())
        chunk = source.narrow(dim, low, high + 1 - low).double()
        parts = (along.part(where, low, high) for along in (host, device))
        chunk = _interpolate_axis(chunk, dim, *parts, linear=True)
        for m, along, on_device in others:
            chunk = _interpolate_axis(chunk, dims[m.axis], along, on_device, linear=True)
        result.narrow(target_dim, start, where.stop - start).copy_(chunk.permute(0, *(dims[m.axis] for m in maps)))


def interpolate(
    source: Tensor,
    maps: AxisMaps,
    neighbours: Sequence[Neighbours],
    *,
    linear: bool = True,
    on_device: Sequence[Neighbours] | None = None,
) -> Tensor:
    """Resample a volume, given the neighbours of the target's voxels along each axis.

    Args:
        source: (C, I, J, K).
        maps: Maps from the target's voxels to the source's.
        neighbours: Along each axis of the target, on the host, where reading them does not wait for a device.
        linear: Whether to interpolate, or to take the nearest voxel.
        on_device: The same on the source's device; None copies them there.
    """
    for axis_map, along, along_on_device in _steps(maps, neighbours, neighbours if on_device is None else on_device):
        source = _interpolate_axis(source, axis_map.axis + 1, along, along_on_device, linear=linear)
    i, j, k = (m.axis + 1 for m in maps)
    return source.permute(0, i, j, k)


def _steps(
    maps: AxisMaps, neighbours: Sequence[Neighbours], on_device: Sequence[Neighbours]
) -> list[tuple[AxisMap, Neighbours, Neighbours]]:
    """The axes in the order in which they are interpolated."""
    # The axis that shrinks most comes first. It is determined by scales, not by sizes, so that a slab and the whole
    # volume are interpolated in the same order and are equal to the bit.
    return sorted(zip(maps, neighbours, on_device, strict=True), key=lambda step: -abs(step[0].scale))


def _interpolate_axis(
    source: Tensor, dim: int, neighbours: Neighbours, on_device: Neighbours, *, linear: bool
) -> Tensor:
    if not linear or neighbours.copies:
        index = neighbours.below if linear else _nearest(neighbours)
        first, count = int(index[0]), len(index)
        if torch.equal(index, torch.arange(first, first + count)):
            return source.narrow(dim, first, count)
        index = on_device.below if linear else _nearest(on_device)
        return source.index_select(dim, index.to(source.device))
    source = source if source.dtype == torch.float64 else source.float()
    if on_device.weights is not None:
        weights, (before, after) = on_device.weights.to(source), (source.shape[:dim], source.shape[dim + 1 :])
        if not after:
            return source @ weights.T
        return torch.matmul(weights, source.reshape(*before, source.shape[dim], -1)).reshape(*before, -1, *after)
    below, above, share, _ = on_device
    shares = share.reshape([-1 if axis == dim else 1 for axis in range(4)])
    lower, upper = (_planes(source, dim, index.to(source.device)) for index in (below, above))
    return torch.lerp(lower, upper, shares.to(source))


def _planes(source: Tensor, dim: int, index: Tensor) -> Tensor:
    """Planes of a volume along an axis; along the last one, a CPU gathers voxels faster than it selects planes."""
    if dim < source.ndim - 1 or source.device.type != "cpu":
        return source.index_select(dim, index)
    return source.gather(dim, index.expand(*source.shape[:-1], len(index)))


def _nearest(neighbours: Neighbours) -> Tensor:
    below, above, share, _ = neighbours
    return torch.where(share > 0.5, above, below)
