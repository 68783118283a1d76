"""Specifies products of a network's output: what is averaged, what is computed from it, and in which space."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from voxquilt.errors import ConfigError, OutputError
from voxquilt.stitching.products.base import ACTIVATIONS, Activation, Product, Tempered
from voxquilt.stitching.products.encoded import Encoded
from voxquilt.stitching.products.registry import PRODUCTS
from voxquilt.vocabulary import APPLIED, IMAGE, LABELS, MAP, check_name

# A score whose soft-max or sigmoid differs from 1 by less than 1e-13.
_CERTAIN = 30.0
# Expected size of packed volumes of numbers, as a share of their voxels; see docs/memory.md.
_PACKED = 0.9
# By how much less of it is left where numbers are rounded.
_PACKED_AS = {"float16": 0.5, "uint8": 0.33}


@dataclass(frozen=True)
class NetworkOutput:
    """Describes a network's output to the products that are computed from it.

    Args:
        channels: Channels of the output.
        activation: What turns scores into probabilities: 'softmax', 'sigmoid', 'none' (they are probabilities), or
            'applied' or 'applied_sigmoid' (they were turned into probabilities before they were averaged).
        threshold: Threshold for labels of one channel, or of several with sigmoid (each separately; 0.5 if None).
        restore: 'scores' makes labels of scores in native space; 'probabilities' of scores that were activated before
            they were resampled; 'labels' makes them in model space and resamples them.
        label_values: The numbers that classes will have in files, which determine the labels' type; products give
            classes.
        regions: The number that each channel writes into the labels, in turn, where channels are regions that overlap.
        temperature: What scores are divided by before they are turned into probabilities; labels know nothing of it.
    """

    channels: int
    activation: str
    threshold: float | None = None
    restore: str = "scores"
    label_values: Sequence[int] | None = None
    regions: Sequence[int] | None = None
    temperature: float = 1.0

    @property
    def is_applied(self) -> bool:
        """Whether scores were turned into probabilities before they were averaged."""
        return self.activation in APPLIED

    @property
    def is_multilabel(self) -> bool:
        """Whether channels are labels of their own, of which a voxel can have several."""
        return self.activation.endswith("sigmoid")

    @property
    def activate(self) -> Activation:
        """Turns averaged scores (C, I, J, K) into probabilities."""
        activation = ACTIVATIONS["none" if self.is_applied else self.activation]
        return activation if self.temperature == 1 else Tempered(activation, self.temperature)

    @property
    def interpolated(self) -> Activation | None:
        """What turns averaged scores into the values that are resampled, where these are not the scores themselves."""
        return self.activate if self.restore == "probabilities" else None

    @property
    def activate_restored(self) -> Activation:
        """Turns the values that were resampled into probabilities."""
        return self.activate if self.interpolated is None else ACTIVATIONS["none"]

    def check_distribution(self, product: str) -> None:
        """Raises OutputError where probabilities would be 1 everywhere."""
        if self.channels == 1 and self.activation == "softmax":
            raise OutputError(
                f"{product} by soft-max of one channel would be 1 everywhere; set model.activation=sigmoid."
            )


@dataclass(frozen=True)
class ProductSpec:
    """Specifies how a product is computed.

    Args:
        product: The function of scores.
        averaged: Turns (B, C, ...) patches into the values that are averaged; None if patches are averaged as they are.
        in_model: Whether the product is computed in model space and then resampled to native space (numbers linearly,
            labels by nearest neighbour), or computed from scores that were resampled.
        interpolated: Turns averaged scores into the values that are resampled and that the product is computed from;
            None if these are the scores.
        packed: Its expected size as .nii.gz, as a share of its voxels.
        most: The largest number of a map whose smallest is 0; None if that is not known, so that its volume cannot have
            a small type.
    """

    product: Product
    averaged: Callable[[Tensor], Tensor] | None = None
    in_model: bool = False
    packed: float = _PACKED
    interpolated: Activation | None = None
    most: float | None = None


def make_products(
    wanted: Sequence[str | Product] | None,
    channels: int,
    activation: str | None = None,
    threshold: float | None = None,
    restore: str = "scores",
    label_values: Sequence[int] | None = None,
    regions: Sequence[int] | None = None,
    *,
    dtype: str = "float32",
    temperature: float = 1.0,
) -> dict[str, ProductSpec]:
    """The products of a network output, by name.

    Args:
        wanted: Names of registered products, or Products of the user's own, which have a `name`. None gives labels for
            several channels and for one with a threshold or regions, else the image.
        channels: Channels of the output.
        activation: See NetworkOutput. None is softmax for several channels and 'none' for one.
        threshold, restore, label_values, regions, temperature: See NetworkOutput.
        dtype: Type of maps with a known range; see `voxquilt.stitching.products.encoded.Encoded`.

    Raises:
        ConfigError: another number of label values than there are classes, or some for several labels per voxel.
        OutputError: a product that cannot be made of such an output.
    """
    activation = activation or default_activation(channels)
    check_temperature(temperature, activation)
    output = NetworkOutput(channels, activation, threshold, restore, label_values, regions, temperature)
    default = "labels" if channels > 1 or threshold is not None or regions is not None else "image"
    specs = [(_name(product), _spec(product, output)) for product in wanted or [default]]
    return {name: _encoded(spec, np.dtype(dtype), activation) for name, spec in specs}


def check_temperature(temperature: float, activation: str | None) -> None:
    """Raises ConfigError where there are no scores that a temperature could divide."""
    if temperature != 1 and activation in (*APPLIED, "none"):
        raise ConfigError(
            "stitch.temperature divides scores before the soft-max or sigmoid: it goes neither with "
            "model.average=probabilities, which averages what comes behind these, nor with model.activation=none."
        )


def default_activation(channels: int) -> str:
    """'softmax' for several channels, 'none' for one."""
    return "softmax" if channels > 1 else "none"


def _name(product: str | Product) -> str:
    return product if isinstance(product, str) else product.name  # type: ignore[attr-defined]


def _spec(product: str | Product, output: NetworkOutput) -> ProductSpec:
    spec = PRODUCTS.load(product)(output) if isinstance(product, str) else product
    spec = spec if isinstance(spec, ProductSpec) else ProductSpec(spec)
    check_name(spec.product.kind, (LABELS, MAP, IMAGE), f"the kind of the product {_name(product)!r}")
    dtype = np.dtype(spec.product.form(output.channels)[1])
    if spec.product.kind == LABELS and dtype.kind != "u":
        raise OutputError(f"the product {_name(product)!r} holds labels, which have an unsigned type; it has {dtype}.")
    return spec


def _encoded(spec: ProductSpec, dtype: np.dtype, activation: str) -> ProductSpec:
    if dtype == np.float32 or spec.most is None:
        return spec
    product = Encoded(spec.product, dtype, spec.most, checked=activation == "none")
    return replace(spec, product=product, packed=_PACKED_AS[dtype.name] * spec.packed)


def background(channels: int, activation: str | None, fill: float | Sequence[float] | None = None) -> list[float]:
    """The scores of a voxel that no predicted patch covers: class 0 with certainty, no label, or an intensity of 0.

    Args:
        channels: Channels of the output.
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
    activation = activation or default_activation(channels)
    if activation == "sigmoid":
        return [-_CERTAIN] * channels
    if channels == 1 or activation == "applied_sigmoid":
        return [0.0] * channels
    return [0.0] + [-_CERTAIN] * (channels - 1) if activation == "softmax" else [1.0] + [0.0] * (channels - 1)
