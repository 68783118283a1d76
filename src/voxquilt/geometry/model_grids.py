"""Places the voxels of model space along an axis where its spacing is not the file's: a function per convention.

Each takes the native voxels along an axis and the two spacings in mm, and gives the model's number of voxels, the
native voxels per model voxel, and the native position of the first model voxel's centre:

    native   |  0  |  1  |  2  |  3  |  4  |      five voxels of 1 mm, to 1.6 mm
    centre   |    0    |    1    |    2    |      exactly 1.6 mm; the two fields of view have the same centre
    corner   |   0    |   1    |   2    |         borders meet: 5 / 3 mm
    first_voxel 0         1         2             exactly 1.6 mm; the first voxels' centres meet
    ends        0           1           2         the centres of the first and of the last voxels meet: 2 mm
    corner_measured  as corner, by the affine's voxel sizes, in float32, where axes are reoriented: nibabel's
    monai       as first_voxel; or, where the file's axes are not quite at right angles, as MONAI then has it

Other packages add functions by the entry point group `voxquilt.grids`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from voxquilt.vocabulary import Registry

Placed = tuple[int, float, float]
Rule = Callable[[int, float, float], Placed]


@dataclass(frozen=True)
class OfFrame:
    """A convention whose rule depends on the whole frame.

    Args:
        choose: Gives the rule for an affine (4, 4), the voxels along the axes and the wanted spacing, of model axes.
    """

    choose: Callable[[np.ndarray, tuple[int, ...], tuple[float, ...]], Rule]


@dataclass(frozen=True)
class Measured:
    """A convention for images that are measured anew when they are reoriented, as nibabel's `as_reoriented` does.

    Voxel sizes are then those of the affine in float32, and not the header's: the last bit can decide how many voxels
    there are.

    Args:
        rule: The rule itself.
    """

    rule: Rule


_NAMES = ("centre", "corner", "corner_measured", "first_voxel", "ends", "monai")
GRIDS = Registry("model grid", {name: f"voxquilt.geometry.model_grids:{name}" for name in _NAMES}, "voxquilt.grids")


def centre(count: int, spacing: float, wanted: float) -> Placed:
    """Voxels of exactly the wanted size, with the native field of view's centre in theirs.

    >>> centre(5, 1.0, 1.6)
    (3, 1.6, 0.3999999999999999)
    """
    # Rounded before comparing: 0.9999999 mm in a float32 header is the same spacing as 1 mm.
    ratio = 1.0 if abs(wanted / spacing - 1) < 1e-4 else wanted / spacing
    size = max(1, round(count / ratio))
    return size, ratio, (count - 1) / 2 - (size - 1) / 2 * ratio


def corner(count: int, spacing: float, wanted: float) -> Placed:
    """Voxels of about the wanted size whose field of view is the native one: nnU-Net's, and torch's `interpolate`.

    >>> corner(5, 1.0, 1.6)
    (3, 1.6666666666666667, 0.33333333333333337)
    """
    size = max(1, round(spacing / wanted * count))
    ratio = count / size
    return size, ratio, ratio / 2 - 0.5


corner_measured = Measured(corner)
"""nnU-Net's, where NibabelIOWithReorient reads the images."""


def first_voxel(count: int, spacing: float, wanted: float) -> Placed:
    """Voxels of exactly the wanted size, the first of which has the centre of the native one.

    >>> first_voxel(5, 1.0, 1.6)
    (4, 1.6, 0.0)
    """
    ratio = 1.0 if abs(wanted - spacing) <= 1e-3 else wanted / spacing  # MONAI's rule of what is the same spacing
    return round((count - 1) / ratio + 1), ratio, 0.0


def _middle(count: int, spacing: float, wanted: float) -> Placed:
    """Voxels of exactly the wanted size and number of `first_voxel`, whose middle is the native one.

    >>> _middle(5, 1.0, 1.6)
    (4, 1.6, -0.7000000000000002)
    """
    size, ratio, _ = first_voxel(count, spacing, wanted)
    return size, ratio, count / 2 - ratio * size / 2


def _choose_as_monai(affine: np.ndarray, shape: tuple[int, ...], wanted: tuple[float, ...]) -> Rule:
    """The rule of MONAI's Spacingd (`monai.data.utils.compute_shape_offset`).

    Its grid begins at the first voxel if no other corner of the volume lies before that one along any axis of the grid,
    which is at right angles, by more than 1e-8 voxels. Where an oblique affine was rounded to float32, as files have
    it, one often does; then the middles of the two volumes meet.
    """
    axes = affine[:3, :3]
    in_grid = np.linalg.cholesky(axes.T @ axes).T / np.array(wanted)[:, None]
    before = np.minimum(in_grid * (np.array(shape) - 1), 0)
    np.fill_diagonal(before, 0)
    return first_voxel if (before.sum(axis=1) >= -1e-8).all() else _middle


monai = OfFrame(_choose_as_monai)
"""MONAI's Spacingd: `first_voxel`, or the same voxels around the volume's middle."""


def ends(count: int, spacing: float, wanted: float) -> Placed:
    """Voxels of about the wanted size whose first and last centres are the native ones: scipy.ndimage.zoom.

    >>> ends(5, 1.0, 1.6)
    (3, 2.0, 0.0)
    """
    size = max(1, round(count * (spacing / wanted)))
    return (size, (count - 1) / (size - 1), 0.0) if size > 1 and count > 1 else (size, max(count, 1) / size, 0.0)
