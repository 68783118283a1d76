"""Which patches does a network train on? Random ones of labelled volumes, each told by the seed and its number."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer, Shaped
from monai.transforms.transform import Randomizable
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from voxquilt.geometry.frame import Triple
from voxquilt.training.volume_cache import Labelled

Augment = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]

# Of each class, so many voxels are remembered to centre patches on: enough to draw from, and small.
_REMEMBERED = 4096


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
