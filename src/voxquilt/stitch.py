"""From a subject's patches to its finished volumes: an aggregator per network output, then products in native space."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from voxquilt.aggregator import GridAggregator, Placed, Slab
from voxquilt.blend import Blend, to_blend
from voxquilt.buffers import Buffers
from voxquilt.errors import OutputError, PatchShapeError
from voxquilt.geometry import Triple
from voxquilt.names import ACTIVATIONS, APPLIED, PRODUCTS, check_name
from voxquilt.products import Volumes, make_products
from voxquilt.space import Restorer, Space

Outputs = Mapping[str, Tensor]
"""What a network gives for a batch: (B, C, ...) by output name; a network with one output names it ''."""


@dataclass(frozen=True)
class Stitch:
    """How patches become volumes.

    Args:
        overlap_mode: 'crop', 'average', 'hann', 'gaussian', or a Blend.
        products: Names for every output, or output name -> names; None is the default of `make_products`.
        activation: See `make_products`.
        threshold: See `make_products`.
        class_names: Of labels 0, 1, ...; written into the header of label files.
        postprocess: Callables on a (C, I, J, K) label tensor in native space, applied in turn. MONAI's array transforms
            such as KeepLargestConnectedComponent and FillHoles are such callables.

    Raises:
        ConfigError: one of these is wrong.
    """

    overlap_mode: str | Blend = "gaussian"
    products: Sequence[str] | Mapping[str, Sequence[str]] | None = None
    activation: str | None = None
    threshold: float | None = None
    class_names: Sequence[str] | None = None
    postprocess: Sequence[Callable[[Tensor], Tensor]] = field(default=())

    def __post_init__(self) -> None:
        to_blend(self.overlap_mode)
        each = self.products.values() if isinstance(self.products, Mapping) else [self.products]
        for names in each:
            for name in names or ():
                check_name(name, PRODUCTS, "products")
        check_name(self.activation or "none", (*ACTIVATIONS, *APPLIED), "activation")

    def products_of(self, output: str) -> Sequence[str] | None:
        """The products that are wanted of an output."""
        return self.products.get(output) if isinstance(self.products, Mapping) else self.products


@dataclass(frozen=True)
class _Finish:
    """What happens to finished planes: back to native space, then into products."""

    restorer: Restorer
    volumes: Volumes

    def __call__(self, slab: Slab) -> None:
        for where, scores in self.restorer.feed(slab.start, slab.scores):
            self.volumes.fill(where, scores)


@dataclass(frozen=True)
class _Output:
    """One output of the network on its way."""

    aggregator: GridAggregator
    volumes: Volumes


class Quilt:
    """One subject's outputs while its patches come in, in the grid's `streaming_order`.

    Args:
        stitch: How patches become volumes.
        placed: The subject's GridSampler, or its grid and padding.
        space: The way back to native space.
        device: Where sums are kept.
        buffers: Where memory for them comes from and goes to.
    """

    def __init__(
        self,
        stitch: Stitch,
        placed: Placed,
        space: Space,
        *,
        device: torch.device | str = "cpu",
        buffers: Buffers | None = None,
    ) -> None:
        self.stitch = stitch
        self.placed = placed
        self.space = space
        self.device = device
        self.buffers = buffers or Buffers()
        self._outputs: dict[str, _Output] = {}

    def add(self, outputs: Outputs, locations: np.ndarray) -> None:
        """Add a network's outputs for patches at locations (B, 6).

        Raises:
            PatchShapeError: an output of another shape than the grid wants, or other outputs than before.
            LedgerError: a patch came twice or too early.
            OutputError: outputs that are not finite, or a product that an output does not have.
        """
        if not self._outputs:
            self._check_products(outputs)
            self._outputs = {name: self._open(name, patches) for name, patches in outputs.items()}
        if outputs.keys() != self._outputs.keys():
            raise PatchShapeError(f"the network's outputs are {list(outputs)} after {list(self._outputs)}.")
        for name, patches in outputs.items():
            self._outputs[name].aggregator.add_batch(patches, locations)

    @property
    def complete(self) -> bool:
        """Whether every patch is in."""
        return bool(self._outputs) and all(o.aggregator.ledger.missing == 0 for o in self._outputs.values())

    def volumes(self) -> dict[str, np.ndarray]:
        """The finished products in native space, (C, I, J, K), by '<product>' or '<output>_<product>'.

        Raises:
            LedgerError: a patch is missing.
            OutputError: post-processing changed a volume's shape.
        """
        finished: dict[str, np.ndarray] = {}
        for name, output in self._outputs.items():
            output.aggregator.ledger.check_complete()
            for product, volume in output.volumes.arrays.items():
                finished["_".join(filter(None, (name, product)))] = (
                    self._postprocessed(volume) if product == "labels" else volume
                )
        return finished

    def close(self) -> None:
        """Leave the memory of an unfinished subject to the next."""
        for output in self._outputs.values():
            output.aggregator.close()

    def _check_products(self, outputs: Outputs) -> None:
        wanted = self.stitch.products
        unknown = sorted(set(wanted) - outputs.keys()) if isinstance(wanted, Mapping) else []
        if unknown:
            raise OutputError(f"stitch.products names {unknown}; the network's outputs are {list(outputs)}.")

    def _open(self, name: str, patches: Tensor) -> _Output:
        stitch, grid = self.stitch, self.placed.grid
        factor, axis = _factor(name, tuple(patches.shape), grid.patch_size), grid.streaming_axis
        channels = patches.shape[1]
        products = make_products(stitch.products_of(name), channels, stitch.activation, stitch.threshold)
        volumes = Volumes(products, channels, self.space.native.shape)
        maps = self.space.in_scores(self.placed.padding, factor)
        finish = _Finish(Restorer(maps, axis, grid.downsampled(factor).shape), volumes)
        aggregator = GridAggregator(
            self.placed,
            stitch.overlap_mode,
            downsampling_factor=factor,
            device=self.device,
            consumer=finish,
            axis=axis,
            buffers=self.buffers,
        )
        return _Output(aggregator, volumes)

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
