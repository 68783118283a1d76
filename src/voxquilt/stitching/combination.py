"""Combines the volumes that several models made of one subject: labels in order, or the mean of probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Shaped

from voxquilt.errors import OutputError
from voxquilt.stitching.finished_volume import FinishedVolume
from voxquilt.stitching.label_values import iterate_planes, to_labels
from voxquilt.stitching.products.base import compute
from voxquilt.stitching.products.encoded import encoded, slope_of
from voxquilt.stitching.products.labels import classes_of
from voxquilt.stitching.products.spec import default_activation, make_products
from voxquilt.stitching.stitch import Stitch
from voxquilt.vocabulary import LABELS, MEAN, ORDERED

Volumes = dict[str, Shaped[np.ndarray, "c i j k"]]
"""Finished volumes in native space, by product."""


@dataclass(frozen=True)
class Combination:
    """How the volumes of several models become those of the run.

    With `combine='ordered'`, labels are put together: those of a later model replace those of earlier ones, wherever
    they are not 0. With 'mean', probabilities are averaged in native space, and all products are made of these.

    Args:
        stitch: What is written of the whole, and `combine`.
        stitches: How each model's patches become volumes.
        numbers: With 'ordered', the number in the whole of each label 0, 1, ... of each model; 0 leaves it out, and so
            are the labels after the last.
    """

    stitch: Stitch
    stitches: tuple[Stitch, ...]
    numbers: tuple[tuple[int, ...], ...] = ()

    def begin(self) -> "OrderedLabels | MeanProbabilities":
        """The volumes of a subject, before the first model's are added."""
        return MeanProbabilities(self) if self.stitch.combine == MEAN else OrderedLabels(self)


@dataclass
class OrderedLabels:
    """The labels of a subject so far."""

    combination: Combination
    _labels: np.ndarray | None = field(default=None, init=False)

    def add(self, model: int, volumes: Volumes) -> None:
        """Add a model's labels, whose array may be kept and changed.

        Raises:
            OutputError: a model's labels are not one label per voxel.
        """
        labels = volumes[LABELS]
        if len(labels) != 1:
            raise OutputError(f"stitch.combine={ORDERED} takes one label per voxel; model {model} gives {len(labels)}.")
        numbers = self.combination.numbers[model]
        dtype = np.min_scalar_type(max(max(table) for table in self.combination.numbers))
        table = np.array(numbers, dtype)
        if self._labels is None:
            self._labels = np.zeros_like(labels, dtype=dtype)
        for own, into in zip(iterate_planes(labels), iterate_planes(self._labels), strict=True):
            if own.max() >= len(table):
                table = np.pad(table, (0, int(own.max()) + 1 - len(table)))
            mapped = table[own]
            np.copyto(into, mapped, where=mapped != 0)

    def finish(self) -> dict[str, FinishedVolume]:
        """The volumes of the subject."""
        assert self._labels is not None
        stitch = self.combination.stitch
        labels = to_labels(self._labels, stitch.postprocess)
        return {LABELS: FinishedVolume(labels, LABELS, len(stitch.numbers or ()))}


@dataclass
class MeanProbabilities:
    """The sum of the probabilities of a subject so far."""

    combination: Combination
    _total: np.ndarray | None = field(default=None, init=False)
    _count: int = field(default=0, init=False)

    def add(self, model: int, volumes: Volumes) -> None:
        """Add a model's probabilities, whose array may be kept and changed.

        Raises:
            OutputError: models give different numbers of classes.
        """
        (probabilities,) = volumes.values()
        if self._total is None:
            self._total = probabilities
        elif self._total.shape != probabilities.shape:
            raise OutputError(
                f"stitch.combine={MEAN}: model {model} gives {len(probabilities)} classes, those before "
                f"{len(self._total)}."
            )
        else:
            self._total += probabilities
        self._count += 1

    def finish(self) -> dict[str, FinishedVolume]:
        """The volumes of the subject.

        Raises:
            OutputError: a product that cannot be made of probabilities.
        """
        assert self._total is not None
        mean, stitch = self._total, self.combination.stitch
        mean /= self._count
        channels = len(mean)
        # They are probabilities already: what would be made of scores by soft-max is made of them as they are.
        activation = stitch.activation or default_activation(channels)
        applied = {"softmax": "applied", "sigmoid": "applied_sigmoid"}.get(activation, activation)
        wanted = stitch.products
        if not isinstance(wanted, Sequence | None):
            raise OutputError(f"stitch.combine={MEAN}: stitch.products is a list; models have one output each.")
        specs = make_products(
            wanted, channels, applied, stitch.threshold, "scores", stitch.label_values, stitch.regions,
            dtype=stitch.dtype,
        )  # fmt: skip
        volumes: dict[str, FinishedVolume] = {}
        for name, spec in specs.items():
            if spec.averaged is not None:
                raise OutputError(f"stitch.combine={MEAN}: {name} cannot be made of mean probabilities.")
            count, dtype = spec.product.form(channels)
            volume = np.empty((count, *mean.shape[:0:-1]), dtype).transpose(0, 3, 2, 1)
            # Plane by plane along the slowest axis, so that what is computed stays small.
            for k in range(mean.shape[3]):
                plane = torch.from_numpy(np.ascontiguousarray(mean[..., k : k + 1]))
                volume[..., k : k + 1] = encoded(spec.product, compute(spec.product, plane, channels)).numpy()
            if spec.product.kind == LABELS:
                volume = stitch.to_labels(volume)
            described = spec.product.kind, classes_of(spec.product, channels), slope_of(spec.product)
            volumes[name] = FinishedVolume(volume, *described)
        return volumes
