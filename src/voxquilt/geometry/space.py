"""Maps voxels between native and model space, axis by axis.

The two frames differ by axis permutation, flips, a spacing per axis and padding. All of these act on one axis at a
time: the mapping is x_model = scale * x_native + offset for each axis, and interpolation is three 1-D interpolations.

    native axis   |   0   |   1   |   2   |   3   |   4   |   5   |     0.8 mm, six voxels
    model axis    |     0     |     1     |     2     |                 1.6 mm, three voxels with the same centre
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from voxquilt.geometry.axis_map import AxisMap, AxisMaps
from voxquilt.geometry.frame import (
    Frame,
    Triple,
    closest_axes,
    parse_axcodes,
    to_axis_order,
    to_spacing,
    to_triple,
)
from voxquilt.geometry.model_grids import GRIDS, Measured, OfFrame

Where = tuple[slice, slice, slice]
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""First voxel and end, exclusive, along i, j, k."""


@dataclass(frozen=True)
class Space:
    """A native frame, its model frame, and the map of each native axis into model voxels.

    Args:
        native, model: The frames.
        maps: The maps of the native axes, within the box.
        box: The native voxels that model space covers; those outside are background. None for all.
        spacing: Voxel size in mm that model space was to have along each native axis.
    """

    native: Frame
    model: Frame
    maps: AxisMaps
    box: Box | None = None
    spacing: tuple[float, float, float] | None = None

    @property
    def where(self) -> Where:
        """The native voxels that model space covers."""
        i, j, k = (slice(*ends) for ends in self.box or [(0, n) for n in self.native.shape])
        return i, j, k

    @property
    def covers_all(self) -> bool:
        """Whether model space covers the whole native field of view."""
        return tuple(m.size for m in self.maps) == self.native.shape

    def slice_axis(self, per_slice: float | bool | None, *, back: bool = False) -> int | None:
        """The native axis across which slices are interpolated each by itself; None if there is none.

        This is nnU-Net's rule (`nnunetv2.preprocessing.resampling.default_resampling.determine_do_sep_z_and_axis`): the
        axis of the largest voxel size where the ratio of largest to smallest is above a threshold, in the volume that
        is resampled or else in the one that it becomes. If several axes have this size, there is none.

        Args:
            per_slice: The threshold; True for any ratio of the volume that is resampled, None or False for never.
            back: Whether scores are resampled to native space, and not images to model space.
        """
        if per_slice is None or per_slice is False:
            return None
        sizes = [self.native.header_spacing, self.spacing or self.native.header_spacing]
        current, new = sizes[::-1] if back else sizes
        if per_slice is True:
            chosen = current
        else:
            chosen = next((mm for mm in (current, new) if max(mm) / min(mm) > per_slice), None)
        largest = [] if chosen is None else [axis for axis, mm in enumerate(chosen) if mm == max(chosen)]
        return largest[0] if len(largest) == 1 else None

    def to_model(self, order: int = 1, per_slice: float | bool | None = None) -> AxisMaps:
        """The maps from model voxels to native voxels of the box, by which images are resampled.

        Args:
            order: Order of interpolation; see AxisMap.
            per_slice: See `slice_axis`.
        """
        axis = self.slice_axis(per_slice)
        maps = [replace(m, order=0 if n == axis else order) for n, m in enumerate(self.maps)]
        return inverse((maps[0], maps[1], maps[2]), self.model.shape)

    def in_scores(
        self,
        padding: Iterable[tuple[int, int]],
        factor: Triple,
        order: int = 1,
        per_slice: float | bool | None = None,
    ) -> AxisMaps:
        """The maps into a network's output: shifted by the sampler's padding, shrunk by a downsampling factor.

        A voxel of the output lies in the middle of its `factor` voxels. Predictions for the padding are never read,
        since they say nothing about the volume.

        Args:
            padding: Voxels before and after model space.
            factor: Model voxels per voxel of the output, along each axis.
            order: Order of interpolation; see AxisMap.
            per_slice: See `slice_axis`.
        """
        pads = [before for before, _ in padding]
        slices = self.slice_axis(per_slice, back=True)
        i, j, k = (
            replace(
                m,
                scale=m.scale / f,
                offset=(m.offset + pads[m.axis] - (f - 1) / 2) / f,
                within=_unpadded(pads[m.axis], self.model.shape[m.axis], f),
                order=0 if n == slices else order,
            )
            for n, m in enumerate(self.maps)
            for f in [factor[m.axis]]
        )
        return i, j, k


def make_space(
    native: Frame,
    orientation: str | None,
    spacing: float | Iterable[float | None] | None,
    *,
    grid: str = "centre",
    transpose: Iterable[int] | None = None,
    box: Box | None = None,
) -> Space:
    """The space of a native frame: its model frame and the maps between the two.

    Axes are permuted and flipped to the nearest anatomical direction, never rotated: an oblique affine stays oblique.

    Args:
        native: The file's frame.
        orientation: Three letters such as 'RAS' (see nibabel's axcodes), or None to keep the file's axes.
        spacing: mm, one number or three along the model's axes; None keeps the file's.
        grid: Where voxels of another spacing lie; see `voxquilt.geometry.model_grids`.
        transpose: The oriented axis (0, 1, 2) that each model axis is; None keeps their order.
        box: The native voxels that model space covers; None for all.

    Raises:
        ConfigError: an invalid orientation, spacing, grid or transpose.
    """
    world, signs = closest_axes(native.affine)
    wanted, directions = (world, signs) if orientation is None else parse_axcodes(orientation)
    oriented = [(world.index(w), d * signs[world.index(w)]) for w, d in zip(wanted, directions, strict=True)]
    lay = GRIDS.load(grid)
    if isinstance(lay, Measured):
        native = native if oriented == [(0, 1), (1, 1), (2, 1)] else native.with_measured_zooms()
        lay = lay.rule
    ends = box or [(0, n) for n in native.shape]
    header = native.header_spacing
    order, wanted_spacing = to_axis_order(transpose), to_spacing(spacing)
    if isinstance(lay, OfFrame):
        axes = [oriented[which] for which in order]
        columns = np.stack([native.affine[:, n] * flip for n, flip in axes], 1)
        counts = tuple(ends[n][1] - ends[n][0] for n, _ in axes)
        mms = tuple(header[n] if mm is None else mm for (n, _), mm in zip(axes, wanted_spacing, strict=True))
        lay = lay.choose(columns, counts, mms)
    maps: dict[int, AxisMap] = {}
    affine, shape, sizes = np.eye(4), [], list(header)
    affine[:3, 3] = native.affine[:3, 3]
    for axis, (which, mm) in enumerate(zip(order, wanted_spacing, strict=True)):
        n, flip = oriented[which]  # the native axis of this model axis, and whether it runs the same way
        first, stop = ends[n]
        count = stop - first
        sizes[n] = header[n] if mm is None else mm
        size, step, start = lay(count, header[n], sizes[n])
        # Along the oriented axis, voxel = step * model + start; native voxels count the other way where it is flipped.
        affine[:3, axis] = native.affine[:3, n] * step * flip
        affine[:3, 3] += native.affine[:3, n] * (first + start if flip > 0 else stop - 1 - start)
        scale = flip / step
        maps[n] = AxisMap(axis, count, scale, -start / step if flip > 0 else (count - 1 - start) / step)
        shape.append(size)
    model = Frame(to_triple(shape, "model shape"), affine)
    return Space(native, model, (maps[0], maps[1], maps[2]), box, (sizes[0], sizes[1], sizes[2]))


def _unpadded(before: int, size: int, factor: int) -> tuple[int, int]:
    """The voxels of an output, end exclusive, that lie within the volume, which has `size` voxels behind the padding.

    If no voxel of the output lies within the volume, those that overlap it.
    """
    first, stop = -(-before // factor), (before + size) // factor
    return (first, stop) if first < stop else (before // factor, -(-(before + size) // factor))


def inverse(maps: AxisMaps, shape: Triple) -> AxisMaps:
    """The inverse maps, from model voxels of a volume of `shape` into native voxels."""
    back: dict[int, AxisMap] = {
        m.axis: AxisMap(axis, shape[m.axis], 1 / m.scale, -m.offset / m.scale, None, m.order, reverses_source=True)
        for axis, m in enumerate(maps)
    }
    return back[0], back[1], back[2]
