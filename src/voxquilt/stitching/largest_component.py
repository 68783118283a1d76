"""Keeps the largest component of labels, as nnU-Net's post-processing does."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor


@dataclass(frozen=True)
class KeepLargest:
    """Keeps the largest connected component of some labels, and turns their other voxels into background.

    Voxels that share a corner are connected. Components of the same, largest size are all kept. After nnU-Net 2.8.1,
    postprocessing/remove_connected_components.py.

    >>> labels = torch.tensor([1, 1, 0, 2, 0, 1]).view(1, 1, 1, 6)
    >>> KeepLargest([[1]])(labels).flatten().tolist(), KeepLargest([[1, 2], [1]])(labels).flatten().tolist()
    ([1, 1, 0, 2, 0, 0], [1, 1, 0, 0, 0, 0])

    Args:
        unions: Labels whose voxels count together, one union after the other.
        background: The label that removed voxels get.
    """

    unions: Sequence[Sequence[int]]
    background: int = 0

    def __call__(self, labels: Integer[Tensor, "1 i j k"]) -> Integer[Tensor, "1 i j k"]:
        """A copy of labels without the smaller components."""
        array = labels[0].cpu().numpy().copy()
        for union in self.unions:
            mask = np.isin(array, list(union))
            array[mask & ~_largest(mask)] = self.background
        return torch.from_numpy(array)[None].to(labels.device)


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest components of a mask, all where several have that size."""
    from scipy import ndimage  # takes long to import, and only some runs need it

    components = np.empty(mask.shape, dtype=np.int32)
    ndimage.label(mask, structure=np.ones((3, 3, 3)), output=components)
    sizes = np.bincount(components.reshape(-1))
    sizes[0] = 0
    return ((sizes == sizes.max()) & (sizes > 0))[components]
