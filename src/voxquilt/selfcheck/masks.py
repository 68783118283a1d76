"""Writes the masks of a self-check for `data.within`, and says which box is to be predicted."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from voxquilt.geometry.frame import Triple, to_triple
from voxquilt.geometry.space import Box
from voxquilt.selfcheck.images import with_margin

MASK = "within.nii"
"""The file name of a synthetic subject's mask."""
# Voxels beside a mask at most, lest the images become large; a wider margin ends with the volume.
_MOST_BESIDE = 12


def masked(shape: Triple, spacing: Sequence[float], margin: float) -> tuple[Triple, Box, Box]:
    """A larger shape, the box of a mask in it, and the box that `data.within` has to make of it.

    Args:
        shape: Voxels of the mask's box.
        spacing: mm of a voxel along each axis.
        margin: mm that are predicted around the mask.
    """
    larger, inner = with_margin(shape)
    around = [ceil(margin / mm - 1e-6) for mm in spacing]  # each voxel that the margin touches
    sizes, mask, box = [], [], []
    for n, size, more, (first, stop) in zip(shape, larger, around, inner, strict=True):
        beside = min(more, _MOST_BESIDE) if n > 1 else 0
        sizes.append(size + 2 * beside)
        mask.append((first + beside, stop + beside))
        box.append((max(0, first + beside - more), min(sizes[-1], stop + beside + more)))
    return to_triple(sizes, "a shape"), (mask[0], mask[1], mask[2]), (box[0], box[1], box[2])


def write_mask(image: Path, box: Box) -> None:
    """Write MASK beside an image: two opposite corners of a box, of which its bounding box has to be made."""
    source: Any = nib.load(image)
    voxels = np.zeros(source.shape[:3], np.uint8)
    for end in (0, -1):
        voxels[tuple(range(*ends)[end] for ends in box)] = 1
    nib.save(nib.Nifti1Image(voxels, source.affine), image.with_name(MASK))
