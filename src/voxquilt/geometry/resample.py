"""Resamples volumes by linear or nearest-neighbour interpolation, one axis at a time."""

import torch
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.geometry.space import AxisMaps, Neighbours


def resample(
    source: Shaped[Tensor, "c si sj sk"], maps: AxisMaps, *, linear: bool = True
) -> Shaped[Tensor, "c ti tj tk"]:
    """Resample a volume at the target's voxels.

    Where maps only permute, flip and crop, values are copied in their own type. Otherwise linear interpolation gives
    float32 (float64 for float64), and `linear=False` takes the nearest voxel.
    """
    return interpolate(source, maps, [m.neighbours(source.shape[m.axis + 1]) for m in maps], linear=linear)


def interpolate(source: Tensor, maps: AxisMaps, neighbours: list[Neighbours], *, linear: bool = True) -> Tensor:
    """Resample a volume, given the neighbours of the target's voxels along each axis."""
    # The axis that shrinks most comes first. It is determined by scales, not by sizes, so that a slab and the whole
    # volume are interpolated in the same order and are equal to the bit.
    pairs = sorted(zip(maps, neighbours, strict=True), key=lambda pair: -abs(pair[0].scale))
    for axis_map, neighbours_along in pairs:
        source = _interpolate_axis(source, axis_map.axis + 1, neighbours_along, linear=linear)
    i, j, k = (m.axis + 1 for m in maps)
    return source.permute(0, i, j, k)


def _interpolate_axis(source: Tensor, dim: int, neighbours: Neighbours, *, linear: bool) -> Tensor:
    below, above, share = neighbours  # on the host, so that reading them does not wait for the GPU
    if not linear:
        below, share = torch.where(share > 0.5, above, below), torch.zeros_like(share)
    if not share.any():
        return _select(source, dim, below)
    shares = share.reshape([-1 if axis == dim else 1 for axis in range(4)])
    source = source if source.dtype == torch.float64 else source.float()
    lower, upper = (source.index_select(dim, index.to(source.device)) for index in (below, above))
    return torch.lerp(lower, upper, shares.to(source))


def _select(source: Tensor, dim: int, index: Tensor) -> Tensor:
    first, count = int(index[0]), len(index)
    if torch.equal(index, torch.arange(first, first + count)):
        return source.narrow(dim, first, count)
    return source.index_select(dim, index.to(source.device))
