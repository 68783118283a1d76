"""Divides planes of labels into runs, and counts their components, on a device: as label_runs and components do.

Every operation here gives the same result each time, whatever order a device's threads come in, and few wait for it.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Int32, Int64, Integer
from torch import Tensor

from voxquilt.reporting.components import most_runs
from voxquilt.stitching.device_transfer import upload

# Runs whose neighbours are looked for at a time: of noise each has a dozen.
_RUNS = 2**18


class DeviceRuns:
    """The runs of some planes of a volume, of labels above 0.

    Args:
        planes: Numbers of labels, of which lines along the last axis are divided.
        seen: How many of the first planes have been divided before, 0 or 1: what runs touch is looked for there, too.
    """

    def __init__(self, planes: Integer[Tensor, "n lines length"], seen: int) -> None:
        count, lines, length = planes.shape
        self._line, self._plane = length + 1, (lines + 1) * (length + 1)
        # A 0 between lines, and a line of them between planes: no run goes on there, or touches one across them.
        flat = planes.new_zeros(count * self._plane + 1)
        flat[1:].view(count, lines + 1, length + 1)[:, :lines, :length] = planes
        changes = flat[1:] != flat[:-1]
        starts = (changes & (flat[1:] != 0)).nonzero().view(-1)
        self._labels, self._starts = flat[1:][starts], starts.int()
        self._stops = (changes & (flat[:-1] != 0)).nonzero().view(-1).int()
        self.before = int((self._starts < self._plane).sum()) if seen else 0
        """Runs of planes seen before, which have the first numbers."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labels(self) -> Integer[Tensor, " runs"]:
        """The label of each run."""
        return self._labels[self.before :]

    @property
    def places(self) -> tuple[Int32[Tensor, " runs"], ...]:
        """The plane of each run among those given, its line, its first voxel there, and the one behind its last."""
        starts, stops = self._starts[self.before :], self._stops[self.before :]
        planes = starts.div(self._plane, rounding_mode="floor")
        rest = starts - planes * self._plane
        lines = rest.div(self._line, rounding_mode="floor")
        firsts = rest - lines * self._line
        return planes, lines, firsts, stops - (starts - firsts)

    def touching(self) -> Iterator[tuple[Int64[Tensor, " pairs"], Int64[Tensor, " pairs"]]]:
        """Numbers of runs that touch, those at corners too, and have one label: side by side, the later one first."""
        # The line before, and three lines of the plane before.
        apart = [[self._line], [self._plane - self._line], [self._plane], [self._plane + self._line]]
        lines = upload(torch.tensor(apart, dtype=torch.int32), self._starts.device)
        for first in range(self.before, len(self._starts), _RUNS):
            starts, stops = self._starts[first : first + _RUNS], self._stops[first : first + _RUNS]
            low = torch.searchsorted(self._stops, starts - (lines + 1), right=True).view(-1)
            high = torch.searchsorted(self._starts, stops - (lines - 1)).view(-1)
            counts = (high - low).clamp(min=0)
            ends = counts.cumsum(0)
            pairs = int(ends[-1])
            rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=pairs)
            there = torch.arange(pairs, device=counts.device) + (low - (ends - counts))[rows]
            here = rows % len(starts) + first
            same = (self._labels[here] == self._labels[there]).nonzero().view(-1)
            yield here[same], there[same]


class DeviceComponents:
    """Counts the components of labels from their runs; see `voxquilt.reporting.components.ComponentCounter`.

    Args:
        voxels: Voxels of the volume.
    """

    def __init__(self, voxels: int) -> None:
        self._most = most_runs(voxels)
        self._ranks: list[Tensor] = []
        self._links: list[Tensor] = []
        self._count = 0

    def add(self, runs: DeviceRuns, ranks: Integer[Tensor, " runs"]) -> None:
        """Add the runs of the next planes.

        Args:
            runs: The runs.
            ranks: The place of each one's label among all labels.
        """
        first = self._count - runs.before
        self._count += len(runs)
        if self._is_noise:
            self._ranks, self._links = [], []
            return
        numbers = torch.arange(runs.before + len(runs), device=ranks.device)
        roots = numbers.clone()
        for here, there in runs.touching():
            roots = _join(roots, here, there)
        later = (roots != numbers).nonzero().view(-1)
        self._ranks.append(ranks)
        self._links.append(torch.stack([later, roots[later]]) + first)

    @property
    def _is_noise(self) -> bool:
        return self._count > self._most

    def counts(self, labels: int) -> list[int] | None:
        """The number of components of each of so many labels, once all runs have been added; None of noise."""
        if self._is_noise:
            return None
        ranks = torch.cat(self._ranks)
        numbers = torch.arange(len(ranks), device=ranks.device)
        later, earlier = torch.cat(self._links, 1)
        roots = _join(numbers.clone(), later, earlier)
        return torch.bincount(ranks[roots == numbers], minlength=labels).tolist()


def _join(
    roots: Int64[Tensor, " runs"], a: Int64[Tensor, " pairs"], b: Int64[Tensor, " pairs"]
) -> Int64[Tensor, " runs"]:
    """The lowest number in the component of each number, once those of a are connected to those of b.

    Args:
        roots: The same before.
        a, b: Numbers.
    """
    while True:
        a, b = roots[a], roots[b]
        apart = (a != b).nonzero().view(-1)
        if not len(apart):
            return roots
        a, b = a[apart], b[apart]
        # Every root that has a lower neighbour gets the lowest of them as its parent; then all point at their roots
        # again. Chains have at most as many parents as there are pairs, and each jump makes them half as long: to ask
        # the device after each whether it was the last takes longer.
        roots = roots.scatter_reduce(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
        for _ in range(min(len(a), len(roots)).bit_length()):
            roots = roots[roots]
