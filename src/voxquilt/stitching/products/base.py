"""What is written of a subject? Labels, probabilities, logits or an image, each computed from a slab of scores."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.errors import OutputError

Scores = Shaped[Tensor, "c i j k"]
Voxels = Shaped[Tensor, "d i j k"]
Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "softmax": lambda scores: scores.float().softmax(0),
    "sigmoid": lambda scores: scores.float().sigmoid(),
    "none": lambda scores: scores.float(),
}


NOT_FINITE = "the network's output is NaN or infinite in places; nothing was written."


@runtime_checkable
class Product(Protocol):
    """A function of scores, voxel by voxel."""

    def form(self, channels: int) -> tuple[int, np.dtype]:
        """How many channels it has and of which type, given the scores' channels."""
        ...

    def __call__(self, scores: Scores) -> Voxels: ...


def check_finite(scores: Scores) -> None:
    """Raises OutputError for scores that are NaN or infinite."""
    # The sum is finite if all are, and cheap while they are in the cache; if it is not, look closer: sums can overflow.
    if not scores.sum(dtype=torch.float32).isfinite() and not scores.isfinite().all():
        raise OutputError(NOT_FINITE)


@dataclass(frozen=True)
class Kept:
    """A product that was computed in model space and is now stored as it comes."""

    product: Product

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return self.product.form(channels)

    def __call__(self, scores: Scores) -> Voxels:
        return scores
