"""Divides planes of labels into runs: voxels of one label side by side, of which organs have far fewer than voxels."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Shaped


class Runs:
    """The runs of a plane, of labels above 0.

    Args:
        plane: Numbers of labels.
    """

    def __init__(self, plane: Shaped[np.ndarray, "lines n"]) -> None:
        lines, length = plane.shape
        # Lines have one more voxel, a 0, so that no run goes on in the next line.
        padded = np.zeros((lines, length + 1), plane.dtype)
        padded[:, :length] = plane
        flat = padded.reshape(-1)
        edges = np.flatnonzero(np.diff(flat, prepend=flat.dtype.type(0)))
        inside = np.flatnonzero(flat[edges])
        self._line = length + 1
        self.labels = flat[edges[inside]]
        """The label of each run."""
        self._starts, self._stops = edges[inside], edges[np.minimum(inside + 1, len(edges) - 1)]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The line of each run, its first voxel in the line, and the voxel behind its last."""
        lines = self._starts // self._line
        return lines, self._starts - lines * self._line, self._stops - lines * self._line

    def touching(self, others: "Runs", lines: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
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


def runs_of_planes(labels: Shaped[np.ndarray, "i j k"]) -> Iterator[Runs]:
    """The runs along the axis that is contiguous in memory, of the planes across the slowest one."""
    for plane in labels.transpose(slowest_first(labels)):
        yield Runs(plane)


def slowest_first(volume: Shaped[np.ndarray, "i j k"]) -> list[int]:
    """Axes from the slowest in memory to the fastest."""
    return sorted(range(3), key=lambda n: -abs(volume.strides[n]))
