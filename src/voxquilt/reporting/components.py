"""Counts the connected components of every label of a volume in one pass over its planes."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Shaped


def count_components(labels: Shaped[np.ndarray, "i j k"]) -> dict[int, int]:
    """The number of components of each label above 0, where voxels that share a corner are connected (26 neighbours).

    Memory follows the number of runs, voxels of one label side by side, and not the number of voxels: a volume of
    components, as `scipy.ndimage.label` makes it for each label, would be four to eight times as large as the labels.

    Args:
        labels: Numbers of labels, in any order in memory.
    """
    # Runs lie along the axis that is contiguous in memory, and planes across the slowest one.
    planes = labels.transpose(sorted(range(3), key=lambda n: -abs(labels.strides[n])))
    owners, pairs, first = [], [], 0
    before: _Runs | None = None
    for plane in planes:
        runs = _Runs(plane)
        pairs += [(a + first, b + first) for a, b in runs.touching(runs, [1])]
        if before is not None:
            pairs += [(a + first, b + first - len(before.labels)) for a, b in runs.touching(before, [-1, 0, 1])]
        owners.append(runs.labels)
        before, first = runs, first + len(runs.labels)
    of_run = np.concatenate(owners)
    roots = _roots(len(of_run), pairs)
    found, counts = np.unique(of_run[roots == np.arange(len(roots))], return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


class _Runs:
    """The runs of a plane, whose lines have one more voxel, a 0, so that no run goes on in the next line.

    Args:
        plane: Numbers of labels.
    """

    def __init__(self, plane: Shaped[np.ndarray, "lines n"]) -> None:
        lines, length = plane.shape
        padded = np.zeros((lines, length + 1), plane.dtype)
        padded[:, :length] = plane
        flat = padded.reshape(-1)
        edges = np.flatnonzero(np.diff(flat, prepend=flat.dtype.type(0)))
        inside = np.flatnonzero(flat[edges])
        self._line = length + 1
        self.labels = flat[edges[inside]]
        self._starts, self._stops = edges[inside], edges[np.minimum(inside + 1, len(edges) - 1)]

    def touching(self, others: "_Runs", lines: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers of runs here and among others that touch, have the same label, and lie so many lines apart."""
        for apart in lines:
            shift = apart * self._line
            low = np.searchsorted(others._stops, self._starts + (shift - 1), "right")
            high = np.searchsorted(others._starts, self._stops + (shift + 1), "left")
            counts = np.maximum(high - low, 0)
            ends = np.cumsum(counts)
            here = np.repeat(np.arange(len(counts)), counts)
            there = np.arange(len(here)) + np.repeat(low - (ends - counts), counts)
            same = self.labels[here] == others.labels[there]
            yield here[same], there[same]


def _roots(count: int, pairs: list[tuple[np.ndarray, np.ndarray]]) -> Shaped[np.ndarray, " n"]:
    """The lowest number in the component of each number, where the two of a pair are connected."""
    roots = np.arange(count)
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
