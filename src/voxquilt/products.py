"""What is written of a subject? Labels, probabilities, logits or an image, each computed from a slab of scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.errors import OutputError
from voxquilt.names import APPLIED

Slab = Shaped[Tensor, "c i j k"]
Made = Shaped[Tensor, "d i j k"]
Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "softmax": lambda scores: scores.float().softmax(0),
    "sigmoid": lambda scores: scores.float().sigmoid(),
    "none": lambda scores: scores.float(),
}


# A score that leaves no doubt: its soft-max or sigmoid is 1 but for 1e-13.
_CERTAIN = 30.0


@runtime_checkable
class Product(Protocol):
    """A function of scores, voxel by voxel."""

    def form(self, channels: int) -> tuple[int, np.dtype]:
        """How many channels it has and of which type, given the scores' channels."""
        ...

    def __call__(self, scores: Slab) -> Made: ...


@dataclass(frozen=True)
class ArgMax:
    """The class with the highest score, in the smallest unsigned type that holds all classes."""

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return 1, np.min_scalar_type(channels - 1)

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


@dataclass(frozen=True)
class Threshold:
    """1 where an activated score is above a threshold, for each channel by itself."""

    activation: Activation
    threshold: float

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return channels, np.dtype(np.uint8)

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
class Moments:
    """Turns patches of scores into what the spread of probabilities over patches is computed from.

    (B, C, ...) becomes (B, C + 1, ...): the C activated scores and the sum of their squares; or with `each`, where
    channels are labels of their own, (B, 2C, ...): the activated scores and their squares.
    """

    activation: Activation
    each: bool

    def __call__(self, patches: Tensor) -> Tensor:
        p = self.activation(patches.movedim(1, 0))
        # Images have values of any size, and the difference of squares cancels.
        p = p.double() if self.activation is ACTIVATIONS["none"] else p
        return torch.cat([p, p.square() if self.each else _sum_of_squares(p)]).movedim(0, 1)


@dataclass(frozen=True)
class Disagreement:
    """How much the patches that cover a voxel disagree: the blend-weighted variance of their probabilities.

    With patches n of weights u_n that sum to 1 and probabilities p_nc, it is  sum_c (sum_n u_n p_nc^2 - m_c^2)  where
    m_c = sum_n u_n p_nc: 0 where one patch covers a voxel or all give the same, 1 - 1/C at most. With `each`, every
    channel has the variance of its own. Computed from the averages of `Moments`.
    """

    each: bool

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return channels if self.each else 1, np.dtype(np.float32)

    def __call__(self, scores: Slab) -> Made:
        if self.each:
            mean, squares = scores.chunk(2)
            return (squares - mean.square()).clamp(min=0).float()
        return (scores[-1:] - _sum_of_squares(scores[:-1])).clamp(min=0).float()


def _sum_of_squares(p: Tensor) -> Tensor:
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


def as_scores(patches: Tensor) -> Tensor:
    """Patches that are averaged as they are."""
    return patches


@dataclass(frozen=True)
class Recipe:
    """How a product comes about.

    Args:
        product: What is computed voxel by voxel.
        averaged: What is made of (B, C, ...) patches before they are averaged.
        in_model: Whether it is computed in model space and then brought to native space (numbers linearly, labels by
            nearest neighbour), or from scores that were brought there.
    """

    product: Product
    averaged: Callable[[Tensor], Tensor] = as_scores
    in_model: bool = False


def make_products(
    names: Sequence[str] | None,
    channels: int,
    activation: str | None = None,
    threshold: float | None = None,
    restore: str = "scores",
) -> dict[str, Recipe]:
    """The products of a network output.

    Args:
        names: Some of 'labels', 'probabilities', 'logits', 'entropy', 'disagreement', 'image'. None gives labels for
            several channels and for one with a threshold, else the image.
        channels: Of the output.
        activation: What turns scores into probabilities: 'softmax', 'sigmoid', 'none' (they are probabilities), or
            'applied' or 'applied_sigmoid' (they were made probabilities before they were averaged). None is softmax for
            several channels and 'none' for one.
        threshold: For labels of one channel, or of several with sigmoid (each by itself; 0.5 if None).
        restore: Labels are made of 'scores' in native space, or made in model space and brought back as 'labels'.

    Raises:
        OutputError: a product that such an output does not have.
    """
    activation = activation or ("softmax" if channels > 1 else "none")
    names = names or (["labels"] if channels > 1 or threshold is not None else ["image"])
    return {name: _recipe(name, channels, activation, threshold, restore) for name in names}


def _recipe(name: str, channels: int, activation: str, threshold: float | None, restore: str) -> Recipe:
    product = _make_product(name, channels, activation, threshold)
    if isinstance(product, Disagreement):
        activate = ACTIVATIONS["none" if activation in APPLIED else activation]
        return Recipe(product, Moments(activate, product.each), in_model=True)
    return Recipe(product, in_model=name == "labels" and restore == "labels")


def _make_product(name: str, channels: int, activation: str, threshold: float | None) -> Product:
    applied = activation in APPLIED
    activate = ACTIVATIONS["none" if applied else activation]
    single, each = channels == 1, activation.endswith("sigmoid")
    if single and activation == "softmax" and name != "image":
        raise OutputError(f"{name} by soft-max of one channel would be 1 everywhere; set model.activation=sigmoid.")
    if name == "labels" and (single or each):
        if threshold is None and single:
            raise OutputError("labels of a network with one output channel need stitch.threshold, such as 0.5.")
        return Threshold(activate, 0.5 if threshold is None else threshold)
    if name == "labels" and threshold is not None:
        raise OutputError(
            f"stitch.threshold={threshold} goes with one output channel or with model.activation=sigmoid (several "
            f"labels per voxel); this output has {channels} channels and {activation}, so its labels are the arg-max."
        )
    if name == "logits" and applied:
        raise OutputError("there are no logits when model.average=probabilities; ask for probabilities.")
    if name == "entropy":
        return Entropy(activate, single or each)
    if name == "disagreement":
        return Disagreement(single or each)
    return {"labels": ArgMax(), "probabilities": Activated(activate)}.get(name, Activated(ACTIVATIONS["none"]))


def background(channels: int, activation: str | None, fill: float | Sequence[float] | None = None) -> list[float]:
    """The scores of a voxel that no predicted patch covers: certainly class 0, none of several labels, an image's 0.

    Args:
        channels: Of the output.
        activation: See `make_products`.
        fill: Values to use instead, one for all channels or one each.

    Raises:
        OutputError: fill has another length.
    """
    if fill is not None:
        values = [float(v) for v in fill] if isinstance(fill, Sequence) else [float(fill)] * channels
        if len(values) != channels:
            raise OutputError(f"stitch.fill has {len(values)} values; the output has {channels} channels.")
        return values
    activation = activation or ("softmax" if channels > 1 else "none")
    if activation == "sigmoid":
        return [-_CERTAIN] * channels
    if channels == 1 or activation == "applied_sigmoid":
        return [0.0] * channels
    return [0.0] + [-_CERTAIN] * (channels - 1) if activation == "softmax" else [1.0] + [0.0] * (channels - 1)
