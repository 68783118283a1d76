"""Places patches along an axis: one function for each convention.

Along one axis of N = 13 voxels, patches of 5 that share 2:

    volume   |-------------------------|
    regular  |---------|                   one patch every 3 voxels
                   |---------|
                         |---------|
    monai    as regular, but a step that is a share of the patch (data.step) is rounded down, to odd overlaps as well
                             |---------|   the last patch is moved back to end with the volume
    even     |---------|                   as few patches as steps of at most 3 voxels need, and all steps alike
                   |---------|             (2.67 voxels, rounded)
                        |---------|
                             |---------|

Each function takes the voxels of the axis, the voxels of a patch, and the voxels from patch to patch, which may be a
fraction; it gives the first voxel of every patch, from 0 to the last at which a patch fits. Other packages add
functions by the entry point group `voxquilt.placements`.
"""

from math import ceil

from voxquilt.vocabulary import Registry

PLACEMENTS = Registry(
    "placement of patches",
    {name: f"voxquilt.geometry.placement:{name}" for name in ("regular", "even", "monai")},
    "voxquilt.placements",
)


def regular(size: int, patch: int, step: float) -> tuple[int, ...]:
    """One patch every `step` voxels, and the last at the end: TorchIO 1.x's, and MONAI's.

    >>> regular(13, 5, 3)
    (0, 3, 6, 8)
    """
    starts = list(range(0, size - patch + 1, int(step)))
    if starts[-1] != size - patch:
        starts.append(size - patch)
    return tuple(starts)


def even(size: int, patch: int, step: float) -> tuple[int, ...]:
    """As few patches as steps of at most `step` voxels need, at equal distances: nnU-Net's.

    >>> even(13, 5, 3)
    (0, 3, 5, 8)
    """
    count = ceil((size - patch) / max(step, 1))
    # Multiplied as nnU-Net does, since halves are rounded to even and rounding errors decide which are halves.
    return tuple(round((size - patch) / count * n) for n in range(count + 1)) if count else (0,)


def monai(size: int, patch: int, step: float) -> tuple[int, ...]:
    """One patch every `int(step)` voxels, and the last at the end: MONAI's sliding window.

    >>> monai(13, 5, 5 * (1 - 0.3))
    (0, 3, 6, 8)
    """
    return regular(size, patch, max(step, 1))
