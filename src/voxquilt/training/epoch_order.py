"""The order of random patches in an epoch, which each process computes for itself."""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler


class EpochOrder(Sampler[int]):
    """The numbers of an epoch's patches, in an order drawn anew for each, without repetition.

    Volumes come in groups, and the patches of a group mixed, so that only a group has to be in memory. Every process
    takes each `ranks`-th number, so together they see what one process with batches `ranks` times as large would see.

    Args:
        volumes: How many there are.
        per_volume: Patches of each.
        group: Volumes whose patches are mixed.
        seed: Of the order.
        rank, ranks: This process, and how many there are.
        taken: How many of an epoch's numbers this process has had already when the epoch is begun: in the middle of
            it, by a training that goes on. They are left out.
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
        """Lightning says which epoch comes next, also when it goes on from a checkpoint."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._volumes * self._per_volume // self._ranks

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self._seed, self._epoch])
        volumes = random.permutation(self._volumes)
        numbers: list[int] = []
        for first in range(0, self._volumes, self._group):
            some = volumes[first : first + self._group]
            mixed = (some[:, None] * self._per_volume + np.arange(self._per_volume)).ravel()
            numbers.extend(random.permutation(mixed).tolist())
        offset = self._epoch * self._volumes * self._per_volume
        kept = numbers[: len(self) * self._ranks]
        return (offset + n for n in kept[self._rank :: self._ranks][self._taken() :])
