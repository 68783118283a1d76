"""What is written of a subject? Labels, probabilities, logits or an image, each computed from a slab of scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.errors import OutputError
from voxquilt.geometry import Triple
from voxquilt.names import APPLIED
from voxquilt.space import Where

Slab = Shaped[Tensor, "c i j k"]
Made = Shaped[Tensor, "d i j k"]
Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "softmax": lambda scores: scores.float().softmax(0),
    "sigmoid": lambda scores: scores.float().sigmoid(),
    "none": lambda scores: scores.float(),
}


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
        # Measured on a CPU: `max` over the leading axis is 5 to 10 times faster than `argmax`.
        best = scores[1] > scores[0] if len(scores) == 2 else scores.max(0).indices
        return best[None]


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


def make_products(
    names: Sequence[str] | None, channels: int, activation: str | None = None, threshold: float | None = None
) -> dict[str, Product]:
    """The products of a network output.

    Args:
        names: Some of 'labels', 'probabilities', 'logits', 'entropy', 'image'. None gives labels for several channels
            and for one with a threshold, else the image.
        channels: Of the output.
        activation: What turns scores into probabilities: 'softmax', 'sigmoid', 'none' (they are probabilities), or
            'applied' or 'applied_sigmoid' (they were made probabilities before they were averaged). None is softmax for
            several channels and 'none' for one.
        threshold: For labels of one channel, or of several with sigmoid (each by itself; 0.5 if None).

    Raises:
        OutputError: a product that such an output does not have.
    """
    activation = activation or ("softmax" if channels > 1 else "none")
    names = names or (["labels"] if channels > 1 or threshold is not None else ["image"])
    return {name: _make_product(name, channels, activation, threshold) for name in names}


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
    return {"labels": ArgMax(), "probabilities": Activated(activate)}.get(name, Activated(ACTIVATIONS["none"]))


class Volumes:
    """Products in native space while scores come slab by slab; scores at native resolution never exist as a whole.

    Args:
        products: By name.
        channels: Of the scores.
        shape: Native voxels along i, j, k.
    """

    def __init__(self, products: Mapping[str, Product], channels: int, shape: Triple) -> None:
        self._products = products
        i, j, k = shape
        self.arrays: dict[str, np.ndarray] = {}
        """For each product (C, I, J, K), laid out in memory as NIfTI wants it."""
        for name, product in products.items():
            made, dtype = product.form(channels)
            self.arrays[name] = np.empty((made, k, j, i), dtype).transpose(0, 3, 2, 1)

    def fill(self, where: Where, slab: Slab) -> None:
        """Compute every product of the native voxels `where`.

        Raises:
            OutputError: scores that are NaN or infinite.
        """
        # The sum is finite if all are, and cheap; if it is not, look closer, since sums can overflow.
        if not slab.sum(dtype=torch.float32).isfinite() and not slab.isfinite().all():
            raise OutputError("the network's output is NaN or infinite in places; nothing was written.")
        for name, product in self._products.items():
            self.arrays[name][:, *where] = product(slab).numpy(force=True)
