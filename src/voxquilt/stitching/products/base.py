"""What is written of a subject? Labels, probabilities, logits or an image, each computed from a slab of scores."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.errors import OutputError

Slab = Shaped[Tensor, "c i j k"]
Made = Shaped[Tensor, "d i j k"]
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

    def __call__(self, scores: Slab) -> Made: ...


@dataclass(frozen=True)
class ArgMax:
    """The class with the highest score.

    Args:
        dtype: Of the volume; None is the smallest unsigned type that holds all classes.
    """

    dtype: np.dtype | None = None

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return 1, self.dtype or np.min_scalar_type(channels - 1)

    def __call__(self, scores: Slab) -> Made:
        if len(scores) == 2:
            return (scores[1] > scores[0])[None]
        # Measured on a CPU: `max` over the leading axis is 5 to 10 times faster than `argmax`, and this 2 to 3 times
        # faster again. Where a score is the best it counts down from the number of classes, so that the first of
        # several is the greatest.
        classes = len(scores)
        if classes > torch.iinfo(torch.int16).max:
            return scores.max(0).indices[None]
        small = torch.uint8 if classes <= 255 else torch.int16
        down = torch.arange(classes, 0, -1, device=scores.device).to(small)
        best = (scores == scores.amax(0)).to(small).mul_(down[:, None, None, None])
        return classes - best.amax(0)[None]


def contenders(scores: Slab) -> Shaped[Tensor, " n"]:
    """The channels of which each may be the greatest somewhere between these voxels; all others never are.

    A linearly interpolated score lies between the least and the greatest of the voxels around. So a channel whose
    greatest is less than another's least need not be interpolated to know that it is not the label.

    Raises:
        OutputError: scores that are NaN or infinite.
    """
    least, greatest = scores.amin((1, 2, 3)), scores.amax((1, 2, 3))
    if not (least.isfinite() & greatest.isfinite()).all():
        raise OutputError(NOT_FINITE)
    # Interpolating rounds: what is equal but for that may win.
    rounding = 1e-6 * torch.maximum(least.abs(), greatest.abs()).amax()
    return (greatest >= least.amax() - rounding).nonzero().flatten()


def check_finite(scores: Slab) -> None:
    """Raises OutputError for scores that are NaN or infinite."""
    # The sum is finite if all are, and cheap while they are in the cache; if it is not, look closer: sums can overflow.
    if not scores.sum(dtype=torch.float32).isfinite() and not scores.isfinite().all():
        raise OutputError(NOT_FINITE)


@dataclass(frozen=True)
class Threshold:
    """1 where an activated score is above a threshold, for each channel by itself.

    Args:
        activation: Of the scores.
        threshold: Of what it gives.
        dtype: Of the volume; None is uint8.
    """

    activation: Activation
    threshold: float
    dtype: np.dtype | None = None

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return channels, self.dtype or np.dtype(np.uint8)

    def __call__(self, scores: Slab) -> Made:
        return self.activation(scores) > self.threshold


@dataclass(frozen=True)
class Activated:
    """Activated scores as float32: probabilities; or, activated by nothing, logits and images."""

    activation: Activation

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return channels, np.dtype(np.float32)

    def __call__(self, scores: Slab) -> Made:
        return self.activation(scores)


@dataclass(frozen=True)
class Entropy:
    """Shannon's entropy of the predicted distribution in nats: 0 where the network is certain, ln(classes) at most.

    With `each`, channels are labels of their own, and each has the entropy of its yes or no, ln(2) at most.
    """

    activation: Activation
    each: bool

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return channels if self.each else 1, np.dtype(np.float32)

    def __call__(self, scores: Slab) -> Made:
        p = self.activation(scores).clamp(0, 1)  # rounding may lead beyond, where there is no logarithm
        return torch.special.entr(p) + torch.special.entr(1 - p) if self.each else torch.special.entr(p).sum(0)[None]


@dataclass(frozen=True)
class Disagreement:
    """How much the patches that cover a voxel disagree: the blend-weighted variance of their probabilities.

    With patches n of weights u_n that sum to 1 and probabilities p_nc, it is  sum_c (sum_n u_n p_nc^2 - m_c^2)  where
    m_c = sum_n u_n p_nc: 0 where one patch covers a voxel or all give the same, 1 - 1/C at most. With `each`, every
    channel has the variance of its own. Computed from the averages of
    `voxquilt.stitching.products.spec.Moments`.
    """

    each: bool

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return channels if self.each else 1, np.dtype(np.float32)

    def __call__(self, scores: Slab) -> Made:
        if self.each:
            mean, squares = scores.chunk(2)
            return (squares - mean.square()).clamp(min=0).float()
        return (scores[-1:] - sum_of_squares(scores[:-1])).clamp(min=0).float()


def sum_of_squares(p: Tensor) -> Tensor:
    """Over the first axis, which is kept with length 1."""
    # One after the other, so that equal values give equal sums whatever their layout in memory: `sum` changes its
    # order, and a voxel that one patch covers would not get exactly 0.
    total = p[:1].square()
    for channel in p[1:]:
        total += channel.square()
    return total


@dataclass(frozen=True)
class Kept:
    """A product that was computed in model space and is now stored as it comes."""

    product: Product

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return self.product.form(channels)

    def __call__(self, scores: Slab) -> Made:
        return scores
