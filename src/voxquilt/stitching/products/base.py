"""Defines products: functions of scores, computed voxel by voxel."""

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


@dataclass(frozen=True)
class Tempered:
    """An activation of scores that are divided by a temperature first, so that probabilities are as likely as they say.

    Temperature scaling of Guo et al. (On calibration of modern neural networks, 2017). The best class stays the best.

    Args:
        activation: Function of (C, I, J, K) scores.
        temperature: Above 1 makes probabilities less certain, below 1 more.
    """

    activation: Activation
    temperature: float

    def __call__(self, scores: Tensor) -> Tensor:
        return self.activation(scores.float() / self.temperature)


NOT_FINITE = "the network's output is NaN or infinite in places; nothing was written."


@runtime_checkable
class Product(Protocol):
    """A function of scores, voxel by voxel: it is called on boxes of any size, on which its result must not depend."""

    @property
    def kind(self) -> str:
        """The kind of its voxels: 'labels' (integers with names and colours), 'map' (a number per class or voxel, such
        as a probability) or 'image' (intensities)."""
        ...

    def form(self, channels: int) -> tuple[int, np.dtype]:
        """Its number of channels and its type, given the scores' channels."""
        ...

    def __call__(self, scores: Scores) -> Voxels: ...


def check_finite(scores: Scores) -> None:
    """Raises OutputError for scores that are NaN or infinite."""
    # The sum is finite only if all scores are, and cheap while they are in the cache; but it can overflow.
    if not scores.sum(dtype=torch.float32).isfinite() and not scores.isfinite().all():
        raise OutputError(NOT_FINITE)


def compute(product: Product, scores: Scores, channels: int) -> Voxels:
    """A product of scores, whose shape is checked, since another shape could be stored without an error.

    Args:
        product: The product.
        scores: Averages that it is computed from.
        channels: Channels of the network's output.

    Raises:
        OutputError: the product is not a tensor of the shape that `form` promises.
    """
    voxels = product(scores)
    wanted = product.form(channels)[0], *scores.shape[1:]
    if not isinstance(voxels, Tensor) or tuple(voxels.shape) != wanted:
        given = tuple(voxels.shape) if isinstance(voxels, Tensor) else type(voxels).__name__
        raise OutputError(
            f"the product {type(product).__name__} gave {given} for scores of shape {tuple(scores.shape)}; wanted is a "
            f"tensor of shape {wanted}."
        )
    return voxels


@dataclass(frozen=True)
class Activated:
    """Gives activated scores as float32: probabilities; or, with the activation 'none', logits and images.

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
