"""How should patches become volumes? The choices of a user, and what they mean for an output of the network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from voxquilt.errors import ConfigError
from voxquilt.stitching.blend import Blend, to_blend
from voxquilt.stitching.products.spec import ProductSpec, make_products
from voxquilt.vocabulary import ACTIVATIONS, APPLIED, PRODUCTS, RESTORES, check_label_values, check_name


@dataclass(frozen=True)
class Stitch:
    """How patches become volumes.

    Args:
        overlap_mode: 'crop', 'average', 'hann', 'gaussian', or a Blend.
        products: Names for every output, or output name -> names; None is the default of `make_products`.
        activation: See `make_products`.
        threshold: See `make_products`.
        compare: Overlap modes by which labels (or the image) are made as well, from the same pass, as `labels_<mode>`.
        restore: 'scores' are interpolated to native space and labels made of them there; 'labels' are made in model
            space and brought back by nearest neighbour, which is faster and coarser.
        fill: Scores where no patch was predicted; see `voxquilt.stitching.products.spec.background`.
        class_names: Of labels 0, 1, ...; written into the header of label files.
        label_values: The numbers that classes 0, 1, ... have in label files, which have the smallest unsigned type that
            holds all of them; None for 0, 1, ... themselves. 0 stays what is no label.
        postprocess: Callables on a (C, I, J, K) label tensor in native space, applied in turn. MONAI's array transforms
            such as KeepLargestConnectedComponent and FillHoles are such callables. They see classes; what they give are
            classes, too, or without `label_values` any integers from 0, for which files get a type that holds them.

    Raises:
        ConfigError: one of these is wrong.
    """

    overlap_mode: str | Blend = "gaussian"
    products: Sequence[str] | Mapping[str, Sequence[str]] | None = None
    activation: str | None = None
    threshold: float | None = None
    compare: Sequence[str] = ()
    restore: str = "scores"
    fill: float | Sequence[float] | None = None
    class_names: Sequence[str] | None = None
    postprocess: Sequence[Callable[[Tensor], Tensor]] = field(default=())
    label_values: Sequence[int] | None = None

    def __post_init__(self) -> None:
        to_blend(self.overlap_mode)
        each = self.products.values() if isinstance(self.products, Mapping) else [self.products]
        for names in each:
            for name in names or ():
                check_name(name, PRODUCTS, "products")
        for mode in self.compare:
            to_blend(mode)
        if len(set(self.compare)) != len(self.compare):
            raise ConfigError(f"stitch.compare names an overlap mode twice: {list(self.compare)}.")
        check_name(self.activation or "none", (*ACTIVATIONS, *APPLIED), "activation")
        check_name(self.restore, RESTORES, "restore")
        check_label_values(self.label_values, self.class_names)

    def number_of(self, class_index: int) -> int:
        """The number of a class in label files."""
        known = self.label_values is not None and class_index < len(self.label_values)
        return self.label_values[class_index] if known and self.label_values is not None else class_index

    @property
    def names(self) -> dict[int, str]:
        """The classes' names by their numbers in label files."""
        return {self.number_of(n): str(name) for n, name in enumerate(self.class_names or ())}

    def recipes(self, output: str, channels: int) -> dict[str | Blend, dict[str, ProductSpec]]:
        """What is made of an output with so many channels: recipes by overlap mode and product name.

        Raises:
            OutputError: a product that such an output does not have.
        """
        names = self.products.get(output) if isinstance(self.products, Mapping) else self.products
        options = channels, self.activation, self.threshold, self.restore, self.label_values
        found: dict[str | Blend, dict[str, ProductSpec]] = {self.overlap_mode: make_products(names, *options)}
        for mode in self.compare:
            (name, recipe), *_ = make_products(None, *options).items()
            found.setdefault(mode, {})[f"{name}_{mode}"] = recipe
        return found
