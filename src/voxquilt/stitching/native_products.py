"""What becomes of finished planes? Products, on their way to native space."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from voxquilt.geometry.frame import Triple
from voxquilt.geometry.space import AxisMaps, Where
from voxquilt.geometry.streamed_resample import Piece, Restorer
from voxquilt.stitching.output_volumes import OutputVolumes, Scratch
from voxquilt.stitching.products.base import Kept, Product, check_finite
from voxquilt.stitching.products.labels import ArgMax, contenders
from voxquilt.stitching.products.spec import ProductSpec
from voxquilt.stitching.streaming import FinishedPlanes

# Voxels along an edge of the boxes in which labels are made of interpolated scores: small, so that few classes compete
# in most of them, and large enough that there are few boxes.
_TILE = 32


@dataclass(frozen=True)
class NativeGrid:
    """From finished planes of an output to native space.

    Args:
        maps: From native voxels into the scores.
        axis: The scores' axis along which planes come.
        shape: Voxels of the scores along i, j, k.
        channels: Of the scores.
        planes: The scores' planes that are finished here; the one behind them comes, too.
        whole: Whether volumes have room for what is finished elsewhere.
        scratch: For volumes that are too large.
    """

    maps: AxisMaps
    axis: int
    shape: Triple
    channels: int
    planes: range
    whole: bool
    scratch: Scratch | None

    @property
    def copies(self) -> bool:
        """Whether native voxels are voxels of the scores, and nothing is interpolated."""
        return not any(m.neighbours(self.shape[m.axis])[2].any() for m in self.maps)

    @property
    def read(self) -> Where:
        """The voxels of the scores that are read: not those of the padding."""
        slices = {m.axis: slice(*(m.within or (0, self.shape[m.axis]))) for m in self.maps}
        return slices[0], slices[1], slices[2]

    def restorer(self, *, linear: bool = True, tile: int | None = None) -> Restorer:
        """Brings planes to native space."""
        return Restorer(self.maps, self.axis, self.shape, linear=linear, tile=tile, planes=self.planes)

    def volumes(self, products: Mapping[str, Product], restorer: Restorer) -> OutputVolumes:
        """Room for what the restorer hands out."""
        i, j, k = (m.size for m in self.maps)
        return OutputVolumes(
            products,
            self.channels,
            (i, j, k),
            restorer.axis,
            self.scratch,
            planes=restorer.native,
            whole=self.whole,
        )


@dataclass(frozen=True)
class ProductPath:
    """How some products come out of finished planes.

    Args:
        before: What is computed of a slab in model space, a few planes at a time.
        restorer: Brings that to native space.
        after: What is made of a piece there for the volumes.
        volumes: Where products are computed and kept.
    """

    before: Callable[[FinishedPlanes], Iterable[tuple[int, Tensor]]]
    restorer: Restorer
    after: Callable[[Piece], Tensor]
    volumes: OutputVolumes

    def __call__(self, slab: FinishedPlanes) -> None:
        """Take a slab."""
        for start, planes in self.before(slab):
            for piece in self.restorer.feed(start, planes):
                self.volumes.fill(piece.where, self.after(piece))


class NativeProducts:
    """What happens to finished planes of one blend: into products, and back to native space.

    Raises:
        OutputError: (when called) scores that are NaN or infinite.
    """

    def __init__(self, recipes: Mapping[str, ProductSpec], back: NativeGrid) -> None:
        self._courses = list(_courses(recipes, back))

    def __call__(self, slab: FinishedPlanes) -> None:
        for course in self._courses:
            course(slab)

    @property
    def volumes(self) -> dict[str, OutputVolumes]:
        """By product, where it is kept."""
        return {name: course.volumes for course in self._courses for name in course.volumes.arrays}


def _courses(recipes: Mapping[str, ProductSpec], back: NativeGrid) -> Iterator[ProductPath]:
    for name, recipe in recipes.items():
        if recipe.in_model:
            restorer = back.restorer(linear=recipe.product.form(back.channels)[1].kind == "f")
            volumes = back.volumes({name: Kept(recipe.product)}, restorer)
            yield ProductPath(_Computed(recipe.product, back.read), restorer, Piece.restored, volumes)
    of_scores = {name: recipe.product for name, recipe in recipes.items() if not recipe.in_model}
    if not of_scores:
        return
    if back.copies or not all(isinstance(product, ArgMax) for product in of_scores.values()):
        restorer = back.restorer()
        yield ProductPath(_as_it_is, restorer, _scores, back.volumes(of_scores, restorer))
    else:
        restorer = back.restorer(tile=_TILE)
        labels = {name: Kept(product) for name, product in of_scores.items()}
        yield ProductPath(_as_it_is, restorer, _best, back.volumes(labels, restorer))


def _as_it_is(slab: FinishedPlanes) -> Iterable[tuple[int, Tensor]]:
    return [(slab.start, slab.scores)]


@dataclass(frozen=True)
class _Computed:
    """A product of a slab in model space; what lies outside `read` is not looked at."""

    product: Product
    read: Where

    def __call__(self, slab: FinishedPlanes) -> Iterator[tuple[int, Tensor]]:
        # A few planes at a time, which stay in the cache.
        step = max(1, 2**22 * (slab.stop - slab.start) // slab.scores.numel())
        for start in range(slab.start, slab.stop, step):
            planes = slab.scores.narrow(slab.axis + 1, start - slab.start, min(step, slab.stop - start))
            along, where = self.read[slab.axis], list(self.read)
            where[slab.axis] = slice(max(along.start - start, 0), max(along.stop - start, 0))
            check_finite(planes[:, *where])
            yield start, self.product(planes)


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
