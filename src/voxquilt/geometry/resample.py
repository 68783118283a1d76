"""Resamples volumes by linear or nearest-neighbour interpolation, one axis at a time."""

from collections.abc import Sequence

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
    # The axis that shrinks most comes first. It is determined by scales, not by sizes, so that a slab and the whole
    # volume are interpolated in the same order and are equal to the bit.
    on_device = neighbours if on_device is None else on_device
    triples = sorted(zip(maps, neighbours, on_device, strict=True), key=lambda triple: -abs(triple[0].scale))
    for axis_map, along, along_on_device in triples:
        source = _interpolate_axis(source, axis_map.axis + 1, along, along_on_device, linear=linear)
    i, j, k = (m.axis + 1 for m in maps)
    return source.permute(0, i, j, k)


def _interpolate_axis(
    source: Tensor, dim: int, neighbours: Neighbours, on_device: Neighbours, *, linear: bool
) -> Tensor:
    share = neighbours[2]
    if not linear or not share.any():
        index = _nearest(neighbours) if not linear else neighbours[0]
        first, count = int(index[0]), len(index)
        if torch.equal(index, torch.arange(first, first + count)):
            return source.narrow(dim, first, count)
        index = _nearest(on_device) if not linear else on_device[0]
        return source.index_select(dim, index.to(source.device))
    below, above, share = on_device
    shares = share.reshape([-1 if axis == dim else 1 for axis in range(4)])
    source = source if source.dtype == torch.float64 else source.float()
    lower, upper = (source.index_select(dim, index.to(source.device)) for index in (below, above))
    return torch.lerp(lower, upper, shares.to(source))


def _nearest(neighbours: Neighbours) -> Tensor:
    below, above, share = neighbours
    return torch.where(share > 0.5, above, below)
