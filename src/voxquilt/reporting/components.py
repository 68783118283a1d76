"""Counts the connected components of every label of a volume in one pass over its planes."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int32, Integer, Shaped

from voxquilt.data.spare_cores import map_in_threads
from voxquilt.reporting.label_runs import Runs

# Runs up to which components are counted, in a small volume and in a large one, and voxels per run between: noise has
# more. A run takes about fifty bytes.
_RUNS, _MOST_RUNS, _VOXELS = 2**18, 2**22, 16
# Voxels that are looked at at a time: many enough that threads seldom wait for each other.
_AT_A_TIME = 2**19


def most_runs(voxels: int) -> int:
    """The number of runs from which on the labels of a volume are noise."""
    return min(max(_RUNS, voxels // _VOXELS), _MOST_RUNS)


class ComponentCounter:
    """Counts the components of labels; 26 neighbours are connected, those at corners too.

    Memory follows the number of runs, not the number of voxels: a volume of components, as `scipy.ndimage.label` makes
    it for each label, would be four to eight times as large as the labels. Of labels that are noise, which have a run
    for each voxel, nothing is counted.

    Args:
        volume: The labels, of which lines along the last axis are divided into runs.
        threads: Threads that look at planes.
    """

    def __init__(self, volume: Shaped[np.ndarray, "n lines length"], threads: int = 1) -> None:
        self._volume, self._threads = volume, threads
        self._most = most_runs(volume.size)
        self._labels: list[np.ndarray] = []
        self._links: list[np.ndarray] = []
        self._count = 0

    def runs(self) -> Iterator[Runs]:
        """The runs of all planes, some planes at a time; once they have come there are `counts`."""
        planes = len(self._volume)
        step = max(1, _AT_A_TIME // max(1, self._volume[0].size))

        def look(start: int) -> tuple[Runs, np.ndarray]:
            runs = Runs(self._volume, start, min(start + step, planes))
            return runs, np.empty((2, 0), np.int32) if self._is_noise else _links(runs)

        for runs, links in map_in_threads(look, range(0, planes, step), self._threads):
            first = self._count
            self._count += len(runs)
            if self._is_noise:
                self._labels, self._links = [], []
            else:
                self._labels.append(runs.labels)
                self._links.append(links + np.int32(first - runs.before))
            yield runs

    @property
    def _is_noise(self) -> bool:
        return self._count > self._most

    def counts(self) -> dict[int, int] | None:
        """The number of components of each label above 0; None of noise."""
        if self._is_noise:
            return None
        labels = np.concatenate(self._labels)
        roots = _roots(len(labels), *np.concatenate(self._links, 1))
        found, counts = np.unique(labels[roots == np.arange(len(roots))], return_counts=True)
        return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _links(runs: Runs) -> Int32[np.ndarray, "2 n"]:
    """Numbers of runs, each with the lowest number in its component; of components only, which are fewer than pairs."""
    count = runs.before + len(runs)
    roots = _roots(count, *runs.touching())
    later = np.flatnonzero(roots != np.arange(count))
    return np.stack([later.astype(np.int32), roots[later]])


def _roots(count: int, a: Integer[np.ndarray, " n"], b: Integer[np.ndarray, " n"]) -> Int32[np.ndarray, " count"]:
    """The lowest number in the component of each number, where those of a are connected to those of b."""
    roots = np.arange(count, dtype=np.int32)
    while len(a):
        # Every root that has a lower neighbour gets it as its parent; then all point at their roots again.
        np.minimum.at(roots, np.maximum(a, b), np.minimum(a, b).astype(np.int32))
        while not np.array_equal(shorter := roots[roots], roots):
            roots = shorter
        a, b = roots[a], roots[b]
        apart = np.flatnonzero(a != b)
        a, b = a[apart], b[apart]
    return roots
