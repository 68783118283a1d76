"""Which patches does a network train on? Random ones of labelled volumes, each told by the seed and its number."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer, Shaped
from monai.transforms.transform import Randomizable
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from voxquilt.geometry.frame import Triple

Augment = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]

# Of each class, so many voxels are remembered to centre patches on: enough to draw from, and small.
_REMEMBERED = 4096


@dataclass(frozen=True)
class Labelled:
    """A subject in model space, no axis shorter than a patch.

    Args:
        subject: Its id.
        image: (C, I, J, K), in any type.
        label: (L, I, J, K): classes with L = 1, or a mask a channel, or the image that is wanted.
        centres: For each class but background, (n, 3) positions of some of its voxels.
    """

    subject: str
    image: Shaped[Tensor, "c i j k"]
    label: Shaped[Tensor, "l i j k"]
    centres: list[Integer[Tensor, "_ 3"]]

    @property
    def nbytes(self) -> int:
        """Memory of the voxels."""
        return self.image.nbytes + self.label.nbytes


class CachedVolumes(Sequence[Labelled]):
    """Labelled volumes, read when they are asked for; those that fit are kept.

    Args:
        load: Reads volume n.
        count: How many there are.
        limit: Bytes to keep; beyond, volumes are read again each time their turn comes.
        open_at_once: So many of those that are not kept are in memory at a time.
    """

    def __init__(self, load: Callable[[int], Labelled], count: int, limit: float, open_at_once: int) -> None:
        self._load, self._count, self._limit = load, count, limit
        self._open_at_once = open_at_once
        self._kept: dict[int, Labelled] = {}
        self._recent: OrderedDict[int, Labelled] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    def preload(self, threads: int) -> int:
        """Read volumes until the limit, before worker processes share the memory; how many are kept."""
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

    def __getitem__(self, n: int) -> Labelled:  # type: ignore[override]
        if n in self._kept:
            return self._kept[n]
        if n not in self._recent:
            while len(self._recent) >= self._open_at_once:
                self._recent.popitem(last=False)
            self._recent[n] = self._load(n)
        self._recent.move_to_end(n)
        return self._recent[n]


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


class RandomPatches(Dataset[dict[str, Any]]):
    """Random patches: `{'image': (C, pi, pj, pk) float32, 'label': (L, pi, pj, pk), 'subject': its id}`.

    Patch n is the same whenever and in whichever process it is made.

    Args:
        volumes: Where they are cut from.
        patch_size: Voxels.
        per_volume: Patches of each volume an epoch; EpochOrder says which numbers belong to an epoch.
        balanced: The share of patches that are centred on a voxel of a class, drawn evenly from those that the volume
            has, without background; others lie anywhere.
        seed: Of places and augmentation.
        augment: Of a patch's image and label, such as MONAI's Compose of dictionary transforms with these two keys; it
            must keep the patch's size.
    """

    def __init__(
        self,
        volumes: Sequence[Labelled],
        patch_size: Triple,
        per_volume: int,
        *,
        balanced: float = 0.5,
        seed: int = 0,
        augment: Augment | None = None,
    ) -> None:
        self._volumes = volumes
        self._patch_size = patch_size
        self._per_volume = per_volume
        self._balanced = balanced
        self._seed = seed
        self._augment = augment
        self._random_state: object = augment

    def __len__(self) -> int:
        return len(self._volumes) * self._per_volume

    def __getitem__(self, number: int) -> dict[str, Any]:
        random = np.random.default_rng([self._seed, number])
        volume = self._volumes[number % len(self) // self._per_volume]
        start = self._start(volume, random)
        where = (slice(None), *(slice(s, s + p) for s, p in zip(start, self._patch_size, strict=True)))
        patch = {"image": volume.image[where].float(), "label": volume.label[where].clone()}
        if self._augment is not None:
            if isinstance(self._random_state, Randomizable):  # MONAI's, whose random numbers are their own
                self._random_state.set_random_state(seed=int(random.integers(2**32)))
            made = self._augment(patch)
            patch = {name: torch.as_tensor(made[name]).as_subclass(Tensor) for name in patch}
        return {**patch, "subject": volume.subject}

    def _start(self, volume: Labelled, random: np.random.Generator) -> list[int]:
        room = [n - p for n, p in zip(volume.image.shape[1:], self._patch_size, strict=True)]
        if not volume.centres or random.random() >= self._balanced:
            return [int(random.integers(r + 1)) for r in room]
        centres = volume.centres[int(random.integers(len(volume.centres)))]
        centre = centres[int(random.integers(len(centres)))].tolist()
        return [min(max(c - p // 2, 0), r) for c, p, r in zip(centre, self._patch_size, room, strict=True)]


class LateLoader(DataLoader[dict[str, Any]]):
    """A DataLoader that begins when the first batch is asked for.

    Lightning makes the iterator of a training that goes on before it says how far that was, and workers would begin
    with another epoch.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


def centres_of(label: Shaped[Tensor, "l i j k"]) -> list[Integer[Tensor, "_ 3"]]:
    """For each class but background that is present, positions of at most about 4,096 of its voxels, evenly spread.

    With several channels a class is a channel's mask.
    """
    masks = [label[0] == value for value in label[0].unique() if value] if len(label) == 1 else [*(label > 0)]
    found = []
    for mask in masks:
        flat = mask.flatten().nonzero().flatten()
        if len(flat):
            positions = torch.unravel_index(flat[:: max(1, len(flat) // _REMEMBERED)], mask.shape)
            found.append(torch.stack(positions, dim=1))
    return found
