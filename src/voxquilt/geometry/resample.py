"""Linear and nearest-neighbour resampling along each axis by itself."""

import torch
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.geometry.space import AxisMaps, Neighbours


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
