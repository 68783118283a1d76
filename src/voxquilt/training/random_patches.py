"""Cuts random patches of labelled volumes, each determined by the seed and its number."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer, Shaped
from monai.transforms.transform import Randomizable
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from voxquilt.geometry.frame import Triple
from voxquilt.training.volume_cache import LabelledVolume

Augment = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]

# Voxels of each class that are kept to centre patches on: enough to draw from, and little memory.
_CENTRES = 4096


class RandomPatches(Dataset[dict[str, Any]]):
    """Random patches: `{'image': (C, pi, pj, pk) float32, 'label': (L, pi, pj, pk), 'subject': its id}`.

    Patch n does not depend on when or in which process it is cut.

    Args:
        volumes: The volumes to cut patches from.
        patch_size: Voxels along i, j, k.
        per_volume: Patches of each volume per epoch; EpochOrder chooses the numbers of an epoch.
        balanced: The share of patches that are centred on a voxel of a class, drawn evenly from the classes in the
            volume, without background; the others lie anywhere.
        seed: Seed of positions and augmentation.
        augment: Changes the dictionary of a patch's 'image' and 'label', such as MONAI's Compose of dictionary
            transforms; it must keep the patch's size.
    """

    def __init__(
        self,
        volumes: Sequence[LabelledVolume],
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
            if isinstance(self._random_state, Randomizable):  # MONAI's transforms draw from a state of their own
                self._random_state.set_random_state(seed=int(random.integers(2**32)))
            augmented = self._augment(patch)
            patch = {name: torch.as_tensor(augmented[name]).as_subclass(Tensor) for name in patch}
        return {**patch, "subject": volume.subject}

    def _start(self, volume: LabelledVolume, random: np.random.Generator) -> list[int]:
        last_starts = [n - p for n, p in zip(volume.image.shape[1:], self._patch_size, strict=True)]
        if not volume.centres or random.random() >= self._balanced:
            return [int(random.integers(r + 1)) for r in last_starts]
        centres = volume.centres[int(random.integers(len(volume.centres)))]
        centre = centres[int(random.integers(len(centres)))].tolist()
        return [min(max(c - p // 2, 0), r) for c, p, r in zip(centre, self._patch_size, last_starts, strict=True)]


class LateLoader(DataLoader[dict[str, Any]]):
    """A DataLoader whose workers start at the first batch.

    Lightning creates the iterator of a resumed training before it restores the epoch, and workers that start at once
    would cut the patches of another epoch.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


def centres_of(label: Shaped[Tensor, "l i j k"]) -> list[Integer[Tensor, "_ 3"]]:
    """For each class but background, positions of at most about 4,096 of its voxels, evenly spread.

    With several channels each mask is a class. Classes without voxels are left out.
    """
    masks = [label[0] == value for value in label[0].unique() if value] if len(label) == 1 else [*(label > 0)]
    centres = []
    for mask in masks:
        flat = mask.flatten().nonzero().flatten()
        if len(flat):
            positions = torch.unravel_index(flat[:: max(1, len(flat) // _CENTRES)], mask.shape)
            centres.append(torch.stack(positions, dim=1))
    return centres
