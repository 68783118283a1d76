"""Tells how patches share voxels, as it is needed to accumulate them on a device."""

from collections.abc import Hashable
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.geometry.device_queue import queue_on
from voxquilt.geometry.grid import Grid
from voxquilt.stitching.blend import (
    Blend,
    Crop,
    FlooredBlend,
    MonaiGaussian,
    Windowed,
    average,
    checked_weights,
    gaussian,
    hann,
    nnunet,
)
from voxquilt.stitching.device_transfer import upload


class PatchShares(NamedTuple):
    """How patches share voxels.

    Args:
        weights: Along each axis (patches along it, patch size), of a blend that averages.
        floor: What a patch's weights are raised to, which then do not sum to 1; None if they are not.
        owned: Along each axis the first voxel that each patch owns, and how many, of a blend that copies.
    """

    weights: list[Tensor]
    floor: float | None
    owned: list[list[tuple[int, int]]]


def patch_shares(blend: Blend, grid: Grid, dtype: torch.dtype, device: torch.device) -> PatchShares:
    """How the patches of a grid share voxels.

    Args:
        blend: The blend.
        grid: Where patches lie.
        dtype: Type of the weights.
        device: Where the weights are needed. They are shared by volumes that are alike, and must not be changed.

    Raises:
        ConfigError: what `checked_weights` raises.
    """
    find = _shares if _is_constant(blend) else _shares.__wrapped__
    return find(blend, grid, dtype, device, queue_on(device))


def _is_constant(blend: Blend) -> bool:
    """Whether a blend is known to give the same weights for good, and no other weights than its equals.

    That is so of those of this package only: what the windows and blends of others read may change from volume to
    volume, and how they compare is up to them.
    """
    if type(blend) is Windowed:
        return any(blend.window is window for window in (average, hann, gaussian, nnunet))
    return type(blend) is Crop or (type(blend) is MonaiGaussian and type(blend.sigma_scale) is float)


# For the volumes of a cohort that are alike.
@lru_cache(maxsize=8)
def _shares(blend: Blend, grid: Grid, dtype: torch.dtype, device: torch.device, _queue: Hashable) -> PatchShares:
    floor = blend.floor if isinstance(blend, FlooredBlend) else None
    with torch.inference_mode(False):  # whoever is first to ask, others may ask outside of it
        if isinstance(blend, FlooredBlend):
            weights = [blend.window(grid.patch_size[n]).expand(grid.counts[n], -1) for n in range(3)]
        else:
            weights = [checked_weights(blend, grid, n) for n in range(3)]
        if blend.averages:
            return PatchShares([upload(w.to(dtype), device) for w in weights], floor, [])
        return PatchShares([], floor, [[_owned_interval(w) for w in along] for along in weights])


def _owned_interval(weights: Shaped[Tensor, "p"]) -> tuple[int, int]:
    """The first voxel that a window of zeros and ones owns, and how many it owns."""
    owned = weights.nonzero()
    return int(owned[0]), len(owned)
