"""Compares the products of scores that are linear in an image with what they are by definition."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from voxquilt.errors import VoxquiltError
from voxquilt.selfcheck.comparison import Rounding, beside, inside_of, read_output, splines_of
from voxquilt.selfcheck.findings import Finding, world
from voxquilt.selfcheck.images import Channel
from voxquilt.selfcheck.networks import OutputForm, class_scores, largest_score
from voxquilt.selfcheck.reference import AxisWay, Way, axis_ways, corners_of
from voxquilt.selfcheck.stand_in import EPS, ROUNDINGS
from voxquilt.stitching.products.spec import ProductSpec
from voxquilt.stitching.stitch import Stitch
from voxquilt.vocabulary import LABELS, MAP

# Voxels at which products are compared: as many values as these, whatever the number of classes.
_VALUES = 4_000_000


def compare_products(
    outputs: Mapping[str, Sequence[Path]],
    specs: Mapping[str, ProductSpec],
    stitch: Stitch,
    way: Way,
    rounding: Rounding,
    channel: Channel,
    form: OutputForm,
    output: str,
    span: tuple[float, float],
    averaged: Callable[[torch.Tensor], torch.Tensor] | None,
    *,
    ends_activated: bool,
) -> list[Finding] | None:
    """Whether products of scores that are linear in the image are what they are by definition, at a sample of voxels.

    Args:
        outputs: The files of each product.
        specs: How each is computed.
        stitch: How labels are numbered.
        way: How the subject went to model space and back.
        rounding: What the run rounds.
        channel: What the image is.
        form, output: The network's outputs, and which of them this is.
        span: The image's values at which the first and the last class win.
        averaged: The activation of scores before they are averaged; None without one.
        ends_activated: See MakeClasses.
    """
    try:
        ways = axis_ways(way)
    except ValueError as error:
        return [Finding("products", problem=f"{error}.")]
    classes = form.channels[output]
    voxels = sample(inside_of(way, ways), _VALUES // (8 * classes))
    if voxels is None:
        return None
    scores = ScoresAt(voxels, way, ways, rounding, channel, classes, span, averaged, ends_activated)
    found = []
    for name, paths in outputs.items():
        wanted = scores.candidates(specs[name])
        if isinstance(wanted, str):
            found.append(Finding(f"{name}: its values", problem=wanted))
        else:
            found.append(_compare_product(name, paths, specs[name], classes, stitch, voxels, wanted))
    return found


@dataclass(frozen=True)
class ScoresAt:
    """The scores of a linear image at some voxels.

    Args:
        voxels: (p, 3) native voxels.
        way: How the subject went to model space and back.
        ways: The same along each axis.
        rounding: What the run rounds.
        channel: What the image is.
        classes: Channels of the scores.
        span: The image's values at which the first and the last class win.
        averaged, ends_activated: See `compare_products`.
    """

    voxels: np.ndarray
    way: Way
    ways: Sequence[AxisWay]
    rounding: Rounding
    channel: Channel
    classes: int
    span: tuple[float, float]
    averaged: Callable[[torch.Tensor], torch.Tensor] | None
    ends_activated: bool

    def is_known(self, spec: ProductSpec) -> bool:
        """Whether a product is known: splines bring back what is linear, and nothing else."""
        is_bent = self.averaged is not None or (self.ends_activated and self.classes > 1)
        return self.way.is_all_linear or not (is_bent or spec.in_model or spec.interpolated)

    def candidates(self, spec: ProductSpec) -> list[list[np.ndarray]] | str:
        """The (c, p) values that a product may have, the right ones first; or why there is no such product.

        Several where rounding, or the nearest voxel in the place of interpolation, may lead to others. Of labels that
        are resampled, each item has those of all corners.
        """
        positions, weights = corners_of(self.voxels, self.ways)
        image, span, classes, channel = self.channel.at(positions), self.span, self.classes, self.channel
        # In the unit of the image: what rounding changes, and what the nearest voxel in place of interpolation does.
        nearest = beside(channel, self.ways)
        extent = abs(span[1] - span[0])
        # Beyond its span, scores of classes grow on.
        beyond = max(1.0, float(np.abs(image - (span[0] + span[1]) / 2).max()) / (extent / 2))
        in_scores = self.rounding.of(largest_score(classes) * beyond)
        in_scores = in_scores / (8 if classes == 1 else max(classes - 1, 1)) * extent
        width = self.rounding.of(np.abs(image).max(), sum(map(abs, channel.slope)))
        width = float(width + channel.unknown(splines_of(self.way)) + nearest + in_scores)
        # Half a class apart, so that each label that rounding can make is among them; the middle is the right one.
        steps = min(20, int(np.ceil(2 * width * max(1, classes - 1) / extent)))
        shifts = sorted({0.0, *np.linspace(-width, width, 2 * steps + 1).tolist()}, key=abs)
        # Scores are rounded each by itself, which shows where a product is stationary along the image.
        bend = float(self.rounding.of(1.0 if self.ends_activated else largest_score(classes) * beyond))
        bends = () if spec.product.kind == LABELS or classes == 1 else (-bend, bend)
        found: list[list[np.ndarray]] = []
        for shift, bent in [*((shift, 0.0) for shift in shifts), *((0.0, bent) for bent in bends)]:
            values = _product_of(
                image + shift, weights, classes, span, spec, self.averaged, self.ends_activated, bent
            )  # fmt: skip
            if isinstance(values, str):
                return values
            found.append(values)
        return found


def _product_of(
    image: np.ndarray,
    weights: np.ndarray,
    classes: int,
    span: tuple[float, float],
    spec: ProductSpec,
    averaged: Callable[[torch.Tensor], torch.Tensor] | None,
    ends_activated: bool,
    bend: float,
) -> list[np.ndarray] | str:
    """A product at voxels whose corners have (p, 8) image values; `bend` changes scores of classes up and down in turn.

    Returns:
        (c, p) values; of labels that are resampled, those of each corner. Or why there is no such product.
    """
    scores = class_scores(torch.from_numpy(image)[None], classes, *span, 0, ends_activated)[..., None]  # (c, p, 8, 1)
    if bend:
        scores = scores + bend * (1 - 2 * (torch.arange(classes) % 2))[:, None, None, None]
    if averaged is not None:
        scores = averaged(scores[None])[0]
    try:
        if spec.averaged is not None:  # all patches give the same
            moments = spec.averaged(scores[None])[0]
            return [_weighted(spec.product(moments), weights)]
        if spec.in_model:
            values = spec.product(scores)
            if spec.product.kind != LABELS:
                return [_weighted(values, weights)]
            return [values[:, :, n, 0].double().numpy() for n in range(8) if (weights[:, n] > 1e-9).any()]
        values = scores if spec.interpolated is None else spec.interpolated(scores)
        mean = (values.double() * torch.from_numpy(weights)[None, ..., None]).sum(2, keepdim=True)
        return [spec.product(mean)[:, :, 0, 0].double().numpy()]
    except VoxquiltError as error:
        return str(error)


def _weighted(values: torch.Tensor, weights: np.ndarray) -> np.ndarray:
    return (values[..., 0].double().numpy() * weights[None]).sum(-1)


def _compare_product(
    name: str,
    paths: Sequence[Path],
    spec: ProductSpec,
    classes: int,
    stitch: Stitch,
    voxels: np.ndarray,
    wanted: Sequence[Sequence[np.ndarray]],
) -> Finding:
    """A product's files against the (c, p) values that it may have."""
    kind = spec.product.kind
    check = f"{name}: {'its labels' if kind == LABELS else 'its values'}"
    read = [read_output(path) for path in paths]
    given = np.concatenate([values for values, *_ in read])
    _, affine, slope = read[0]
    given = given[:, voxels[:, 0], voxels[:, 1], voxels[:, 2]].astype(np.float64)
    choices = [numbered(values, stitch) if kind == LABELS else values for group in wanted for values in group]
    if choices[0].shape[0] != len(given):
        return Finding(check, problem=f"{paths[0].name} has {len(given)} channels; wanted are {choices[0].shape[0]}.")
    if kind == LABELS:
        error = np.min([np.abs(given - values) for values in choices], 0)
        error = np.where(error > 0, 1.0, 0.0)
        allowed = np.full(error.shape, 0.5)
    else:
        middle = wanted[0][0]
        spread = np.max([np.abs(values - middle) for values in choices], 0)
        error = np.abs(given - middle)
        allowed = 2 * spread + 4 * ROUNDINGS * EPS * np.maximum(1.0, np.abs(middle))
        kept = np.dtype(spec.product.form(classes)[1])
        if kept.kind in "iu":
            allowed = allowed + 0.5001 * slope
        elif kept == np.float16:  # which NIfTI has not: the file holds float32
            allowed = allowed + np.abs(middle) * 2.0**-11 + 2.0**-25
        if kind == MAP and spec.averaged is not None:  # a difference of squares, which cancels
            allowed = allowed + 8 * ROUNDINGS * EPS
    worst = np.unravel_index(np.nan_to_num(error / allowed, nan=np.inf).argmax(), error.shape)
    voxel = tuple(int(n) for n in voxels[worst[1]])
    found = Finding(check, float(error[worst]), float(allowed[worst]), "", voxel, world(affine, voxel))
    if kind == LABELS and not found.ok:
        wrong = int(error.any(0).sum())
        label, right = given[worst], wanted[0][0]
        right = numbered(right, stitch)[worst]
        return Finding(
            check,
            problem=f"{wrong} of {len(voxels)} voxels have the wrong label; voxel {voxel} has {label:g} in place of "
            f"{right:g}.",
        )
    return found


def numbered(classes: np.ndarray, stitch: Stitch) -> np.ndarray:
    """Labels as files have them, of the classes of a product."""
    classes = classes.astype(np.int64)
    if stitch.label_values is not None:
        classes = np.array(stitch.label_values)[classes]
    if stitch.kept is not None:
        classes = np.where(np.isin(classes, sorted(stitch.kept)), classes, 0)
    return classes.astype(np.float64)


def sample(inside: Sequence[np.ndarray], count: int) -> np.ndarray | None:
    """(p, 3) voxels at random, where the reference holds; None if it does nowhere."""
    draw = np.random.default_rng(0)
    choices = [np.flatnonzero(along) for along in inside]
    if not all(map(len, choices)):
        return None
    return np.stack([draw.choice(along, max(1, min(count, 20_000))) for along in choices], 1)
