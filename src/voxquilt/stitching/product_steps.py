"""Provides the steps from finished planes to products: before and after they are brought to native space."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from voxquilt.geometry.space import Where
from voxquilt.geometry.streamed_resample import Piece
from voxquilt.stitching.finite_check import FiniteCheck
from voxquilt.stitching.products.base import Activation, Product, compute
from voxquilt.stitching.products.labels import ArgMax, contenders
from voxquilt.stitching.streaming import FinishedPlanes


@dataclass(frozen=True)
class Interpolated:
    """Gives the values of finished planes that are interpolated: the scores, or their activation."""

    activation: Activation | None

    def __call__(self, finished: FinishedPlanes) -> Iterable[tuple[int, Tensor]]:
        scores = finished.scores
        return [(finished.start, scores if self.activation is None else self.activation(scores))]

    def of_voxel(self, scores: list[float]) -> list[float]:
        """The same for the scores of one voxel."""
        if self.activation is None:
            return scores
        return self.activation(torch.tensor(scores).reshape(-1, 1, 1, 1)).flatten().tolist()


@dataclass(frozen=True)
class InModel:
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
class OfModelProduct:
    """Interpolates a product that was computed in model space."""

    name: str

    def __call__(self, piece: Piece) -> Iterator[tuple[str, Tensor]]:
        yield self.name, piece.restored()


@dataclass(frozen=True)
class OfScores:
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
class LabelsOfScores:
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
            labels = channels[_arg_max(piece.restored(contend)).long()]
        for name in self.names:
            yield name, labels


def _arg_max(scores: Tensor) -> Tensor:
    """The arg-max of scores whose axes may lie in memory in another order, in which it is computed fastest."""
    order = [0, *sorted((1, 2, 3), key=lambda n: -scores.stride(n))]
    return ArgMax()(scores.permute(order)).permute([order.index(n) for n in range(4)])
