"""How do the products that a user names come about? What patches are averaged as, and what is then computed where."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from voxquilt.errors import ConfigError, OutputError
from voxquilt.stitching.products.base import ACTIVATIONS, Activation, Product
from voxquilt.stitching.products.disagreement import Disagreement, sum_of_squares
from voxquilt.stitching.products.entropy import Entropy
from voxquilt.stitching.products.labels import ArgMax, Threshold
from voxquilt.stitching.products.maps import Activated
from voxquilt.vocabulary import APPLIED

# A score that leaves no doubt: its soft-max or sigmoid is 1 but for 1e-13.
_CERTAIN = 30.0


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
        return torch.cat([p, p.square() if self.each else sum_of_squares(p)]).movedim(0, 1)


def as_scores(patches: Tensor) -> Tensor:
    """Patches that are averaged as they are."""
    return patches


@dataclass(frozen=True)
class ProductSpec:
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
    label_values: Sequence[int] | None = None,
) -> dict[str, ProductSpec]:
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
        label_values: The numbers that classes will have, which decide the labels' type; labels are classes here.

    Raises:
        ConfigError: another number of label values than there are classes, or some for several labels per voxel.
        OutputError: a product that such an output does not have.
    """
    activation = activation or ("softmax" if channels > 1 else "none")
    names = names or (["labels"] if channels > 1 or threshold is not None else ["image"])
    # Of several outputs, those without labels may have any number of classes.
    numbered = label_values if "labels" in names else None
    dtype = None if numbered is None else _type_of_labels(numbered, channels, activation)
    return {name: _recipe(name, channels, activation, threshold, restore, dtype) for name in names}


def _type_of_labels(label_values: Sequence[int], channels: int, activation: str) -> np.dtype:
    """The smallest that holds the classes' numbers, once there is one for each class."""
    if channels > 1 and activation.endswith("sigmoid"):
        raise ConfigError("stitch.label_values goes with one label per voxel; with sigmoid each channel is a mask.")
    if len(label_values) != max(channels, 2):
        raise ConfigError(
            f"stitch.label_values has {len(label_values)} numbers; the network's output has {max(channels, 2)} classes."
        )
    return np.min_scalar_type(max(label_values))


def _recipe(
    name: str, channels: int, activation: str, threshold: float | None, restore: str, dtype: np.dtype | None
) -> ProductSpec:
    product = _make_product(name, channels, activation, threshold, dtype)
    if isinstance(product, Disagreement):
        activate = ACTIVATIONS["none" if activation in APPLIED else activation]
        return ProductSpec(product, Moments(activate, product.each), in_model=True)
    return ProductSpec(product, in_model=name == "labels" and restore == "labels")


def _make_product(
    name: str, channels: int, activation: str, threshold: float | None, dtype: np.dtype | None
) -> Product:
    applied = activation in APPLIED
    activate = ACTIVATIONS["none" if applied else activation]
    single, each = channels == 1, activation.endswith("sigmoid")
    if single and activation == "softmax" and name != "image":
        raise OutputError(f"{name} by soft-max of one channel would be 1 everywhere; set model.activation=sigmoid.")
    if name == "labels" and (single or each):
        if threshold is None and single:
            raise OutputError("labels of a network with one output channel need stitch.threshold, such as 0.5.")
        return Threshold(activate, 0.5 if threshold is None else threshold, dtype)
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
    return {"labels": ArgMax(dtype), "probabilities": Activated(activate)}.get(name, Activated(ACTIVATIONS["none"]))


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
