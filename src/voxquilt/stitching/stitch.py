"""Holds the user's choices of how patches become volumes."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
from torch import Tensor

from voxquilt.errors import ConfigError, OutputError
from voxquilt.geometry.grid import make_grid
from voxquilt.stitching.blend import Blend, checked_weights, to_blend
from voxquilt.stitching.label_values import to_labels
from voxquilt.stitching.products.base import Product
from voxquilt.stitching.products.registry import PRODUCTS
from voxquilt.stitching.products.spec import ProductSpec, check_temperature, make_products
from voxquilt.vocabulary import (
    ACTIVATIONS,
    APPLIED,
    COMBINE,
    DTYPES,
    FILES,
    IMAGE,
    LABELS,
    MAP,
    ONE,
    RESTORES,
    check_label_values,
    check_name,
    check_order,
    check_per_slice,
    check_positive,
    check_regions,
)

# Patches that overlap, the last one moved back.
_GRID = make_grid((11, 5, 5), 5, 2)
Products = Sequence[str | Product]


@dataclass(frozen=True)
class Stitch:
    """How patches become volumes.

    >>> stitch = Stitch("hann", products=["labels", "probabilities"], class_names=["background", "tumour"])
    >>> stitch.names
    {0: 'background', 1: 'tumour'}

    Args:
        overlap_mode: Name of a blend ('crop', 'average', 'hann', 'gaussian'), or a Blend.
        products: Products for every output, or output name -> products; None is the default of `make_products`. Each is
            a name or a Product of your own, with a `name` for its files.
        activation: See `make_products`.
        threshold: See `make_products`.
        compare: Overlap modes by which labels (or the image) are also made, from the same forward passes, as
            `labels_<mode>`.
        restore: 'scores' interpolates scores to native space and makes labels of them there; 'probabilities' activates
            them before they are interpolated, as MONAI's bundles do; 'labels' makes labels in model space and resamples
            them by nearest neighbour, which is faster and coarser.
        order: Order by which scores are interpolated to native space: 0 takes the nearest voxel, 1 is linear, 3 a cubic
            spline, whose labels have smoother surfaces.
        per_slice: Where the largest voxel size is more than so many times the smallest, slices across that axis are
            interpolated each by itself, and the nearest is taken between them; None never does so. See
            `voxquilt.geometry.space.Space.slice_axis`.
        fill: Scores where no patch was predicted; see `voxquilt.stitching.products.spec.background`.
        class_names: Names of labels 0, 1, ...; written into the header of label files.
        label_values: The numbers that classes 0, 1, ... have in label files, which have the smallest unsigned type that
            holds all of them; None for 0, 1, ... themselves. 0 remains the number of voxels without a label.
        regions: Where the network's channels are regions that overlap, the number that each of them writes into the
            labels, in turn, so that later ones overwrite earlier ones: one label per voxel in place of a mask per
            channel.
        combine: How the volumes of several models are put together; see `voxquilt.stitching.combination.Combination`.
        classes: Names or numbers of the labels that are written; all others become 0. None writes all.
        dtype: Type of maps with a known range (probabilities, entropy, disagreement): 'float32', 'float16', or 'uint8',
            whose files have a slope by which viewers show the numbers; see
            `voxquilt.stitching.products.encoded.Encoded`. Arrays of `predict_volume` hold the integers.
        files: 'one' file for a map with a channel per class, or 'per_class'.
        temperature: What scores are divided by before soft-max or sigmoid, for all products but labels and logits; see
            `voxquilt.stitching.products.base.Tempered`.
        postprocess: Callables on a (C, I, J, K) label tensor in native space, applied in turn. MONAI's array transforms
            such as KeepLargestConnectedComponent and FillHoles are such callables. They take and give classes; without
            `label_values` they may give any integers from 0, for which files have a type that holds them.

    Raises:
        ConfigError: one of these is wrong.
    """

    overlap_mode: str | Blend = "gaussian"
    products: Products | Mapping[str, Products] | None = None
    activation: str | None = None
    threshold: float | None = None
    compare: Sequence[str] = ()
    restore: str = "scores"
    order: int = 1
    per_slice: float | bool | None = None
    fill: float | Sequence[float] | None = None
    class_names: Sequence[str] | None = None
    postprocess: Sequence[Callable[[Tensor], Tensor]] = field(default=())
    label_values: Sequence[int] | None = None
    regions: Sequence[int] | None = None
    classes: Sequence[str | int] | None = None
    combine: str | None = None
    dtype: str = "float32"
    files: str = ONE
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for blend in self.blends.values():  # of another package, say; before anything is started
            _ = checked_weights(blend, _GRID, axis=0)
        product_lists = self.products.values() if isinstance(self.products, Mapping) else [self.products]
        for products in product_lists:
            _check_products(products or ())
        if len(set(self.compare)) != len(self.compare):
            raise ConfigError(f"stitch.compare names an overlap mode twice: {list(self.compare)}.")
        check_name(self.activation or "none", (*ACTIVATIONS, *APPLIED), "activation")
        check_name(self.restore, RESTORES, "restore")
        if self.combine is not None:
            check_name(self.combine, COMBINE, "combine")
        check_order(self.order, "stitch.order")
        check_per_slice(self.per_slice, "stitch.per_slice")
        check_name(self.dtype, DTYPES, "stitch.dtype")
        check_name(self.files, FILES, "stitch.files")
        check_positive(self.temperature, "stitch.temperature")
        check_temperature(self.temperature, self.activation)
        check_label_values(self.label_values, self.class_names)
        check_regions(self.regions, self.label_values)
        _ = self.kept  # unknown names

    @cached_property
    def blends(self) -> dict[str, Blend]:
        """The blends of `compare` by name, after the one of `overlap_mode`, whose name is ''."""
        return {"": to_blend(self.overlap_mode)} | {mode: to_blend(mode) for mode in self.compare}

    def number_of(self, class_index: int) -> int:
        """The number of a class in label files."""
        numbers = self.numbers
        return class_index if numbers is None or class_index >= len(numbers) else numbers[class_index]

    @property
    def numbers(self) -> Sequence[int] | None:
        """The numbers in label files, of each class or of each region; None for 0, 1, ..."""
        return self.label_values or self.regions

    @property
    def kept(self) -> set[int] | None:
        """The numbers of the labels that are written; None for all.

        Raises:
            ConfigError: no class has a name or number of `classes`.
        """
        if self.classes is None:
            return None
        by_name = {name: number for number, name in self.names.items()}
        known = set(by_name.values()) or None
        for wanted in self.classes:
            if isinstance(wanted, str):
                check_name(wanted, by_name, "stitch.classes")
            elif known is not None and wanted not in known:
                raise ConfigError(f"stitch.classes names {wanted}; the labels are {sorted(known)}.")
        return {by_name[wanted] if isinstance(wanted, str) else int(wanted) for wanted in self.classes}

    def label_numbers(self, classes: int) -> list[int]:
        """The numbers above 0 that so many classes have in label files, of those that are written."""
        numbers = sorted({self.number_of(n) for n in range(classes)} - {0})
        return numbers if self.kept is None else [number for number in numbers if number in self.kept]

    @property
    def names(self) -> dict[int, str]:
        """The classes' names by their numbers in label files."""
        return {self.number_of(n): str(name) for n, name in enumerate(self.class_names or ())}

    def names_of(self, channels: int) -> dict[int, str]:
        """Names by the numbers in a file of labels; by channel if there are several labels per voxel."""
        return dict(enumerate(map(str, self.class_names or ()))) if channels > 1 else self.names

    def to_labels(self, classes: np.ndarray) -> np.ndarray:
        """Labels as files hold them, of a (C, I, J, K) volume of classes, which may be replaced in place.

        Raises:
            OutputError: post-processing gave another shape, or numbers that are not labels.
        """
        return to_labels(classes, self.postprocess, self.label_values, self.kept)

    def specs(self, output: str, channels: int) -> list[tuple[Blend, dict[str, ProductSpec]]]:
        """The products of an output by name, for each blend.

        Args:
            output: Name of the output.
            channels: Channels of the output.

        Raises:
            ConfigError: `label_values` do not fit the output's classes.
            OutputError: a product that cannot be made of such an output.
        """
        wanted = self.products.get(output) if isinstance(self.products, Mapping) else self.products
        options = channels, self.activation, self.threshold, self.restore, self.label_values, self.regions
        make = partial(make_products, dtype=self.dtype, temperature=self.temperature)
        try:
            specs = [(self.blends[""], make(wanted, *options))]
        except OutputError as error:
            raise OutputError(f"output {output!r}: {error}" if output else str(error)) from error
        for mode in self.compare:
            (name, spec), *_ = make(None, *options).items()
            if mode == self.overlap_mode:  # averaged once
                specs[0][1][f"{name}_{mode}"] = spec
            else:
                specs.append((self.blends[mode], {f"{name}_{mode}": spec}))
        return specs


def _check_products(products: Products) -> None:
    names: dict[object, object] = {}
    for product in products:
        _check_product(product)
        name = product if isinstance(product, str) else getattr(product, "name", None)
        if names.setdefault(name, product) != product:
            raise ConfigError(f"two products have the name {name!r}, so that one file would replace the other.")


def _check_product(product: object) -> None:
    if isinstance(product, str):
        PRODUCTS.check(product, "products")
        return
    name = getattr(product, "name", None)
    if not isinstance(product, Product) or not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise ConfigError(
            f"products are names or Products, which have a name of letters, digits and '_' for their files, a kind, "
            f"form(channels) and __call__(scores); this one is {product!r} with the name {name!r}."
        )
    check_name(product.kind, (LABELS, MAP, IMAGE), f"the kind of the product {name!r}")
