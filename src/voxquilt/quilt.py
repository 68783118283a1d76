"""From a subject's patches to its finished volumes: blended sums per network output, then products in native space."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from voxquilt.aggregator import GridAggregator, Placed, Slab
from voxquilt.buffers import Buffers, home
from voxquilt.errors import OutputError, PatchShapeError
from voxquilt.geometry import Triple
from voxquilt.products import ArgMax, Kept, Product, Threshold, check_finite, contenders
from voxquilt.recipes import Recipe, background
from voxquilt.space import AxisMaps, Piece, Restorer, Space
from voxquilt.stitch import Stitch
from voxquilt.volumes import Scratch, Volumes

# Voxels along an edge of the boxes in which labels are made of interpolated scores: small, so that few classes compete
# in most of them, and large enough that there are few boxes.
_TILE = 32

Outputs = Mapping[str, Tensor]
"""What a network gives for a batch: (B, C, ...) by output name; a network with one output names it ''."""


@dataclass(frozen=True)
class _Way:
    """How some products come out of finished planes.

    Args:
        before: Computed in model space, if anything is.
        restorer: Brings that, or the scores, to native space.
        after: What is made of a piece there for the volumes.
        volumes: Where products are computed and kept.
    """

    before: Product | None
    restorer: Restorer
    after: Callable[[Piece], Tensor]
    volumes: Volumes


class _Finish:
    """What happens to finished planes of one ring: into products, and back to native space.

    Raises:
        OutputError: (when called) scores that are NaN or infinite.
    """

    def __init__(
        self,
        recipes: Mapping[str, Recipe],
        channels: int,
        maps: AxisMaps,
        axis: int,
        shape: Triple,
        scratch: Scratch | None,
    ) -> None:
        self._axis = axis
        native = maps[0].size, maps[1].size, maps[2].size
        self._ways: list[_Way] = []

        def add(before: Product | None, after: Callable[[Piece], Tensor], products: Mapping[str, Product]) -> None:
            labels = before is not None and before.form(channels)[1].kind != "f"
            tile = _TILE if after is _best else None
            restorer = Restorer(maps, axis, shape, linear=not labels, tile=tile)
            volumes = Volumes(products, channels, native, restorer.axis, scratch)
            self._ways.append(_Way(before, restorer, after, volumes))

        for name, recipe in recipes.items():
            if recipe.in_model:
                add(recipe.product, Piece.restored, {name: Kept(recipe.product)})
        of_scores = {name: recipe.product for name, recipe in recipes.items() if not recipe.in_model}
        copied = not any(m.neighbours(shape[m.axis])[2].any() for m in maps)
        if of_scores and (copied or not all(isinstance(product, ArgMax) for product in of_scores.values())):
            add(None, _scores, of_scores)
        elif of_scores:
            add(None, _best, {name: Kept(product) for name, product in of_scores.items()})

    def __call__(self, slab: Slab) -> None:
        for way in self._ways:
            slabs = [(slab.start, slab.scores)] if way.before is None else self._computed(way.before, slab)
            for start, planes in slabs:
                for piece in way.restorer.feed(start, planes):
                    way.volumes.fill(piece.where, way.after(piece))

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Finished products by name."""
        return {name: array for way in self._ways for name, array in way.volumes.arrays.items()}

    def _computed(self, product: Product, slab: Slab) -> Iterable[tuple[int, Tensor]]:
        # A few planes at a time, which stay in the cache.
        step = max(1, 2**22 * (slab.stop - slab.start) // slab.scores.numel())
        for start in range(slab.start, slab.stop, step):
            planes = slab.scores.narrow(self._axis + 1, start - slab.start, min(step, slab.stop - start))
            check_finite(planes)
            yield start, product(planes)


def _scores(piece: Piece) -> Tensor:
    restored = piece.restored()
    check_finite(restored)
    return restored


def _best(piece: Piece) -> Tensor:
    """The labels of a piece, from those classes alone that can win in it."""
    channels = contenders(piece.source)
    if len(channels) == 1:
        return channels.reshape(1, 1, 1, 1)
    return channels[ArgMax()(piece.restored(channels)).long()]


@dataclass(frozen=True)
class _Ring:
    """One blend of what is made of one output's patches."""

    averaged: Callable[[Tensor], Tensor]
    aggregator: GridAggregator
    finish: _Finish


class Quilt:
    """One subject's outputs while its patches come in, in the grid's `streaming_order`.

    Args:
        stitch: How patches become volumes.
        placed: The subject's GridSampler, or its grid and padding.
        space: The way back to native space.
        device: Where sums are kept; None for where the outputs are.
        buffers: Where memory for them comes from and goes to.
        scratch: Where products that are too large for memory go.
        skipped: Numbers of patches that are not predicted; if these are all, add any one of them nonetheless, which
            tells the outputs' channels and is otherwise not used.
    """

    def __init__(
        self,
        stitch: Stitch,
        placed: Placed,
        space: Space,
        *,
        device: torch.device | str | None = None,
        buffers: Buffers | None = None,
        scratch: Scratch | None = None,
        skipped: Iterable[int] = (),
    ) -> None:
        self.stitch = stitch
        self.placed = placed
        self.space = space
        self.device = device
        self.buffers = buffers or Buffers()
        self.scratch = scratch
        self.skipped = frozenset(skipped)
        self._rings: dict[str, list[_Ring]] = {}

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
        taken = 0 if len(self.skipped) == len(self.placed.grid) else len(locations)
        for name, patches in outputs.items():
            made: dict[Callable[[Tensor], Tensor], Tensor] = {}
            for ring in self._rings[name]:
                if ring.averaged not in made:
                    made[ring.averaged] = ring.averaged(patches[:taken])
                ring.aggregator.add_batch(made[ring.averaged], locations[:taken])

    @property
    def complete(self) -> bool:
        """Whether every patch is in."""
        return bool(self._rings) and all(
            ring.aggregator.ledger.missing == 0 for rings in self._rings.values() for ring in rings
        )

    def volumes(self) -> dict[str, np.ndarray]:
        """The finished products in native space, (C, I, J, K), by '<product>' or '<output>_<product>'.

        Raises:
            LedgerError: a patch is missing.
            OutputError: post-processing changed a volume's shape.
        """
        finished: dict[str, np.ndarray] = {}
        for name, rings in self._rings.items():
            for ring in rings:
                ring.aggregator.ledger.check_complete()
                for product, volume in ring.finish.arrays.items():
                    finished["_".join(filter(None, (name, product)))] = (
                        self._postprocessed(volume) if product.startswith("labels") else volume
                    )
        return finished

    @property
    def labels(self) -> list[str]:
        """Names of those among the volumes that hold labels."""
        return [
            "_".join(filter(None, (name, product)))
            for name, rings in self._rings.items()
            for ring in rings
            for product in ring.finish.arrays
            if product.startswith("labels")
        ]

    def close(self) -> None:
        """Leave the memory of an unfinished subject to the next."""
        for ring in (ring for rings in self._rings.values() for ring in rings):
            ring.aggregator.close()

    def _check_products(self, outputs: Outputs) -> None:
        wanted = self.stitch.products
        unknown = sorted(set(wanted) - outputs.keys()) if isinstance(wanted, Mapping) else []
        if unknown:
            raise OutputError(f"stitch.products names {unknown}; the network's outputs are {list(outputs)}.")

    def _open(self, name: str, patches: Tensor) -> list[_Ring]:
        stitch, grid = self.stitch, self.placed.grid
        factor, channels = _factor(name, tuple(patches.shape), grid.patch_size), patches.shape[1]
        maps = self.space.in_scores(self.placed.padding, factor)
        shape = grid.downsampled(factor).shape
        recipes = [
            (mode, averaged, {product: recipe for product, recipe in some.items() if recipe.averaged == averaged})
            for mode, some in stitch.recipes(name, channels).items()
            for averaged in dict.fromkeys(recipe.averaged for recipe in some.values())
        ]
        fill = torch.tensor(background(channels, stitch.activation, stitch.fill), dtype=torch.float64)
        if self.skipped and stitch.fill is None:
            self._check_fill(fill, [recipe for _, _, some in recipes for recipe in some.values()])
        fills = [averaged(fill.reshape(1, channels, 1, 1, 1)).flatten().tolist() for _, averaged, _ in recipes]
        planes = prod(shape) * grid.patch_size[grid.streaming_axis] // grid.shape[grid.streaming_axis]
        size = sum(map(len, fills)) * planes * max(4, patches.element_size())
        rings = []
        for (mode, averaged, some), values in zip(recipes, fills, strict=True):
            finish = _Finish(some, channels, maps, grid.streaming_axis, shape, self.scratch)
            aggregator = GridAggregator(
                self.placed,
                mode,
                downsampling_factor=factor,
                device=home(patches.device, size) if self.device is None else self.device,
                consumer=finish,
                axis=grid.streaming_axis,
                buffers=self.buffers,
                skipped=self.skipped,
                fill=values,
            )
            rings.append(_Ring(averaged, aggregator, finish))
        return rings

    def _check_fill(self, fill: Tensor, recipes: list[Recipe]) -> None:
        values = fill.reshape(-1, 1, 1, 1)
        if any(isinstance(recipe.product, Threshold) and recipe.product(values).any() for recipe in recipes):
            raise OutputError(
                f"patches without foreground would count as label 1, since a score of 0 is above "
                f"stitch.threshold={self.stitch.threshold}; set stitch.fill to the background's score."
            )

    def _postprocessed(self, labels: np.ndarray) -> np.ndarray:
        if not self.stitch.postprocess:
            return labels
        data = torch.from_numpy(labels.astype(np.int64))
        for transform in self.stitch.postprocess:
            data = torch.as_tensor(transform(data)).as_subclass(Tensor)
            if tuple(data.shape) != labels.shape:
                raise OutputError(f"post-processing {transform!r} turned {labels.shape} into {tuple(data.shape)}.")
        return data.numpy().astype(labels.dtype)


def _factor(name: str, shape: tuple[int, ...], patch: Triple) -> Triple:
    """How many times smaller than its input an output is, along each axis."""
    if len(shape) != 5 or 0 in shape or any(p % n for p, n in zip(patch, shape[2:], strict=True)):
        raise PatchShapeError(
            f"the network's output {name!r} has shape {shape} for patches of {patch} voxels; wanted is (B, C, I, J, K) "
            f"with as many voxels, or fewer by a whole factor."
        )
    i, j, k = (p // n for p, n in zip(patch, shape[2:], strict=True))
    return i, j, k
