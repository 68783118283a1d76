"""Provides the order of random patches in an epoch, which each process computes for itself."""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler


class EpochOrder(Sampler[int]):
    """The numbers of an epoch's patches, each once, in an order that is drawn anew for each epoch.

    Patches are mixed within groups of volumes, so that only one group has to be in memory. Every process
    takes each `ranks`-th number, so together they see what one process with batches `ranks` times as large would see.

    Args:
        volumes: Number of volumes.
        per_volume: Patches of each volume.
        group: Number of volumes whose patches are mixed.
        seed: Seed of the order.
        rank, ranks: This process's rank, and the number of processes.
        taken: Gives how many of the epoch's numbers this process has had already, where a training resumes in the
            middle of an epoch. They are left out.
    """

    def __init__(
        self,
        volumes: int,
        per_volume: int,
        *,
        group: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        taken: Callable[[], int] = int,
    ) -> None:
        self._volumes, self._per_volume, self._group, self._seed = volumes, per_volume, group, seed
        self._rank, self._ranks, self._taken = rank, ranks, taken
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning with the next epoch, also when a training resumes from a checkpoint."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._volumes * self._per_volume // self._ranks

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self._seed, self._epoch])
        volumes = random.permutation(self._volumes)
        numbers: list[int] = []
        for first in range(0, self._volumes, self._group):
            group = volumes[first : first + self._group]
            mixed = (group[:, None] * self._per_volume + np.arange(self._per_volume)).ravel()
            numbers.extend(random.permutation(mixed).tolist())
        offset = self._epoch * self._volumes * self._per_volume
        kept = numbers[: len(self) * self._ranks]
        return (offset + n for n in kept[self._rank :: self._ranks][self._taken() :])
