"""Computes products of finished planes and brings them to native space."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from voxquilt.geometry.streamed_resample import Piece, Restorer, Slab
from voxquilt.stitching.device_transfer import Progress
from voxquilt.stitching.finite_check import FiniteCheck
from voxquilt.stitching.kernels.label_rule import label_rule
from voxquilt.stitching.kernels.loading import LabelKernel, load_restore_labels
from voxquilt.stitching.native_grid import NativeGrid
from voxquilt.stitching.output_volumes import OutputVolumes
from voxquilt.stitching.product_steps import InModel, Interpolated, LabelsOfScores, OfModelProduct, OfScores
from voxquilt.stitching.products.base import Product
from voxquilt.stitching.products.encoded import Encoded
from voxquilt.stitching.products.labels import ArgMax
from voxquilt.stitching.products.spec import ProductSpec
from voxquilt.stitching.streaming import FinishedPlanes

# The boxes in which labels are made: voxels along each side, as long as the scores in it are no more than this; the
# largest of these. Scores should stay in a core's cache, and few classes compete in a box. But, measured on a CPU, in
# boxes of less than 32 voxels it takes longer to start the twenty operations on them than to compute these, so that
# boxes of many classes are larger than a cache.
_TILES = ((56, 2**19), (32, 2**21), (16, 2**63))


@dataclass(frozen=True)
class ProductPath:
    """How some products are computed from finished planes.

    Args:
        before: Computes the values to interpolate from finished planes, in model space.
        restorer: Interpolates them to native space.
        after: Computes products of a piece in native space, each with its name.
        volumes: Where products are kept.
    """

    before: Callable[[FinishedPlanes], Iterable[tuple[int, Tensor]]]
    restorer: Restorer
    after: Callable[[Piece], Iterable[tuple[str, Tensor]]]
    volumes: OutputVolumes

    def __call__(self, finished: FinishedPlanes) -> None:
        """Compute the products of finished planes."""
        for start, planes in self.before(finished):
            for slab in self.restorer.slabs(start, planes):
                self.take(slab)

    def take(self, slab: Slab) -> None:
        """Compute the products of native planes."""
        for piece in self.restorer.pieces(slab):
            for name, voxels in self.after(piece):
                self.volumes.store(name, piece.where, voxels)


@dataclass(frozen=True)
class KernelPath(ProductPath):
    """Computes one product of labels by a kernel, where it can; else as ProductPath does.

    Args:
        name: Name of the product.
        kernel: Makes its labels.
    """

    name: str
    kernel: LabelKernel

    def take(self, slab: Slab) -> None:
        if not self.kernel.takes(slab.planes):
            super().take(slab)
            return
        labels, kept = self.volumes.on_device(self.name, slab.where), True
        if labels is None:
            labels, kept = self.volumes.new_planes(self.name, slab.where, slab.planes.device), False
        first = [0, 0, 0]
        first[self.restorer.source_axis] = slab.start
        self.kernel(slab.planes, first, slab.where, labels)
        if not kept:
            self.volumes.store(self.name, slab.where, labels)


class NativeProducts:
    """Turns finished planes of one blend into products in native space.

    Args:
        specs: The products by name, which are all computed from the same averages.
        grid: The mapping to native space.

    Raises:
        OutputError: (when called, or on a device when finished) scores that are NaN or infinite.
    """

    def __init__(self, specs: Mapping[str, ProductSpec], grid: NativeGrid) -> None:
        self._check = FiniteCheck(grid.device, deferred=grid.execution.deferred)
        self._progress = Progress(grid.device)
        self._paths = list(_paths(specs, grid, self._check))

    def __call__(self, finished: FinishedPlanes) -> None:
        for path in self._paths:
            path(finished)
        self._progress.mark()

    @property
    def volumes(self) -> dict[str, OutputVolumes]:
        """Where each product is kept."""
        return {name: path.volumes for path in self._paths for name in path.volumes.arrays}

    def finish(self) -> None:
        """Wait until a device has computed the products, and bring them to the host.

        Raises:
            OutputError: scores were NaN or infinite.
        """
        self._check.verify(self._progress)
        self._fetch()

    def to_host(self) -> None:
        """Bring what there is to the host, where scores will come from."""
        self._fetch()
        self._check.to_host()

    def _fetch(self) -> None:
        for path in self._paths:
            path.volumes.fetch(self._progress)


def _paths(specs: Mapping[str, ProductSpec], grid: NativeGrid, check: FiniteCheck) -> Iterator[ProductPath]:
    # A spline would swing beyond a product's range, such as below an entropy of 0.
    in_model = grid if grid.is_linear else replace(grid, maps=tuple(m.without_spline() for m in grid.maps))
    for name, spec in specs.items():
        if spec.in_model:
            has_numbers = isinstance(spec.product, Encoded) or spec.product.form(grid.channels)[1].kind == "f"
            restorer = in_model.make_restorer(linear=has_numbers)
            volumes = in_model.make_volumes({name: spec.product}, restorer)
            before = InModel(spec.product, grid.channels, grid.read, check)
            yield ProductPath(before, restorer, OfModelProduct(name), volumes)
    of_scores = {name: spec for name, spec in specs.items() if not spec.in_model}
    for interpolated in dict.fromkeys(spec.interpolated for spec in of_scores.values()):
        products = {name: spec.product for name, spec in of_scores.items() if spec.interpolated == interpolated}
        yield from _native_paths(products, grid, check, Interpolated(interpolated))


def _native_paths(
    products: Mapping[str, Product], grid: NativeGrid, check: FiniteCheck, before: Interpolated
) -> Iterator[ProductPath]:
    """The paths of products that are computed from the same interpolated values."""
    has_kernels = grid.execution.kernels and grid.is_linear
    grid = replace(grid, fill=before.of_voxel(grid.fill))
    for name, product in products.items():
        rule = label_rule(product) if has_kernels else None
        if rule is not None:
            restorer, after = grid.make_restorer(), OfScores({name: product}, grid.channels, check)
            kernel = load_restore_labels(rule, grid.maps, restorer.tables, check.mark)
            yield KernelPath(before, restorer, after, grid.make_volumes({name: product}, restorer), name, kernel)
    if has_kernels:
        products = {name: product for name, product in products.items() if label_rule(product) is None}
    if not products:
        return
    only_labels = all(isinstance(product, ArgMax) for product in products.values())
    if only_labels and grid.is_linear and not grid.copies and not grid.execution.deferred:
        tile = round(max(min(side, (values / grid.channels) ** (1 / 3)) for side, values in _TILES))
        restorer = grid.make_restorer(tile=tile)
        after: Callable[[Piece], Iterable[tuple[str, Tensor]]] = LabelsOfScores(list(products))
    else:
        restorer, after = grid.make_restorer(), OfScores(products, grid.channels, check)
    yield ProductPath(before, restorer, after, grid.make_volumes(products, restorer))
