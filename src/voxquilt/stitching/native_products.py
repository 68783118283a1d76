"""Computes products of finished planes and brings them to native space."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from voxquilt.geometry.frame import Triple
from voxquilt.geometry.space import AxisMaps, Where
from voxquilt.geometry.streamed_resample import Piece, Restorer
from voxquilt.stitching.output_volumes import OutputVolumes, Scratch
from voxquilt.stitching.products.base import Product, check_finite, compute
from voxquilt.stitching.products.labels import ArgMax, contenders
from voxquilt.stitching.products.spec import ProductSpec
from voxquilt.stitching.streaming import FinishedPlanes

# Voxels along an edge of the boxes in which labels are made of interpolated scores: small enough that most boxes have
# few competing classes, and large enough that there are few boxes.
_TILE = 32


@dataclass(frozen=True)
class NativeGrid:
    """The mapping from finished planes of an output to native space.

    Args:
        maps: Maps from native voxels to the scores.
        axis: The scores' axis along which planes come.
        shape: Voxels of the scores along i, j, k.
        channels: Channels of the scores.
        planes: The scores' planes that are finished here; the plane behind them comes too.
        holds_all: Whether volumes are whole, with room for the planes of other processes.
        scratch: Where volumes that are too large for memory are kept.
    """

    maps: AxisMaps
    axis: int
    shape: Triple
    channels: int
    planes: range
    holds_all: bool
    scratch: Scratch | None

    @property
    def copies(self) -> bool:
        """Whether native voxels are voxels of the scores, and nothing is interpolated."""
        return not any(m.neighbours(self.shape[m.axis])[2].any() for m in self.maps)

    @property
    def read(self) -> Where:
        """The voxels of the scores that are read: those outside the padding."""
        slices = {m.axis: slice(*(m.within or (0, self.shape[m.axis]))) for m in self.maps}
        return slices[0], slices[1], slices[2]

    def make_restorer(self, *, linear: bool = True, tile: int | None = None) -> Restorer:
        """A restorer of planes to native space."""
        return Restorer(self.maps, self.axis, self.shape, linear=linear, tile=tile, planes=self.planes)

    def make_volumes(self, products: Mapping[str, Product], restorer: Restorer) -> OutputVolumes:
        """Volumes for products of the voxels that a restorer hands out."""
        i, j, k = (m.size for m in self.maps)
        return OutputVolumes(
            products,
            self.channels,
            (i, j, k),
            restorer.axis,
            self.scratch,
            planes=restorer.native,
            holds_all=self.holds_all,
        )


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
            for piece in self.restorer.feed(start, planes):
                for name, voxels in self.after(piece):
                    self.volumes.store(name, piece.where, voxels)


class NativeProducts:
    """Turns finished planes of one blend into products in native space.

    Args:
        specs: The products by name, which are all computed from the same averages.
        grid: The mapping to native space.

    Raises:
        OutputError: (when called) scores that are NaN or infinite.
    """

    def __init__(self, specs: Mapping[str, ProductSpec], grid: NativeGrid) -> None:
        self._paths = list(_paths(specs, grid))

    def __call__(self, finished: FinishedPlanes) -> None:
        for path in self._paths:
            path(finished)

    @property
    def volumes(self) -> dict[str, OutputVolumes]:
        """Where each product is kept."""
        return {name: path.volumes for path in self._paths for name in path.volumes.arrays}


def _paths(specs: Mapping[str, ProductSpec], grid: NativeGrid) -> Iterator[ProductPath]:
    for name, spec in specs.items():
        if spec.in_model:
            restorer = grid.make_restorer(linear=spec.product.form(grid.channels)[1].kind == "f")
            volumes = grid.make_volumes({name: spec.product}, restorer)
            yield ProductPath(
                _InModel(spec.product, grid.channels, grid.read), restorer, _OfModelProduct(name), volumes
            )
    of_scores = {name: spec.product for name, spec in specs.items() if not spec.in_model}
    if not of_scores:
        return
    if grid.copies or not all(isinstance(product, ArgMax) for product in of_scores.values()):
        restorer, after = grid.make_restorer(), _OfScores(of_scores, grid.channels)
    else:
        restorer, after = grid.make_restorer(tile=_TILE), _Labels(list(of_scores))
    yield ProductPath(_scores_of, restorer, after, grid.make_volumes(of_scores, restorer))


def _scores_of(finished: FinishedPlanes) -> Iterable[tuple[int, Tensor]]:
    return [(finished.start, finished.scores)]


@dataclass(frozen=True)
class _InModel:
    """Computes a product in model space; scores outside `read` are not checked."""

    product: Product
    channels: int
    read: Where

    def __call__(self, finished: FinishedPlanes) -> Iterator[tuple[int, Tensor]]:
        # A few planes at a time, which stay in the cache.
        axis, stop = finished.axis, finished.stop
        step = max(1, 2**22 * (stop - finished.start) // finished.scores.numel())
        for start in range(finished.start, stop, step):
            planes = finished.scores.narrow(axis + 1, start - finished.start, min(step, stop - start))
            along, where = self.read[axis], list(self.read)
            where[axis] = slice(max(along.start - start, 0), max(along.stop - start, 0))
            check_finite(planes[:, *where])
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

    def __call__(self, piece: Piece) -> Iterator[tuple[str, Tensor]]:
        scores = piece.restored()
        check_finite(scores)
        for name, product in self.products.items():
            yield name, compute(product, scores, self.channels)


@dataclass(frozen=True)
class _Labels:
    """Computes the arg-max of interpolated scores, of only those classes that can have the highest in a piece."""

    names: list[str]

    def __call__(self, piece: Piece) -> Iterator[tuple[str, Tensor]]:
        channels = contenders(piece.source)
        if len(channels) == 1:
            labels = channels.reshape(1, 1, 1, 1)
        else:
            labels = channels[ArgMax()(piece.restored(channels)).long()]
        for name in self.names:
            yield name, labels
