"""Cuts sagittal, coronal and axial planes out of volumes of any orientation, as grey levels and labels of a picture."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Shaped, UInt8
from PIL import Image

from voxquilt.geometry.frame import Frame, Triple, closest_axes

HEIGHT = 400  # pixels that the lowest plane has at least
LONGEST = 1600  # pixels that no plane exceeds, which takes precedence for needles and for very large volumes


@dataclass(frozen=True)
class View:
    """One plane of an RAS volume: the axis it cuts, those to the picture's right and up, and the letters there."""

    cut: int
    right: int
    up: int
    letters: str  # left, right, bottom, top


VIEWS = (View(0, 1, 2, "PAIS"), View(1, 0, 2, "LRIS"), View(2, 0, 1, "LRPA"))


def to_ras(volume: np.ndarray, frame: Frame) -> np.ndarray:
    """A view with axes in the order right, anterior, superior, all of them ascending; nothing is copied."""
    _, signs = closest_axes(frame.affine)
    return volume[tuple(slice(None, None, sign) for sign in signs)].transpose(ras_order(frame))


def ras_order(frame: Frame) -> list[int]:
    """The voxel axes that run along right, anterior and superior."""
    world, _ = closest_axes(frame.affine)
    return [world.index(axis) for axis in range(3)]


def centre_of(labels: np.ndarray) -> Triple:
    """The voxel nearest to the centre of mass of all labels."""
    # Plane by plane along the axis of the longest stride: a large volume is read once, in order, and not copied.
    slow = int(np.argmax(np.abs(labels.strides)))
    rest = [axis for axis in range(3) if axis != slow]
    counts = [np.zeros(n, dtype=np.int64) for n in labels.shape]
    for n, plane in enumerate(np.moveaxis(labels, slow, 0)):
        inside = plane != 0
        counts[slow][n] = np.count_nonzero(inside)
        counts[rest[0]] += np.count_nonzero(inside, axis=1)
        counts[rest[1]] += np.count_nonzero(inside, axis=0)
    total = int(counts[0].sum())
    if not total:
        i, j, k = (n // 2 for n in labels.shape)
    else:
        # In integers, so that the planes do not depend on the order of summation.
        i, j, k = ((2 * int(np.arange(len(c)) @ c) + total) // (2 * total) for c in counts)
    return i, j, k


def plane_of(volume: np.ndarray, view: View, centre: Triple) -> Shaped[np.ndarray, "up right"]:
    """The voxels where `view` cuts the volume, the picture's top row first."""
    # take() would first copy a volume that is not C-ordered.
    return np.moveaxis(volume, view.cut, 0)[centre[view.cut]].T[::-1]


def window_of_planes(planes: list[Shaped[np.ndarray, "_ _"]]) -> tuple[float, float]:
    """The values that are black and white in all planes."""
    values = np.concatenate([plane.ravel() for plane in planes]).astype(np.float64) if planes else np.zeros(0)
    values = values[np.isfinite(values)]
    low, high = np.percentile(values[values != 0], (1, 99)) if values.any() else (0.0, 0.0)
    if low == high and values.size:  # a mask, or a constant image
        low, high = values.min(), values.max()
    return float(low), float(high)


def to_grey(plane: Shaped[np.ndarray, "_ _"], black: float, white: float) -> UInt8[np.ndarray, "_ _"]:
    shares = (plane.astype(np.float64) - black) / ((white - black) or 1.0)
    return (np.nan_to_num(np.clip(shares, 0, 1)) * 255).round().astype(np.uint8)


def pixels_per_mm(extents: list[float], finest: float) -> float:
    """One scale for all planes, from the extents of the volume and its smallest voxel size in mm."""
    # The axial plane is as high as the volume is long; the others are as high as the volume. If it fits, every voxel is
    # at least a pixel.
    wanted = max(HEIGHT / min(extents[1], extents[2]), 1 / finest)
    return min(wanted, LONGEST / max(extents))


def resized(grey: UInt8[np.ndarray, "_ _"], size: tuple[int, ...]) -> UInt8[np.ndarray, "h w"]:
    picture = Image.fromarray(np.ascontiguousarray(grey))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def resized_labels(labels: Shaped[np.ndarray, "_ _"], size: tuple[int, ...]) -> Int[np.ndarray, "h w"]:
    # Pillow has no 64-bit integers.
    rows, columns = ((2 * np.arange(m) + 1) * n // (2 * m) for m, n in zip(size, labels.shape, strict=True))
    return labels[np.ix_(rows, columns)].astype(np.int64)
