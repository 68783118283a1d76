"""Computes numbers of each label of a volume: where it lies, how large it is, and which intensities it covers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Shaped

from voxquilt.data.spare_cores import map_in_threads, spare_threads
from voxquilt.geometry.frame import Frame
from voxquilt.reporting.components import ComponentCounter
from voxquilt.reporting.device_statistics import DeviceVolume
from voxquilt.reporting.label_intensities import Bins, Intensities, has_bin_for_each
from voxquilt.reporting.label_runs import slowest_first
from voxquilt.stitching.device_transfer import beside_the_network
from voxquilt.stitching.label_values import count_values

# Voxels that are worked on at a time: few enough that what is computed of them stays in the cache.
_VOXELS = 2**18
# Runs whose places are counted at a time.
_RUNS = 2**17
# Voxels of a volume whose numbers are computed in threads; of smaller ones that takes no longer than to begin them.
_LARGE = 2**22


@dataclass(frozen=True)
class LabelStatistics:
    """Numbers of one label.

    Args:
        voxels: Number of voxels.
        ml: Their volume.
        centroid: Centre of mass in mm, right, anterior and superior; None without voxels, as are the next ones.
        box: First voxels along i, j, k, and those behind the last.
        intensities: By the name of the image.
        components: Number of components, of voxels that share a corner; None where labels are noise.
        touches_border: Whether a voxel lies at an end of an axis; axes of one voxel do not count.
    """

    voxels: int = 0
    ml: float = 0.0
    centroid: tuple[float, ...] | None = None
    box: tuple[int, ...] | None = None
    intensities: Mapping[str, Intensities] | None = None
    components: int | None = 0
    touches_border: bool = False


def label_statistics(
    labels: Shaped[np.ndarray, "i j k"],
    frame: Frame,
    images: Mapping[str, Shaped[np.ndarray, "i j k"]],
    known: Sequence[int] = (),
    device: torch.device | None = None,
) -> dict[int, LabelStatistics]:
    """The numbers of each label above 0, in the order of the labels.

    Everything is exact but percentiles of images of which 16 bits do not hold the range of integers, or that hold
    fractions: these are within 1/131072 of the range that all labels cover in the image.

    >>> labels = np.zeros((4, 4, 4), np.uint8)
    >>> labels[1:3, 1:3, :2] = 3
    >>> found = label_statistics(labels, Frame(labels.shape, np.eye(4)), {"t1": 2 * labels})
    >>> found[3].voxels, found[3].centroid, found[3].box, found[3].touches_border
    (8, (1.5, 1.5, 0.5), (1, 1, 0, 3, 3, 2), True)

    Args:
        labels: Numbers of labels.
        frame: Their geometry.
        images: Intensities on the same grid; what is not finite counts as 0, as the network sees it.
        known: Labels that are listed even if no voxel has them.
        device: A device of torch's that computes them, the same numbers within the rounding of float64; None for
            NumPy on the host.

    Raises:
        Exception: the device has too little memory, or cannot compute with a type or with such numbers.
    """
    if device is None:
        return _assemble(_Volume(labels, images, sorted({*known, *count_values(labels)} - {0})), frame, images)
    with beside_the_network(device):
        return _assemble(DeviceVolume(labels, images, known, device), frame, images)


def _assemble(volume: "_Volume | DeviceVolume", frame: Frame, images: Iterable[str]) -> dict[int, LabelStatistics]:
    ml = abs(float(np.linalg.det(frame.affine[:3, :3]))) / 1000  # of sheared voxels too
    intensities = {name: volume.intensities(n) for n, name in enumerate(images)}
    statistics: dict[int, LabelStatistics] = {}
    for rank, number in enumerate(volume.numbers):
        alongs = [counts[rank] for counts in volume.profiles]
        voxels = int(alongs[0].sum())
        if not voxels:
            statistics[number] = LabelStatistics()
            continue
        centre = [float(along @ np.arange(len(along))) / voxels for along in alongs]
        ends = [(int(places[0]), int(places[-1]) + 1) for places in map(np.flatnonzero, alongs)]
        statistics[number] = LabelStatistics(
            voxels,
            voxels * ml,
            tuple((frame.affine[:3, :3] @ centre + frame.affine[:3, 3]).tolist()),
            (*(first for first, _ in ends), *(stop for _, stop in ends)),
            {name: found for name, of_labels in intensities.items() if (found := of_labels[rank]) is not None},
            None if volume.components is None else volume.components[number],
            any(n > 1 and (first == 0 or stop == n) for n, (first, stop) in zip(map(len, alongs), ends, strict=True)),
        )
    return statistics


def _add_counts(into: np.ndarray, ranks: np.ndarray, places: np.ndarray, voxels: np.ndarray) -> None:
    """Add voxels at places along an axis to the counts of their ranks."""
    counts = np.bincount(ranks * into.shape[1] + places, voxels, into.size)
    into += counts.astype(np.int64).reshape(into.shape)


def _above(values: np.ndarray, least: float | int) -> np.ndarray:
    """Values less the lowest, in a type that holds the differences."""
    if values.dtype.kind not in "iub":
        return values - least
    if values.dtype.itemsize < 8:
        return values.astype(np.int64) - least
    # Modulo 2^64, where the difference of any two numbers of 64 bits is right.
    return values.astype(np.uint64) - np.array(least).astype(np.uint64)


class _Volume:
    """Labels and images, of which only the labelled voxels are looked at, some planes at a time.

    Args:
        labels: Numbers of labels.
        images: See `label_statistics`.
        numbers: The numbers in ascending order; the place of a number among them is its rank.
    """

    def __init__(self, labels: np.ndarray, images: Mapping[str, np.ndarray], numbers: Sequence[int]) -> None:
        self.numbers = list(numbers)
        self._axes = slowest_first(labels)
        self._labels = labels.transpose(self._axes)
        # The rank of each number where numbers are small.
        small = bool(self.numbers) and self.numbers[-1] < 2**16
        self._ranks = np.zeros(2**16 if small else 0, np.int64)
        self._ranks[self.numbers if small else []] = range(len(self.numbers) if small else 0)
        self._images = [image.transpose(self._axes) for image in images.values()]
        self._threads = spare_threads() if labels.size >= _LARGE else 1
        counter = ComponentCounter(self._labels, self._threads)
        self.profiles = self._count_along_axes(counter)
        """The voxels of each rank along i, j, k."""
        self.components = counter.counts()
        """Components by number; None of noise."""

    def _count_along_axes(self, counter: ComponentCounter) -> list[np.ndarray]:
        planes, lines, length = self._labels.shape
        counts = [np.zeros((len(self.numbers), n), np.int64) for n in (planes, lines, length + 1)]
        chunk: list[tuple[np.ndarray, ...]] = []
        for runs in counter.runs():
            chunk.append((self._rank(runs.labels), *runs.places))
            if runs.stop == planes or sum(len(ranks) for ranks, *_ in chunk) >= _RUNS:
                ranks, across, line, first, stop = map(np.concatenate, zip(*chunk, strict=True))
                _add_counts(counts[0], ranks, across, stop - first)
                _add_counts(counts[1], ranks, line, stop - first)
                # A run adds a voxel from its first on, and takes it away behind its last.
                _add_counts(counts[2], np.tile(ranks, 2), np.concatenate([first, stop]), np.repeat([1, -1], len(first)))
                chunk = []
        counts[2] = np.cumsum(counts[2], axis=1)[:, :-1]
        return [counts[self._axes.index(axis)] for axis in range(3)]

    def _rank(self, labels: np.ndarray) -> np.ndarray:
        return self._ranks[labels] if len(self._ranks) else np.searchsorted(np.array(self.numbers), labels)

    def intensities(self, image: int) -> list[Intensities | None]:
        """The intensities of one of the images, by rank; None for a rank without voxels."""
        voxels = self._images[image]
        bins = Bins.between(*self._range(voxels), integers=voxels.dtype.kind in "iub")
        found: list[Intensities | None] = []
        for rank in range(0, len(self.numbers), bins.labels_at_a_time):
            count = min(bins.labels_at_a_time, len(self.numbers) - rank)
            table, sums, squares = np.zeros((count, bins.count), np.int64), np.zeros(count), np.zeros(count)
            for ranks, values in self._values(voxels, bins.least):
                mine = (ranks >= rank) & (ranks < rank + count)
                if not mine.all():
                    ranks, values = ranks[mine], values[mine]
                ranks = ranks - rank if rank else ranks
                if bins.exact:
                    places = values.astype(np.int64, copy=False)
                else:
                    # Fractions from here on: no integer holds the square of what lies 32 bits above the lowest.
                    values = values.astype(np.float64, copy=False)
                    places = np.minimum((values / (bins.width or 1)).astype(np.int64), bins.count - 1)
                    sums += np.bincount(ranks, values, count)
                    squares += np.bincount(ranks, values * values, count)
                table.reshape(-1)[:] += np.bincount(ranks * bins.count + places, minlength=table.size)
            found += bins.describe(table, sums, squares)
        return found

    def _range(self, image: np.ndarray) -> tuple[float | int, float | int]:
        """The lowest and highest intensity of labelled voxels; of all voxels, where each number has its own bin."""
        if image.dtype.kind in "iub":
            least, greatest = image.min().item(), image.max().item()
            if has_bin_for_each(least, greatest):
                return least, greatest
        ends = [(values.min().item(), values.max().item()) for _, values in self._values(image)]
        return min((low for low, _ in ends), default=0), max((high for _, high in ends), default=0)

    def _values(self, image: np.ndarray, least: float | int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ranks and intensities of labelled voxels, fractions as float64; less the lowest, where it is given."""
        along = self.profiles[self._axes[0]].sum(axis=0)
        places = np.flatnonzero(along)
        start, stop = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        step = max(1, _VOXELS // max(1, self._labels[0].size))

        def look(first: int) -> tuple[np.ndarray, np.ndarray]:
            planes = slice(first, min(first + step, stop))
            flat = np.ascontiguousarray(self._labels[planes]).reshape(-1)
            voxels = np.flatnonzero(flat != 0)  # faster than of integers
            values = np.ascontiguousarray(image[planes]).reshape(-1)[voxels]
            if values.dtype.kind == "f":
                values = np.where(np.isfinite(values), values, 0).astype(np.float64)
            return self._rank(flat[voxels]), values if least is None else _above(values, least)

        for ranks, values in map_in_threads(look, range(start, stop, step), self._threads):
            if len(ranks):
                yield ranks, values
