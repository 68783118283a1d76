"""Computes products of finished planes and brings them to native space."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from voxquilt.geometry.space import Where
from voxquilt.geometry.streamed_resample import Piece, Restorer, Slab
from voxquilt.stitching.device_transfer import Progress
from voxquilt.stitching.finite_check import FiniteCheck
from voxquilt.stitching.kernels.label_rule import label_rule
from voxquilt.stitching.kernels.loading import LabelKernel, load_restore_labels
from voxquilt.stitching.native_grid import NativeGrid
from voxquilt.stitching.output_volumes import OutputVolumes
from voxquilt.stitching.products.base import Product, compute
from voxquilt.stitching.products.labels import ArgMax, contenders
from voxquilt.stitching.products.spec import ProductSpec
from voxquilt.stitching.streaming import FinishedPlanes

# Interpolated scores of the boxes in which labels are made: few enough that they stay in a core's cache. Boxes are also
# small enough that most have few competing classes, and large enough that there are few boxes.
_TILE_VALUES, _SMALLEST, _LARGEST = 2**19, 16, 32


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
            restorer = in_model.make_restorer(linear=spec.product.form(grid.channels)[1].kind == "f")
            volumes = in_model.make_volumes({name: spec.product}, restorer)
            before = _InModel(spec.product, grid.channels, grid.read, check)
            yield ProductPath(before, restorer, _OfModelProduct(name), volumes)
    of_scores = {name: spec.product for name, spec in specs.items() if not spec.in_model}
    has_kernels = grid.execution.kernels and grid.is_linear
    for name, product in of_scores.items():
        rule = label_rule(product) if has_kernels else None
        if rule is not None:
            restorer, after = grid.make_restorer(), _OfScores({name: product}, grid.channels, check)
            kernel = load_restore_labels(rule, grid.maps, restorer.neighbours, check.mark)
            yield KernelPath(_scores_of, restorer, after, grid.make_volumes({name: product}, restorer), name, kernel)
    if has_kernels:
        of_scores = {name: product for name, product in of_scores.items() if label_rule(product) is None}
    if not of_scores:
        return
    only_labels = all(isinstance(product, ArgMax) for product in of_scores.values())
    if only_labels and grid.is_linear and not grid.copies and not grid.execution.deferred:
        tile = round((_TILE_VALUES / grid.channels) ** (1 / 3))
        restorer = grid.make_restorer(tile=min(max(tile, _SMALLEST), _LARGEST))
        after: Callable[[Piece], Iterable[tuple[str, Tensor]]] = _Labels(list(of_scores))
    else:
        restorer, after = grid.make_restorer(), _OfScores(of_scores, grid.channels, check)
    yield ProductPath(_scores_of, restorer, after, grid.make_volumes(of_scores, restorer))


def _scores_of(finished: FinishedPlanes) -> Iterable[tuple[int, Tensor]]:
    return [(finished.start, finished.scores)]


@dataclass(frozen=True)
class _InModel:
    """Computes a product in model space; scores outside `read` are not checked."""

    product: Product
    channels: int
    read: Where
    check: FiniteCheck

    def __call__(self, finished: FinishedPlanes) -> Iterator[tuple[int, Tensor]]:
        # A few planes at a time, which stay in the cache; on a GPU more, since the start of a kernel takes time.
        axis, stop = finished.axis, finished.stop
        values = 2**25 if finished.scores.is_cuda else 2**22
        step = max(1, values * (stop - finished.start) // finished.scores.numel())
        for start in range(finished.start, stop, step):
            planes = finished.scores.narrow(axis + 1, start - finished.start, min(step, stop - start))
            along, where = self.read[axis], list(self.read)
            where[axis] = slice(max(along.start - start, 0), max(along.stop - start, 0))
            self.check(planes[:, *where])
            yield start, compute(self.product, planes, self.channels)


@dataclass(frozen=True)
class _OfModelProduct:
    """Interpolates a product that was computed in model space."""

    name: str

    def __call__(self, piece: Piece) -> Iterator[tuple[str, Tensor]]:
        yield self.name, piece.restored()


@dataclass(frozen=True)
class _OfScores:
    """Computes products of interpolated scores."""

    products: Mapping[str, Product]
    channels: int
    check: FiniteCheck

    def __call__(self, piece: Piece) -> Iterator[tuple[str, Tensor]]:
        scores = piece.restored()
        self.check(scores)
        for name, product in self.products.items():
            yield name, compute(product, scores, self.channels)


@dataclass(frozen=True)
class _Labels:
    """Computes the arg-max of interpolated scores, of only those classes that can have the highest in a piece.

    Which these are is read on the host, so that a device would be waited for.
    """

    names: list[str]

    def __call__(self, piece: Piece) -> Iterator[tuple[str, Tensor]]:
        piece = replace(piece, source=piece.source.contiguous())
        channels = contenders(piece.source)
        if len(channels) == 1:
            labels = channels.reshape(1, 1, 1, 1)
        else:
            contend = None if len(channels) == len(piece.source) else channels
            labels = channels[ArgMax()(piece.restored(contend)).long()]
        for name in self.names:
            yield name, labels
