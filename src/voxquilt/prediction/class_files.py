"""Divides a map with a channel per class into one file per class, whose names are safe for any file system."""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from voxquilt.stitching.finished_volume import FinishedVolume
from voxquilt.stitching.stitch import Stitch
from voxquilt.vocabulary import MAP, PER_CLASS

# Characters of a class's name in a file's name, which has 255 bytes at most on most file systems.
_LONGEST = 40


def parts_of(volume: FinishedVolume, stitch: Stitch) -> Iterator[tuple[str, np.ndarray]]:
    """What is written of a volume: the end of each file's name, and its (C, I, J, K).

    Args:
        volume: The volume.
        stitch: Has the classes' names, and whether maps have a file per class.
    """
    channels = len(volume.array)
    if stitch.files != PER_CLASS or volume.kind != MAP or channels == 1:
        yield "", volume.array
        return
    names = stitch.class_names or ()
    texts = list(map(str, names)) if len(names) == channels else [str(stitch.number_of(n)) for n in range(channels)]
    for n, name in enumerate(file_names(texts)):
        yield f"_{name}", volume.array[n : n + 1]


def file_names(names: Sequence[str]) -> list[str]:
    """A name for the file of each class: letters, digits, '.', '-' and '_', and no two that differ by case alone.

    >>> file_names(["white matter", "left/right", "White_Matter", "?"])
    ['white_matter', 'left_right', 'White_Matter_2', '3']

    Args:
        names: Names of the classes.
    """
    found: list[str] = []
    taken: set[str] = set()
    for n, name in enumerate(names):
        safe = re.sub(r"[^\w.-]+", "_", name.encode("utf-8", "replace").decode())[:_LONGEST].strip("._") or str(n)
        while safe.casefold() in taken:
            safe = f"{safe}_{n}"
        taken.add(safe.casefold())
        found.append(safe)
    return found
