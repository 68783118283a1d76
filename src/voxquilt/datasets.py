"""Provides example subjects: real heads from published packages, fetched when they are first used."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import ndimage

from voxquilt.data.formats.nifti import read_header, write
from voxquilt.data.subject import LabelMap, ScalarImage, Subject
from voxquilt.example_files import cache_dir, fetch
from voxquilt.filesystem import replacing
from voxquilt.geometry.frame import Frame

_HALVES = (("posterior", "train"), ("anterior", "val"))


class Colin27(Subject):
    """One man's head, averaged over 27 scans: 181 x 217 x 181 voxels of 1 mm, RAS, uint8, cut off below the nose.

    `t1` is the T1-weighted image with skull and scalp. `brain` is where the brain that BET extracted from it, shipped
    beside it, is above 0: ragged, and without the fluid around the brain. `head` is computed here from `t1`, not drawn
    by anyone: see `head_mask`. Both masks are 0 and 1, and kept in the cache.

    Raises:
        FetchError: the images are not in the cache and could not be fetched.
    """

    def __init__(self) -> None:
        t1 = fetch("colin27_t1")
        super().__init__(
            t1=ScalarImage(t1),
            head=LabelMap(_mask("colin27_head_v1.nii.gz", head_mask, t1)),
            brain=LabelMap(_mask("colin27_brain_v1.nii.gz", _above_zero, fetch("colin27_brain"))),
        )


class MNI152(Subject):
    """The average of 152 brains without skull: 197 x 233 x 189 voxels of 1 mm, RAS, uint8.

    `t1` is the T1-weighted image; `gm` and `wm` are how much of each voxel is grey and white matter, 0 to 255.

    Raises:
        FetchError: the images are not in the cache and could not be fetched.
    """

    def __init__(self) -> None:
        super().__init__({tissue: ScalarImage(fetch(f"mni152_{tissue}")) for tissue in ("t1", "gm", "wm")})


class MeanHead(Subject):
    """The average of several heads with faces: 176 x 256 x 256 voxels of 1 x 0.977 x 0.977 mm, a little oblique, int16.

    `t1` is the T1-weighted image.

    Raises:
        FetchError: the image is not in the cache and could not be fetched.
    """

    def __init__(self) -> None:
        super().__init__(t1=ScalarImage(fetch("mean_head")))


def tissue_table() -> Path:
    """A .csv for `train.py`: the halves of MNI152 with classes 0 other, 1 grey matter, 2 white matter.

    Columns `subject`, `t1`, `label`, `split`: posterior, to train on, and anterior, to validate on. A voxel's class is
    the largest of three values: those of its two tissue maps, and what they leave of 255.

    Raises:
        FetchError: the images are not in the cache and could not be fetched.
    """
    table = cache_dir() / "tissue_v1" / "subjects.csv"
    if table.is_file():
        return table
    brain = MNI152()
    t1, gm, wm = (brain[name].file.read()[0].numpy() for name in ("t1", "gm", "wm"))
    other = 255 - np.minimum(gm.astype(np.int16) + wm, 255)
    classes = np.stack([other, gm, wm]).argmax(0).astype(np.uint8)
    frame = brain["t1"].frame
    middle = t1.shape[1] // 2
    table.parent.mkdir(exist_ok=True)
    for subject, first, last in (("posterior", 0, middle), ("anterior", middle, t1.shape[1])):
        affine = frame.affine.copy()
        affine[:3, 3] += affine[:3, 1] * first
        for name, volume in (("t1", t1), ("label", classes)):
            half = np.ascontiguousarray(volume[:, first:last])
            write(table.parent / f"{subject}_{name}.nii.gz", half[None], Frame(half.shape, affine))
    rows = ["subject,t1,label,split", *(f"{s},{s}_t1.nii.gz,{s}_label.nii.gz,{part}" for s, part in _HALVES)]
    with replacing(table) as file:
        file.write("\n".join(rows).encode() + b"\n")
    return table


def head_mask(t1: np.ndarray) -> np.ndarray:
    """The scalp and all within it, for an image whose air outside the head is already 0, as in Colin27.

    The largest connected part above 0, its holes filled slice by slice along the last axis: also those that open at
    the cut through the neck, where a hole is a hole in the slice but not in the volume.

    Args:
        t1: (I, J, K), the last axis from inferior to superior.

    Returns:
        (I, J, K) uint8, 1 in the head.
    """
    parts = np.empty(t1.shape, dtype=np.int32)
    ndimage.label(t1 > 0, output=parts)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    largest = (parts > 0) & (parts == sizes.argmax())
    slices = [np.asarray(ndimage.binary_fill_holes(largest[..., k])) for k in range(largest.shape[-1])]
    return np.stack(slices, axis=-1).astype(np.uint8)


def _above_zero(image: np.ndarray) -> np.ndarray:
    return (image > 0).astype(np.uint8)


def _mask(filename: str, recipe: Callable[[np.ndarray], np.ndarray], source: Path) -> Path:
    """The cached mask of an image, computed if it is missing; a new recipe needs a new version in the filename."""
    path = cache_dir() / filename
    if not path.is_file():
        file = read_header(source)
        write(path, recipe(file.read()[0].numpy())[None], file.frame, header=file.header)
    return path
