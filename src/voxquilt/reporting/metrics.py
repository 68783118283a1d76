"""Computes how well the labels of a volume agree with true labels, for each class.

SciPy, which is slow to import, is imported inside functions: most runs have no true labels, and training takes only
`class_dice`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, nan

import numpy as np
from jaxtyping import Float, Int, Integer, Shaped
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix


def class_dice(
    labels: Integer[Tensor, "*volume"], truth: Integer[Tensor, "*volume"], classes: int
) -> Float[Tensor, " n"]:
    """Dice's coefficient 2 |A and B| / (|A| + |B|) of each class; NaN where both are empty.

    Args:
        labels, truth: Classes 0, 1, ... in any shape, the same for both.
        classes: Number of classes.
    """
    counts = multiclass_confusion_matrix(labels.flatten(), truth.flatten(), classes).double()
    return 2 * counts.diagonal() / (counts.sum(0) + counts.sum(1))


@dataclass(frozen=True)
class Agreement:
    """How well one class agrees with the truth.

    Args:
        dice: 2 |A and B| / (|A| + |B|); NaN where both are empty.
        surface_dice: The share of both surfaces that lies within the tolerance of the other; NaN where both are empty.
        hd95_mm: The larger of both directions' 95th percentiles of distances from surface to surface. Infinite where
            one is empty, NaN where both are.
        volume_ml, true_volume_ml: Millilitres.
    """

    dice: float
    surface_dice: float
    hd95_mm: float
    volume_ml: float
    true_volume_ml: float

    @property
    def volume_error_ml(self) -> float:
        """Volume minus true volume, in millilitres."""
        return self.volume_ml - self.true_volume_ml

    @property
    def relative_volume_error(self) -> float:
        """The volume error as a share of the true volume; infinite where only the latter is 0, NaN where both are."""
        if self.true_volume_ml:
            return self.volume_error_ml / self.true_volume_ml
        return inf if self.volume_ml else nan


def agreements(
    labels: Shaped[np.ndarray, "i j k"], truth: Shaped[np.ndarray, "i j k"], affine: np.ndarray, tolerance: float
) -> dict[int, Agreement]:
    """The agreement of every class above 0 that either volume has.

    The surface of a class are its voxels with one of their six neighbours outside it; voxels beyond the volume are
    outside. Distances are between centres of voxels in mm, by the affine, which may be sheared.

    Args:
        labels, truth: Integers of the same shape.
        affine: (4, 4) voxel indices to mm.
        tolerance: mm, of the surface Dice.
    """
    from scipy import ndimage

    classes, labels, truth = _numbered(labels, truth)
    sizes, true_sizes = _counts(_chunks(labels), len(classes)), _counts(_chunks(truth), len(classes))
    pairs = zip(_chunks(labels), _chunks(truth), strict=True)
    shared = _counts((ours[ours == theirs] for ours, theirs in pairs), len(classes))
    boxes, true_boxes = (ndimage.find_objects(volume, len(classes)) for volume in (labels, truth))
    millilitres = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    by_class = {}
    for n in range(1, len(classes)):
        ours, theirs = _surface(labels, boxes[n - 1], n), _surface(truth, true_boxes[n - 1], n)
        to_truth, to_labels = _distances(ours, theirs, affine), _distances(theirs, ours, affine)
        by_class[classes[n]] = Agreement(
            2 * shared[n] / (sizes[n] + true_sizes[n]),
            float(np.mean(np.concatenate([to_truth, to_labels]) <= tolerance)),
            max(_percentile(to_truth), _percentile(to_labels)),
            sizes[n] * millilitres,
            true_sizes[n] * millilitres,
        )
    return by_class


def _numbered(labels: np.ndarray, truth: np.ndarray) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The values that occur, 0 first, and the volumes with each value replaced by its position among them."""
    highest = max(int(labels.max()), int(truth.max()))
    chunks = [*_chunks(labels), *_chunks(truth)]
    if highest < 2**16:  # counting is faster than sorting
        values = np.flatnonzero(sum(np.bincount(chunk, minlength=highest + 1) for chunk in chunks))
    else:
        values = np.unique(np.concatenate([np.unique(chunk) for chunk in chunks]))
    values = np.union1d([0], values).astype(np.int64)
    return values.tolist(), _positions(labels, values), _positions(truth, values)


def _positions(volume: np.ndarray, values: np.ndarray) -> np.ndarray:
    positions = np.empty(volume.shape, np.min_scalar_type(len(values)), order="F")
    for chunk, numbers in zip(_chunks(volume), _chunks(positions), strict=True):
        numbers[:] = np.searchsorted(values, chunk)
    return positions


def _chunks(volume: np.ndarray) -> list[np.ndarray]:
    """Pieces in the order of a NIfTI file: numpy counts in 8-byte integers, which take much memory for a volume."""
    flat = volume.ravel(order="F")
    return [flat[n : n + 2**20] for n in range(0, flat.size, 2**20)]


def _counts(chunks: Iterable[np.ndarray], classes: int) -> list[int]:
    return np.sum([np.bincount(chunk, minlength=classes) for chunk in chunks], axis=0).tolist()


def _surface(volume: np.ndarray, box: tuple[slice, ...] | None, number: int) -> Int[np.ndarray, "n 3"]:
    """Indices of the surface voxels, in the order of the volume."""
    from scipy import ndimage

    if box is None:
        return np.zeros((0, 3), np.int64)
    mask = volume[box] == number
    return np.argwhere(mask > np.asarray(ndimage.binary_erosion(mask))) + [axis.start for axis in box]


def _distances(
    points: Int[np.ndarray, "n 3"], others: Int[np.ndarray, "m 3"], affine: np.ndarray
) -> Float[np.ndarray, " n"]:
    """mm from each point to the nearest of the others."""
    from scipy.spatial import KDTree

    if not len(others):
        return np.full(len(points), inf)
    distances = np.zeros(len(points))
    limits = np.maximum(points.max(0, initial=0), others.max(0)) + 1
    here, there = (np.ravel_multi_index(tuple(p.T), tuple(limits)) for p in (points, others))
    apart = np.isin(here, there, assume_unique=True, invert=True)
    if apart.any():  # good labels share most of their surface with the truth
        tree = KDTree(others @ affine[:3, :3].T, balanced_tree=False, compact_nodes=False)
        distances[apart] = tree.query(points[apart] @ affine[:3, :3].T)[0]
    return distances


def _percentile(distances: np.ndarray) -> float:
    # numpy would interpolate between infinities, which gives NaN.
    if not len(distances) or not np.isfinite(distances).all():
        return inf
    return float(np.percentile(distances, 95))
