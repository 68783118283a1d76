"""What every product is: a function of scores, computed voxel by voxel."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.errors import OutputError
from voxquilt.vocabulary import MAP

Scores = Shaped[Tensor, "c i j k"]
Voxels = Shaped[Tensor, "d i j k"]
Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "softmax": lambda scores: scores.float().softmax(0),
    "sigmoid": lambda scores: scores.float().sigmoid(),
    "none": lambda scores: scores.float(),
}
"""Functions of (C, I, J, K) scores by their name."""

NOT_FINITE = "the network's output is NaN or infinite in places; nothing was written."


@runtime_checkable
class Product(Protocol):
    """A function of scores, voxel by voxel: it sees any box of voxels, and gives the same for each voxel."""

    @property
    def kind(self) -> str:
        """What its voxels are: 'labels' (integers with names and colours), 'map' (a number per class or voxel, such as
        a probability) or 'image' (intensities)."""
        ...

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
class Activated:
    """Activated scores as float32: probabilities; or, with the activation 'none', logits and images.

    Args:
        activation: Function of the scores.
        kind: 'map' or 'image'.
    """

    activation: Activation
    kind: str = MAP

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return channels, np.dtype(np.float32)

    def __call__(self, scores: Scores) -> Voxels:
        return self.activation(scores)
