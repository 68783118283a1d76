"""Divides planes of labels into runs: voxels of one label side by side, of which organs have far fewer than voxels."""

import numpy as np
from jaxtyping import Shaped


class Runs:
    """The runs of some planes of a volume, of labels above 0.

    Args:
        volume: Numbers of labels, of which lines along the last axis are divided; fastest if it is contiguous.
        start, stop: The planes, the last one exclusive.
    """

    def __init__(self, volume: Shaped[np.ndarray, "n lines length"], start: int, stop: int) -> None:
        # The plane before, too, since runs touch those in it.
        self._first, self.stop = max(start - 1, 0), stop
        planes = volume[self._first : stop]
        count, lines, length = planes.shape
        self._line, self._plane = length + 1, (lines + 1) * (length + 1)
        # A 0 between lines, and a line of them between planes: no run goes on there, or touches one across them.
        flat = np.zeros(count * self._plane + 1, planes.dtype)
        flat[1:].reshape(count, lines + 1, length + 1)[:, :lines, :length] = planes
        edges = np.flatnonzero(flat[1:] != flat[:-1])
        values = flat[1:][edges]
        inside = np.flatnonzero(values)
        self._labels, self._starts, self._stops = values[inside], edges[inside], edges[inside + 1]
        self.before = int(np.searchsorted(self._starts, (start - self._first) * self._plane))
        """Runs of the plane before the first, which have the first numbers."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labels(self) -> Shaped[np.ndarray, " runs"]:
        """The label of each run."""
        return self._labels[self.before :]

    @property
    def places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The plane and line of each run, its first voxel in the line, and the voxel behind its last."""
        starts, stops = self._starts[self.before :], self._stops[self.before :]
        planes, rest = np.divmod(starts, self._plane)
        lines, firsts = np.divmod(rest, self._line)
        return planes + self._first, lines, firsts, stops - (starts - firsts)

    def touching(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of runs that touch, those at corners too, and have one label: side by side, the later one first."""
        starts, stops = self._starts[self.before :], self._stops[self.before :]
        pairs: list[tuple[np.ndarray, np.ndarray]] = []
        # Of the line before, and of three lines of the plane before.
        for apart in (self._line, self._plane - self._line, self._plane, self._plane + self._line):
            low = np.searchsorted(self._stops, starts - (apart + 1), "right")
            high = np.searchsorted(self._starts, stops - (apart - 1), "left")
            counts = np.maximum(high - low, 0)
            ends = np.cumsum(counts)
            here = np.repeat(np.arange(self.before, len(self._starts)), counts)
            there = np.arange(len(here)) + np.repeat(low - (ends - counts), counts)
            same = np.flatnonzero(self._labels[here] == self._labels[there])
            pairs.append((here[same], there[same]))
        here, there = map(np.concatenate, zip(*pairs, strict=True))
        return here, there


def slowest_first(volume: Shaped[np.ndarray, "i j k"]) -> list[int]:
    """Axes from the slowest in memory to the fastest."""
    return sorted(range(3), key=lambda n: -abs(volume.strides[n]))
