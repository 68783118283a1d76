"""Maps voxels between native and model space, axis by axis.

The two frames differ by axis permutation, flips, a spacing per axis and padding. All of these act on one axis at a
time: the mapping is x_model = scale * x_native + offset for each axis, and interpolation is three 1-D interpolations.

    native axis   |   0   |   1   |   2   |   3   |   4   |   5   |     0.8 mm, six voxels
    model axis    |     0     |     1     |     2     |                 1.6 mm, three voxels with the same centre
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from voxquilt.geometry.frame import Frame, Triple, closest_axes, parse_axcodes, to_spacing, to_triple

Neighbours = tuple[Tensor, Tensor, Tensor]
Where = tuple[slice, slice, slice]


@dataclass(frozen=True)
class AxisMap:
    """Maps target voxel x to `scale * x + offset` on axis `axis` of the source.

    Args:
        axis: The source's axis.
        size: Voxels along the target's axis.
        scale, offset: Scale and offset in source voxels.
        within: The range of source voxels that may be read, end exclusive, where the source is padded; None for all.
    """

    axis: int
    size: int
    scale: float
    offset: float
    within: tuple[int, int] | None = None

    def neighbours(self, source_size: int) -> Neighbours:
        """The two source voxels around each target voxel, and the weight of the second (0 on a source voxel).

        Beyond the centres of the outermost voxels that may be read, their values are repeated.
        """
        first, stop = self.within or (0, source_size)
        x = torch.arange(self.size, dtype=torch.float64) * self.scale + self.offset
        # Coordinates that are integers up to rounding must copy, not interpolate.
        x = torch.where((x - x.round()).abs() < 1e-6, x.round(), x).clamp(first, stop - 1)
        below = x.floor().long()
        return below, (below + 1).clamp(max=stop - 1), (x - below).float()


AxisMaps = tuple[AxisMap, AxisMap, AxisMap]


@dataclass(frozen=True)
class Space:
    """A native frame, its model frame, and the map of each native axis into model voxels."""

    native: Frame
    model: Frame
    maps: AxisMaps

    def in_scores(self, padding: Iterable[tuple[int, int]], factor: Triple) -> "AxisMaps":
        """The maps into a network's output: shifted by the sampler's padding, shrunk by a downsampling factor.

        A voxel of the output lies in the middle of its `factor` voxels. Predictions for the padding are never read,
        since they say nothing about the volume.
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
    """The space of a native frame: its model frame and the maps between the two.

    Axes are permuted and flipped to the nearest anatomical direction, never rotated: an oblique affine stays oblique.
    With a spacing, the model grid has voxels of exactly that size, centred on the native field of view.

    Args:
        native: The file's frame.
        orientation: Three letters such as 'RAS' (see nibabel's axcodes), or None to keep the file's axes.
        spacing: mm, one number or three along the model's axes; None keeps the file's.

    Raises:
        ConfigError: an invalid orientation or spacing.
    """
    world, signs = closest_axes(native.affine)
    wanted, directions = (world, signs) if orientation is None else parse_axcodes(orientation)
    order = [world.index(w) for w in wanted]  # the native axis of each model axis
    maps: dict[int, AxisMap] = {}
    affine, shape = np.eye(4), []
    affine[:3, 3] = native.affine[:3, 3]
    for axis, (n, mm) in enumerate(zip(order, to_spacing(spacing), strict=True)):
        ratio = 1.0 if mm is None else mm / native.spacing[n]
        # Rounded before comparing: 0.9999999 mm in a float32 header is the same spacing as 1 mm.
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
    """The voxels of an output, end exclusive, that lie within the volume, which has `size` voxels behind the padding.

    If no voxel of the output lies within the volume, those that overlap it.
    """
    first, stop = -(-before // factor), (before + size) // factor
    return (first, stop) if first < stop else (before // factor, -(-(before + size) // factor))


def inverse(maps: AxisMaps, shape: Triple) -> AxisMaps:
    """The inverse maps, from model voxels of a volume of `shape` into native voxels."""
    back: dict[int, AxisMap] = {
        m.axis: AxisMap(axis, shape[m.axis], 1 / m.scale, -m.offset / m.scale) for axis, m in enumerate(maps)
    }
    return back[0], back[1], back[2]
