"""Provides the weights by which overlapping patches share a voxel: a partition of unity along each axis.

Along one axis, patch n gets the weight  u_n(x) = w(x - s_n) / sum_m w(x - s_m)  at voxel x. A grid is a Cartesian
product and a patch's weight is the product of its three u, so over all patches the weights of a voxel sum to
(sum_a u_a)(sum_b u_b)(sum_c u_c) = 1. Patches need not be counted, and sums need not be divided at the end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from voxquilt.errors import ConfigError
from voxquilt.geometry.frame import AXES
from voxquilt.geometry.grid import Grid
from voxquilt.stitching.blend_registry import BLENDS

AxisWeights = Float64[Tensor, "n p"]


@runtime_checkable
class Blend(Protocol):
    """Gives the weight of each patch in each voxel."""

    @property
    def averages(self) -> bool:
        """Whether patches are summed with weights; otherwise each voxel has one owner and is copied from it."""
        ...

    def axis_weights(self, grid: Grid, axis: int) -> AxisWeights:
        """(patches along the axis, patch size) float64; over patches, the weights of every voxel sum to 1."""
        ...


@runtime_checkable
class FlooredBlend(Blend, Protocol):
    """A blend that averages by a window along each axis, whose product is raised to a floor wherever it is below.

    Since a floor of a product is not a product of floors, sums of weights are kept beside the sums of patches.
    """

    @property
    def floor(self) -> float:
        """The least weight of a voxel of a patch."""
        ...

    def window(self, patch: int) -> Float64[Tensor, "p"]:
        """The weights along an axis, before the floor, given the patch size."""
        ...


@dataclass(frozen=True)
class Crop:
    """Assigns each voxel to one patch: half of the overlap to either neighbour.

    Patch n owns voxels from `s_n + overlap // 2` (from 0 for the first) up to those of patch n + 1 (to the end for the
    last). The result is that of TorchIO 1.x's ordered overwriting, in any order of arrival.
    """

    averages = False

    def axis_weights(self, grid: Grid, axis: int) -> AxisWeights:
        starts, half = grid.starts[axis], grid.patch_overlap[axis] // 2
        begins = [0, *(s + half for s in starts[1:]), grid.shape[axis]]
        x, edges = _places(grid, axis), torch.tensor(begins)[:, None]
        return ((x >= edges[:-1]) & (x < edges[1:])).double()


@dataclass(frozen=True)
class Windowed:
    """Averages patches with a window, which is a function of the patch size and positive everywhere."""

    window: Callable[[int], Float64[Tensor, "p"]]
    averages = True

    def axis_weights(self, grid: Grid, axis: int) -> AxisWeights:
        patch = grid.patch_size[axis]
        window = self.window(patch)
        if tuple(window.shape) != (patch,):
            raise ConfigError(
                f"the window {self.window!r} gives shape {tuple(window.shape)} for patches of {patch} voxels."
            )
        return window / _sums(window.expand(grid.counts[axis], -1), grid, axis)[_places(grid, axis)]


def average(patch: int) -> Float64[Tensor, "p"]:
    """The same weight everywhere."""
    return torch.ones(patch, dtype=torch.float64)


def hann(patch: int) -> Float64[Tensor, "p"]:
    """A raised cosine without its zero ends: TorchIO 1.x's 'hann'.

    >>> hann(3)
    tensor([0.5000, 1.0000, 0.5000], dtype=torch.float64)
    """
    return torch.hann_window(patch + 2, periodic=False, dtype=torch.float64)[1:-1]


def gaussian(patch: int, sigma_scale: float = 0.125) -> Float64[Tensor, "p"]:
    """exp(-x^2 / 2 sigma^2) around the patch's centre, sigma = `sigma_scale` x patch size, as in MONAI and nnU-Net.

    Nothing is clamped: a voxel that one patch covers has weight 1 after normalising, however small the window is there.
    """
    x = torch.arange(patch, dtype=torch.float64) - (patch - 1) / 2
    return torch.exp(-0.5 * (x / (sigma_scale * patch)) ** 2)


def nnunet(patch: int) -> Float64[Tensor, "p"]:
    """nnU-Net's gaussian: that of `gaussian`, with its centre on the voxel patch // 2, which is not the middle."""
    x = torch.arange(patch, dtype=torch.float64) - patch // 2
    return torch.exp(-0.5 * (x / (patch / 8)) ** 2)


@dataclass(frozen=True)
class MonaiGaussian:
    """MONAI's gaussian: a FlooredBlend of `gaussian` along the three axes, raised to 1e-3.

    Args:
        sigma_scale: Sigma as a share of the patch size.
    """

    sigma_scale: float = 0.125
    averages = True
    floor = 1e-3

    def axis_weights(self, grid: Grid, axis: int) -> AxisWeights:
        """Weights without the floor, which sum to 1 as those of other blends."""
        return Windowed(self.window).axis_weights(grid, axis)

    def window(self, patch: int) -> Float64[Tensor, "p"]:
        """The weights along an axis, before the floor."""
        return gaussian(patch, self.sigma_scale)


CROP = Crop()
AVERAGE = Windowed(average)
HANN = Windowed(hann)
GAUSSIAN = Windowed(gaussian)
NNUNET = Windowed(nnunet)
MONAI = MonaiGaussian()


def to_blend(overlap_mode: str | Blend) -> Blend:
    """The blend with a name; a Blend is returned as it is.

    Raises:
        ConfigError: (a ValueError) an unknown name, or an object that is not a Blend.
    """
    if isinstance(overlap_mode, str):
        return BLENDS.load(BLENDS.check(overlap_mode, "overlap_mode"))
    if not isinstance(overlap_mode, Blend):
        raise ConfigError(f"overlap_mode must be the name of a blend or a Blend; it is {overlap_mode!r}.")
    return overlap_mode


def checked_weights(blend: Blend, grid: Grid, axis: int) -> AxisWeights:
    """A blend's weights along an axis, once they are known to share every voxel out.

    Raises:
        ConfigError: (a ValueError) weights of another shape or that do not sum to 1, which would change all outputs
            without an error; or fractions, if voxels are copied.
    """
    weights, patch = blend.axis_weights(grid, axis), grid.patch_size[axis]
    if tuple(weights.shape) != (grid.counts[axis], patch):
        raise ConfigError(
            f"{blend!r} gives weights of shape {tuple(weights.shape)} along axis {AXES[axis]}; wanted is "
            f"{(grid.counts[axis], patch)}, patches along the axis and voxels of a patch."
        )
    total = _sums(weights, grid, axis)
    if not (total - 1).abs().max() <= 1e-9:  # NaN is not
        raise ConfigError(
            f"the weights of {blend!r} sum to {float(total.min()):.6g} to {float(total.max()):.6g} along axis "
            f"{AXES[axis]}, and must sum to 1 in every voxel; a window must be positive everywhere."
        )
    if not blend.averages and not ((weights == 0) | (weights == 1)).all():
        raise ConfigError(f"{blend!r} copies voxels (averages is False), so its weights must be 0 or 1.")
    return weights


def _places(grid: Grid, axis: int) -> Int64[Tensor, "n p"]:
    """The voxels of each patch along an axis."""
    return torch.tensor(grid.starts[axis])[:, None] + torch.arange(grid.patch_size[axis])


def _sums(weights: Float[Tensor, "n p"], grid: Grid, axis: int) -> Float64[Tensor, " size"]:
    """The sum of the weights of all patches in each voxel along an axis."""
    return _places(grid, axis).flatten().bincount(weights.flatten().double(), grid.shape[axis])
