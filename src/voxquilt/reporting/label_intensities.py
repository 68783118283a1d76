"""Describes the intensities of labels, by histograms that have been counted of their voxels."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, Integer

PERCENTILES = (5, 50, 95)
# Bins per label of intensities, which is one for each of the numbers that 16 bits hold; and bins of all labels that
# are counted at a time.
_BINS, _TABLE = 2**16, 2**22


@dataclass(frozen=True)
class Intensities:
    """Intensities of an image where a label is.

    Args:
        mean, sd: Mean and standard deviation (of all voxels, not of a sample).
        percentiles: Percentiles 5, 50 and 95, linear between voxels as numpy.percentile has them.
    """

    mean: float
    sd: float
    percentiles: tuple[float, float, float]


@dataclass(frozen=True)
class Bins:
    """The bins of a histogram of each label.

    Args:
        least: Where the first begins.
        width: Width of each; 0 where all voxels have one intensity.
        count: Number of bins.
        exact: Whether each number has a bin of its own.
    """

    least: float | int
    width: float
    count: int
    exact: bool

    @classmethod
    def between(cls, least: float | int, greatest: float | int, *, integers: bool) -> "Bins":
        """Bins between the lowest and the highest intensity: one for each integer where these are few enough."""
        if integers and has_bin_for_each(least, greatest):
            return cls(least, 1.0, int(greatest - least) + 1, True)
        return cls(least, (greatest - least) / _BINS, _BINS, False)

    @property
    def labels_at_a_time(self) -> int:
        """Labels whose histograms make a table of a size that fits anywhere."""
        return max(1, _TABLE // self.count)

    def describe(
        self,
        table: Int64[np.ndarray, "labels bins"],
        sums: Float64[np.ndarray, " labels"],
        squares: Float64[np.ndarray, " labels"],
    ) -> list[Intensities | None]:
        """The intensities of some labels; None of one without voxels.

        Args:
            table: Their histograms.
            sums, squares: Sums of their intensities less the lowest, and of the squares of these; of exact bins they
                are not used, since the histogram has them.
        """
        if self.exact:
            numbers = np.arange(self.count, dtype=np.float64)
            sums, squares = table @ numbers, table @ (numbers * numbers)
        of_labels = zip(table, sums, squares, strict=True)
        return [self._intensities(counts, total, square) for counts, total, square in of_labels]

    def _intensities(self, counts: Integer[np.ndarray, " bins"], total: float, squares: float) -> Intensities | None:
        below = np.cumsum(counts)
        voxels = int(below[-1])
        if not voxels:
            return None
        mean = total / voxels
        middle = 0 if self.exact else 0.5
        percentiles = []
        for percentile in PERCENTILES:
            place = percentile / 100 * (voxels - 1)
            low, high = np.searchsorted(below, [int(place), min(int(place) + 1, voxels - 1)], "right")
            between = middle + low + (high - low) * (place - int(place))
            percentiles.append(float(self.least + self.width * between))
        sd = float(np.sqrt(max(squares / voxels - mean * mean, 0.0)))
        return Intensities(float(self.least + mean), sd, (percentiles[0], percentiles[1], percentiles[2]))


def has_bin_for_each(least: float | int, greatest: float | int) -> bool:
    """Whether there is a bin for each integer between two."""
    return greatest - least < _BINS
