"""Keeps the preprocessed volumes of a training in memory, as far as memory allows."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from jaxtyping import Integer, Shaped
from torch import Tensor


@dataclass(frozen=True)
class LabelledVolume:
    """A subject in model space, no axis shorter than a patch.

    Args:
        subject: Its id.
        image: (C, I, J, K), in any type.
        label: (L, I, J, K): classes with L = 1, one mask per channel, or the image to learn.
        centres: For each class but background, (n, 3) positions of a sample of its voxels.
    """

    subject: str
    image: Shaped[Tensor, "c i j k"]
    label: Shaped[Tensor, "l i j k"]
    centres: list[Integer[Tensor, "_ 3"]]

    @property
    def nbytes(self) -> int:
        """Bytes of the voxels."""
        return self.image.nbytes + self.label.nbytes


class CachedVolumes(Sequence[LabelledVolume]):
    """Labelled volumes, read when they are used; those that fit into the limit stay in memory.

    Args:
        load: Reads volume n.
        count: Number of volumes.
        limit: Bytes to keep; volumes beyond it are read again each time they are used.
        open_at_once: Number of other volumes that are in memory at a time.
    """

    def __init__(self, load: Callable[[int], LabelledVolume], count: int, limit: float, open_at_once: int) -> None:
        self._load, self._count, self._limit = load, count, limit
        self._open_at_once = open_at_once
        self._kept: dict[int, LabelledVolume] = {}
        self._recent: OrderedDict[int, LabelledVolume] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    def preload(self, threads: int) -> int:
        """Read volumes up to the limit, before worker processes share the memory; returns how many are kept."""
        size = 0
        with ThreadPoolExecutor(max(1, threads)) as pool:
            for first in range(0, self._count, max(1, threads)):
                numbers = range(first, min(first + max(1, threads), self._count))
                for n, volume in zip(numbers, pool.map(self._load, numbers), strict=True):
                    size += volume.nbytes
                    if size > self._limit:
                        return len(self._kept)
                    self._kept[n] = volume
        return len(self._kept)

    def __getitem__(self, n: int) -> LabelledVolume:  # type: ignore[override]
        if n in self._kept:
            return self._kept[n]
        if n not in self._recent:
            while len(self._recent) >= self._open_at_once:
                self._recent.popitem(last=False)
            self._recent[n] = self._load(n)
        self._recent.move_to_end(n)
        return self._recent[n]
