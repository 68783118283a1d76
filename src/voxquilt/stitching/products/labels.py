"""Provides the products that hold labels: the arg-max of scores, and thresholds of activated scores."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.errors import ConfigError, OutputError
from voxquilt.stitching.products.base import NOT_FINITE, Activation, Product, Scores, Voxels
from voxquilt.stitching.products.spec import NetworkOutput, ProductSpec
from voxquilt.vocabulary import LABELS

# Expected size of packed labels, as a share of their voxels; see docs/memory.md.
_PACKED = 0.04


def make_labels(output: NetworkOutput) -> ProductSpec:
    """The arg-max over classes; thresholds for one channel, or where channels are labels of their own.

    Raises:
        ConfigError: another number of label values than there are classes, or some for several labels per voxel.
        OutputError: a threshold is missing, or is given although labels are the arg-max.
    """
    output = replace(output, temperature=1.0)  # which class is best does not depend on it
    values, threshold = output.label_values, output.threshold
    dtype = None if values is None else _type_of_labels(values, output)
    output.check_distribution("labels")
    in_model = output.restore == "labels"
    spec = partial(ProductSpec, in_model=in_model, packed=_PACKED, interpolated=output.interpolated)
    if output.regions is not None:
        return spec(_regions(output, output.regions))
    if output.channels == 1 or output.is_multilabel:
        if threshold is None and output.channels == 1:
            raise OutputError("labels of a network with one output channel need stitch.threshold, such as 0.5.")
        product = Threshold(output.activate_restored, 0.5 if threshold is None else threshold, dtype)
        return spec(product)
    if threshold is not None:
        raise OutputError(
            f"stitch.threshold={threshold} goes with one output channel or with model.activation=sigmoid (several "
            f"labels per voxel); this output has {output.channels} channels and {output.activation}, so its labels are "
            f"the arg-max."
        )
    return spec(ArgMax(dtype))


def _regions(output: NetworkOutput, values: Sequence[int]) -> "Regions":
    if len(values) != output.channels:
        raise ConfigError(
            f"stitch.regions has {len(values)} numbers; the network's output has {output.channels} channels."
        )
    if output.channels > 1 and not output.is_multilabel:
        raise ConfigError(
            f"stitch.regions goes with channels that are labels of their own (model.activation=sigmoid); this output "
            f"has {output.channels} channels and {output.activation}."
        )
    return Regions(output.activate_restored, 0.5 if output.threshold is None else output.threshold, tuple(values))


def _type_of_labels(label_values: Sequence[int], output: NetworkOutput) -> np.dtype:
    """The smallest unsigned type that holds the classes' numbers, of which there must be one per class."""
    if output.channels > 1 and output.is_multilabel:
        raise ConfigError("stitch.label_values goes with one label per voxel; with sigmoid each channel is a mask.")
    classes = max(output.channels, 2)
    if len(label_values) != classes:
        raise ConfigError(
            f"stitch.label_values has {len(label_values)} numbers; the network's output has {classes} classes."
        )
    return np.min_scalar_type(max(label_values))


def classes_of(product: Product, channels: int) -> int:
    """The number of classes of which a product makes labels; 0 for a mask per channel, and where it is not known.

    Args:
        product: The product.
        channels: Channels of the network's output.
    """
    if isinstance(product, Threshold):
        return 2 if channels == 1 else 0
    return channels if isinstance(product, (ArgMax, Regions)) else 0


@dataclass(frozen=True)
class ArgMax:
    """Gives the class with the highest score.

    Args:
        dtype: Type of the volume; None is the smallest unsigned type that holds all classes.
    """

    dtype: np.dtype | None = None
    kind = LABELS

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return 1, self.dtype or np.min_scalar_type(channels - 1)

    def __call__(self, scores: Scores) -> Voxels:
        if len(scores) == 2:
            return (scores[1] > scores[0])[None]
        # Measured on a CPU: `max` over the leading axis is 5 to 10 times faster than `argmax`, and this is 2 to 3 times
        # faster than `max`. Classes with the best score count down from the number of classes, so that the first of
        # several has the greatest count.
        classes = len(scores)
        if classes > torch.iinfo(torch.int16).max:
            return scores.max(0).indices[None]
        small = torch.uint8 if classes <= 255 else torch.int16
        down = torch.arange(classes, 0, -1, device=scores.device).to(small)
        # A truth value has the bytes of a uint8 1 or 0, and need not be converted.
        best = (scores == scores.amax(0)).view(torch.uint8).to(small).mul_(down[:, None, None, None])
        return classes - best.amax(0)[None]


def contenders(scores: Scores) -> Shaped[Tensor, " n"]:
    """The channels that may have the highest score somewhere between these voxels.

    A linearly interpolated score lies between the lowest and the highest of the voxels around it. So a channel whose
    highest score is below another's lowest cannot be the label, and need not be interpolated.

    Raises:
        OutputError: scores that are NaN or infinite.
    """
    least, greatest = scores.flatten(1).aminmax(dim=1)
    if not (least.isfinite() & greatest.isfinite()).all():
        raise OutputError(NOT_FINITE)
    # Interpolation rounds, so that a channel that is lower only by rounding errors may be the highest.
    rounding = 1e-6 * torch.maximum(least.abs(), greatest.abs()).amax()
    return (greatest >= least.amax() - rounding).nonzero().flatten()


@dataclass(frozen=True)
class Regions:
    """Gives one label per voxel of regions that overlap: each channel in turn writes its number where it is present.

    This is how nnU-Net makes labels of region-based training (`convert_probabilities_to_segmentation`).

    Args:
        activation: Function of the scores.
        threshold: A region is present where its activated score is above it.
        values: The number of each channel.
    """

    activation: Activation
    threshold: float
    values: tuple[int, ...]
    kind = LABELS

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return 1, np.min_scalar_type(max(self.values))

    def __call__(self, scores: Scores) -> Voxels:
        present = self.activation(scores) > self.threshold
        labels = torch.zeros(scores.shape[1:], dtype=torch.int32, device=scores.device)
        for mask, value in zip(present, self.values, strict=True):
            labels.masked_fill_(mask, value)
        return labels[None]


@dataclass(frozen=True)
class Threshold:
    """Gives 1 where an activated score is above a threshold, for each channel separately.

    Args:
        activation: Function of the scores.
        threshold: Activated scores above it give 1.
        dtype: Type of the volume; None is uint8.
    """

    activation: Activation
    threshold: float
    dtype: np.dtype | None = None
    kind = LABELS

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return channels, self.dtype or np.dtype(np.uint8)

    def __call__(self, scores: Scores) -> Voxels:
        return self.activation(scores) > self.threshold
