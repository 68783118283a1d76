"""Counts the connected components of every label of a volume in one pass over its planes."""

import numpy as np
from jaxtyping import Shaped

from voxquilt.reporting.label_runs import Runs, runs_of_planes

# Runs up to which components are counted, in a small volume and in a large one, and voxels per run between: noise has
# more. A run takes about fifty bytes.
_RUNS, _MOST_RUNS, _VOXELS = 2**18, 2**22, 16


class ComponentCounter:
    """Counts the components of labels whose planes come in order; 26 neighbours are connected, those at corners too.

    Memory follows the number of runs, not the number of voxels: a volume of components, as `scipy.ndimage.label` makes
    it for each label, would be four to eight times as large as the labels. Of labels that are noise, which have a run
    for each voxel, nothing is counted.

    Args:
        voxels: Voxels of the volume.
    """

    def __init__(self, voxels: int) -> None:
        self._most = min(max(_RUNS, voxels // _VOXELS), _MOST_RUNS)
        self._owners: list[np.ndarray] = []
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self._before: Runs | None = None
        self._count = 0

    def add(self, runs: Runs) -> None:
        """Add the runs of the next plane."""
        first, before = self._count, self._before
        self._count += len(runs)
        if self._count > self._most:
            self._owners, self._pairs, self._before = [], [], None
            return
        self._pairs += [_numbered(a, first, b, first) for a, b in runs.touching(runs, [1])]
        if before is not None:
            pairs = runs.touching(before, [-1, 0, 1])
            self._pairs += [_numbered(a, first, b, first - len(before)) for a, b in pairs]
        self._owners.append(runs.labels)
        self._before = runs

    def counts(self) -> dict[int, int] | None:
        """The number of components of each label above 0; None of noise."""
        if self._count > self._most:
            return None
        labels = np.concatenate(self._owners)
        roots = _roots(len(labels), self._pairs)
        found, counts = np.unique(labels[roots == np.arange(len(roots))], return_counts=True)
        return dict(zip(found.tolist(), counts.tolist(), strict=True))


def count_components(labels: Shaped[np.ndarray, "i j k"]) -> dict[int, int] | None:
    """The number of components of each label above 0 of a volume, see ComponentCounter; None of noise.

    Args:
        labels: Numbers of labels, in any order in memory.
    """
    counter = ComponentCounter(labels.size)
    for runs in runs_of_planes(labels):
        counter.add(runs)
    return counter.counts()


def _numbered(a: np.ndarray, first_a: int, b: np.ndarray, first_b: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers within two planes as numbers in the volume; 32 bits, since noise has many of them."""
    return (a + first_a).astype(np.int32), (b + first_b).astype(np.int32)


def _roots(count: int, pairs: list[tuple[np.ndarray, np.ndarray]]) -> Shaped[np.ndarray, " n"]:
    """The lowest number in the component of each number, where the two of a pair are connected."""
    roots = np.arange(count, dtype=np.int32)
    a, b = (np.concatenate([pair[side] for pair in pairs]) if pairs else roots[:0] for side in (0, 1))
    while True:
        of_a, of_b = roots[a], roots[b]
        apart = of_a != of_b
        if not apart.any():
            return roots
        a, b, of_a, of_b = a[apart], b[apart], of_a[apart], of_b[apart]
        # Every root that has a lower neighbour gets it as its parent; then all point at their roots again.
        np.minimum.at(roots, np.maximum(of_a, of_b), np.minimum(of_a, of_b))
        while not np.array_equal(shorter := roots[roots], roots):
            roots = shorter
