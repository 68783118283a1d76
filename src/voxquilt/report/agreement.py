"""Compares the label files that two runs have written for one subject, by Dice's coefficient of each class."""

from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from voxquilt.data.formats.image_file import open_image
from voxquilt.errors import InputError
from voxquilt.stitching.label_values import iterate_planes


def dice_of_files(ours: Path, theirs: Path, *, series: bool = False) -> dict[int, float]:
    """Dice's coefficient by the number of each class in two label files; of channels, by their number from 0.

    Args:
        ours, theirs: The files.
        series: Whether channels are volumes of a series, whose labels count together, and not masks.

    Raises:
        InputError: a file cannot be read, or the two have different grids or channels.
    """
    first, second = open_image(ours), open_image(theirs)
    if first.shape != second.shape or not np.allclose(first.frame.affine, second.frame.affine, atol=1e-3):
        raise InputError(f"{ours} and {theirs} lie on different grids, or have other channels")
    a, b = first.read().numpy(), second.read().numpy()
    if series or len(a) == 1:
        return dice_by_class(a, b)
    found = {n: dice_by_class((x > 0)[None], (y > 0)[None]) for n, (x, y) in enumerate(zip(a, b, strict=True))}
    return {n: by_class[1] for n, by_class in found.items() if 1 in by_class}


def dice_by_class(a: Shaped[np.ndarray, "t i j k"], b: Shaped[np.ndarray, "t i j k"]) -> dict[int, float]:
    """2 |A and B| / (|A| + |B|) of each label above 0 that either volume, or series of volumes, has.

    >>> a, b = np.array([[[[0, 1, 1, 2]]]]), np.array([[[[0, 1, 2, 2]]]])
    >>> {n: round(dice, 3) for n, dice in dice_by_class(a, b).items()}
    {1: 0.667, 2: 0.667}
    """
    sizes, shared = dict[int, int](), dict[int, int]()
    for ours, theirs in zip(iterate_planes(a), iterate_planes(b), strict=True):
        for values, into in ((ours, sizes), (theirs, sizes), (ours[ours == theirs], shared)):
            for number, count in zip(*np.unique(values, return_counts=True), strict=True):
                into[int(number)] = into.get(int(number), 0) + int(count)
    return {n: 2 * shared.get(n, 0) / size for n, size in sorted(sizes.items()) if n}
