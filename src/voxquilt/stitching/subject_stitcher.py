"""From a subject's patches to its finished volumes: blended sums per network output, then products in native space."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from voxquilt.errors import BatchError, LedgerError, OutputError, PatchShapeError
from voxquilt.geometry.output_layout import factor_of
from voxquilt.geometry.slab_split import Part
from voxquilt.geometry.slab_split import whole as all_rows
from voxquilt.geometry.space import Space, Where
from voxquilt.stitching.aggregator import GridAggregator, Placed
from voxquilt.stitching.blend import to_blend
from voxquilt.stitching.buffer_pool import BufferPool, choose_device
from voxquilt.stitching.label_values import to_labels
from voxquilt.stitching.native_products import NativeGrid, NativeProducts
from voxquilt.stitching.output_volumes import OutputVolumes, Scratch
from voxquilt.stitching.products.labels import Threshold
from voxquilt.stitching.products.spec import ProductSpec, background
from voxquilt.stitching.stitch import Stitch
from voxquilt.stitching.streaming import planes_of

Outputs = Mapping[str, Tensor]
"""What a network gives for a batch: (B, C, ...) by output name; a network with one output names it ''."""


@dataclass(frozen=True)
class _Ring:
    """One blend of what is made of one output's patches."""

    averaged: Callable[[Tensor], Tensor]
    aggregator: GridAggregator
    finish: NativeProducts


class SubjectStitcher:
    """One subject's outputs while its patches come in, in the grid's `streaming_order`.

    Several processes may share a subject, each with a `part` of its rows (see `voxquilt.geometry.slab_split.split`),
    whose patches come in the part's order. Once they are in,

        n + 1:  head()     what the part before needs, as soon as it is there, which can be long before the end
        n:      join()     takes it in; then this part is finished
        n:      parts()    this part of the products, to be sent to the owner,
        owner:  place()    who puts all of them in their places; then it has volumes()

    Args:
        stitch: How patches become volumes.
        placed: The subject's GridSampler, or its grid and padding.
        space: The way back to native space.
        device: Where sums are kept; None for where the outputs are.
        buffers: Where memory for them comes from and goes to.
        scratch: Where products that are too large for memory go.
        skipped: Numbers of patches, of all parts, that are not predicted; if no others are to come, add any one patch
            nonetheless, which tells the outputs' channels and is otherwise not used.
        part: The rows whose patches come here; None for all.
        whole: Whether this process is the owner, and has room for the whole volumes.
        layout: How outputs lie in patches; see `voxquilt.geometry.output_layout.factor_of`.

    Raises:
        ConfigError: (a ValueError) the grid has fewer rows than the part.
    """

    def __init__(
        self,
        stitch: Stitch,
        placed: Placed,
        space: Space,
        *,
        device: torch.device | str | None = None,
        buffers: BufferPool | None = None,
        scratch: Scratch | None = None,
        skipped: Iterable[int] = (),
        part: Part | None = None,
        whole: bool = True,
        layout: str = "auto",
    ) -> None:
        self.stitch = stitch
        self.placed = placed
        self.space = space
        self.device = device
        self.buffers = buffers or BufferPool()
        self.scratch = scratch
        self.skipped = frozenset(skipped)
        self.part = part or all_rows(placed.grid, placed.grid.streaming_axis)
        self.whole = whole
        self._layout = layout
        self._nothing = self.skipped.issuperset(self.part.patches(placed.grid).tolist())
        self._rings: dict[str, list[_Ring]] = {}
        self._labels: dict[str, np.ndarray] = {}

    def add(self, outputs: Outputs, locations: np.ndarray) -> None:
        """Add a network's outputs for patches at locations (B, 6).

        Raises:
            PatchShapeError: an output of another shape than the grid wants, or other outputs than before.
            LedgerError: a patch came twice or too early.
            OutputError: outputs that are not finite, or a product that an output does not have.
        """
        if not self._rings:
            self._check_products(outputs)
            self._rings = {name: self._open(name, patches) for name, patches in outputs.items()}
        if outputs.keys() != self._rings.keys():
            raise PatchShapeError(f"the network's outputs are {list(outputs)} after {list(self._rings)}.")
        taken = 0 if self._nothing else len(locations)
        for name, patches in outputs.items():
            made: dict[Callable[[Tensor], Tensor], Tensor] = {}
            for ring in self._rings[name]:
                if ring.averaged not in made:
                    made[ring.averaged] = ring.averaged(patches[:taken])
                ring.aggregator.add_batch(made[ring.averaged], locations[:taken])

    @property
    def complete(self) -> bool:
        """Whether every patch, or every one of the part, is in."""
        return bool(self._rings) and all(ring.aggregator.ledger.missing == 0 for ring in self._all)

    def head(self) -> list[Tensor] | None:
        """What the part before needs of this one, for its `join`.

        Returns:
            Tensors on the host; None until they are complete; [] if no part is before this one.
        """
        if self.part.first == 0:
            return []
        heads = [ring.aggregator.head() for ring in self._all]
        known = [head for head in heads if head is not None]
        return [planes for head in known for planes in head] if heads and len(known) == len(heads) else None

    def join(self, head: list[Tensor]) -> None:
        """Take in the `head` of the part that follows.

        Raises:
            BatchError: no part follows.
            PatchShapeError: the head is not of this part's neighbour.
            LedgerError: a patch of this part is missing, or a head came before.
        """
        rings = self._opened()
        each, rest = divmod(len(head), len(rings))
        if rest:
            raise PatchShapeError(f"the head of the next part has {len(head)} tensors for {len(rings)} blends.")
        for n, ring in enumerate(rings):
            ring.aggregator.join(head[n * each : (n + 1) * each])

    def parts(self) -> Iterator[tuple[str, Where, np.ndarray]]:
        """This part of every product, one after the other: its name, native slices and a contiguous (C, I, J, K) array.

        Raises:
            LedgerError: a patch is missing, or the head of the part that follows.
        """
        self._check_finished()
        for name, (product, volumes) in self._products.items():
            yield name, *volumes.part(product)

    def place(self, name: str, where: Where, array: np.ndarray) -> None:
        """Put another part's planes of a product in their place.

        Raises:
            BatchError: this process has no room for them, or no such product.
            PatchShapeError: an array of another shape or type.
            LedgerError: some of the planes are here already.
        """
        if not self.whole or name not in self._products:
            raise BatchError(f"{self.part} has no room for planes of {name!r}; it has products {list(self._products)}.")
        product, volumes = self._products[name]
        volumes.place(product, where, array)

    def volumes(self) -> dict[str, np.ndarray]:
        """The finished products in native space, (C, I, J, K), by '<product>' or '<output>_<product>'.

        Raises:
            BatchError: this process has no room for them.
            LedgerError: a patch is missing, or what another part made.
            OutputError: post-processing changed a volume's shape, or gave what no label file holds.
        """
        if not self.whole:
            raise BatchError(f"{self.part} keeps no whole volumes: its planes are in parts().")
        self._check_finished()
        finished: dict[str, np.ndarray] = {}
        for name, (product, volumes) in self._products.items():
            volumes.check_whole()
            volume = volumes.arrays[product]
            finished[name] = self._numbered(name, volume) if product.startswith("labels") else volume
        return finished

    @property
    def labels(self) -> list[str]:
        """Names of those among the volumes that hold labels."""
        return [name for name, (product, _) in self._products.items() if product.startswith("labels")]

    def to(self, device: torch.device) -> None:
        """Keep sums on another device from here on, also those that have come."""
        self.device = device
        for ring in self._all:
            ring.aggregator.to(device)

    def close(self) -> None:
        """Leave the memory of an unfinished subject to the next."""
        for ring in self._all:
            ring.aggregator.close()

    @property
    def _all(self) -> list[_Ring]:
        return [ring for rings in self._rings.values() for ring in rings]

    @property
    def _products(self) -> dict[str, tuple[str, OutputVolumes]]:
        """By full name: a product's name within its output, and where it is kept."""
        return {
            "_".join(filter(None, (output, product))): (product, volumes)
            for output, rings in self._rings.items()
            for ring in rings
            for product, volumes in ring.finish.volumes.items()
        }

    def _check_finished(self) -> None:
        for ring in self._opened():
            ring.aggregator.check_finished()

    def _opened(self) -> list[_Ring]:
        if not self._rings:
            raise LedgerError(
                "no patch has come, so there are no outputs; of a part without foreground one comes, too."
            )
        return self._all

    def _check_products(self, outputs: Outputs) -> None:
        wanted = self.stitch.products
        unknown = sorted(set(wanted) - outputs.keys()) if isinstance(wanted, Mapping) else []
        if unknown:
            raise OutputError(f"stitch.products names {unknown}; the network's outputs are {list(outputs)}.")

    def _open(self, name: str, patches: Tensor) -> list[_Ring]:
        stitch, grid = self.stitch, self.placed.grid
        factor, channels = factor_of(self._layout, name, patches.shape, grid.patch_size), patches.shape[1]
        maps, axis = self.space.in_scores(self.placed.padding, factor), self.part.axis
        scores = grid.downsampled(factor)
        recipes = [
            (mode, averaged, {product: recipe for product, recipe in some.items() if recipe.averaged == averaged})
            for mode, some in stitch.recipes(name, channels).items()
            for averaged in dict.fromkeys(recipe.averaged for recipe in some.values())
        ]
        fill = torch.tensor(background(channels, stitch.activation, stitch.fill), dtype=torch.float64)
        if self.skipped and stitch.fill is None:
            self._check_fill(fill, [recipe for _, _, some in recipes for recipe in some.values()])
        fills = [averaged(fill.reshape(1, channels, 1, 1, 1)).flatten().tolist() for _, averaged, _ in recipes]
        planes = prod(scores.shape) * grid.patch_size[axis] // grid.shape[axis]
        size = sum(map(len, fills)) * planes * (max(4, patches.element_size()) if patches.is_floating_point() else 8)
        rings = []
        for (mode, averaged, some), values in zip(recipes, fills, strict=True):
            planes = planes_of(self.part, scores, to_blend(mode))
            back = NativeGrid(maps, axis, scores.shape, channels, planes, self.whole, self.scratch)
            finish = NativeProducts(some, back)
            aggregator = GridAggregator(
                self.placed,
                mode,
                downsampling_factor=factor,
                device=choose_device(patches.device, size) if self.device is None else self.device,
                consumer=finish,
                axis=axis,
                buffers=self.buffers,
                skipped=self.skipped,
                fill=values,
                part=self.part,
            )
            rings.append(_Ring(averaged, aggregator, finish))
        return rings

    def _check_fill(self, fill: Tensor, recipes: list[ProductSpec]) -> None:
        values = fill.reshape(-1, 1, 1, 1)
        if any(isinstance(recipe.product, Threshold) and recipe.product(values).any() for recipe in recipes):
            raise OutputError(
                f"patches without foreground would count as label 1, since a score of 0 is above "
                f"stitch.threshold={self.stitch.threshold}; set stitch.fill to the background's score."
            )

    def _numbered(self, name: str, classes: np.ndarray) -> np.ndarray:
        """Labels as files hold them; made once, since it changes the classes in place."""
        if name not in self._labels:
            self._labels[name] = to_labels(classes, self.stitch.postprocess, self.stitch.label_values)
        return self._labels[name]
