"""Judges what several models' volumes became together: labels in order, or the mean of probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from voxquilt.models.patch_network import to_activation
from voxquilt.selfcheck.comparison import inside_of, read_output
from voxquilt.selfcheck.findings import Finding, Findings, world
from voxquilt.selfcheck.images import CLASSES, Channel
from voxquilt.selfcheck.preparation import Prepared
from voxquilt.selfcheck.product_comparison import ScoresAt, numbered, sample
from voxquilt.selfcheck.reference import axis_ways
from voxquilt.selfcheck.results import Round
from voxquilt.stitching.products.spec import default_activation
from voxquilt.stitching.stitch import Stitch
from voxquilt.vocabulary import LABELS, MEAN

_VALUES = 1_000_000
_CHECK = "the models together"


@dataclass(frozen=True)
class CombinedRound:
    """A run of all models that has ended.

    Args:
        ended: The run: its files, and what was written.
        rounds: What each model's processes have seen, and how its patches became volumes.
        spans: The image's values at which each model's first and last class win.
        channel: What the image is.
        numbers: With `stitch.combine=ordered`, what each model's labels 0, 1, ... become; 0 leaves one out.
    """

    ended: Round
    rounds: Sequence[Round]
    spans: Sequence[tuple[float, float]]
    channel: Channel
    numbers: Sequence[Sequence[int]]


def divided_span(span: tuple[float, float], count: int) -> list[tuple[float, float]]:
    """Parts of equal size of the values of an image, in ascending order."""
    ends = np.linspace(*span, count + 1).tolist()
    return list(pairwise(ends))


def judge_combined(findings: Findings, combined: CombinedRound, prepared: Sequence[Prepared]) -> None:
    """What was written of all models, against what is to be made of what each of them gives."""
    failed = combined.ended.failed([CLASSES])
    if failed:
        findings.found.append(Finding(_CHECK, problem=failed[CLASSES]))
        return
    stitch = combined.ended.stitch
    product = "probabilities" if stitch.combine == MEAN else LABELS
    scores = _scores(combined, prepared)
    if isinstance(scores, str):
        findings.unchecked.append(f"stitch.combine: {scores}")
        return
    wanted: list[list[np.ndarray]] = []  # by model, the (c, p) values that its volume may have
    for one, of_model in zip(combined.rounds, scores, strict=True):
        specs = dict(spec for _, of_blend in one.stitch.specs("", of_model.classes) for spec in of_blend.items())
        if not of_model.is_known(specs[product]):
            findings.unchecked.append("stitch.combine: a model is not interpolated linearly")
            return
        found = of_model.candidates(specs[product])
        if isinstance(found, str):
            findings.found.append(Finding(_CHECK, problem=found))
            return
        wanted.append([values for group in found for values in group])
    voxels = scores[0].voxels
    if stitch.combine == MEAN:
        findings.found += _compare_mean(combined.ended, wanted, voxels)
        left = [name for name in _products_of(stitch) if name not in (LABELS, "probabilities", "entropy")]
        findings.unchecked += [f"{name} of the mean of several models" for name in left]
    else:
        stitches = [one.stitch for one in combined.rounds]
        findings.found.append(_compare_ordered(combined, wanted, stitches, voxels))


def _products_of(stitch: Stitch) -> Sequence[str]:
    return [name for name in stitch.products or () if isinstance(name, str)]


def _scores(combined: CombinedRound, prepared: Sequence[Prepared]) -> list[ScoresAt] | str:
    """The scores of each model at the same voxels, or why they are not known."""
    ways = [one.way(CLASSES) for one in combined.rounds]
    along = [axis_ways(way) for way in ways]
    insides = [inside_of(*pair) for pair in zip(ways, along, strict=True)]
    classes = [next(iter(own.form.channels.values())) for own in prepared]
    inside = [np.logical_and.reduce([one[axis] for one in insides]) for axis in range(3)]
    voxels = sample(inside, _VALUES // (8 * max(classes)))
    if voxels is None:
        return "no voxel is within the boxes of all models"
    scores: list[ScoresAt] = []
    for n, one in enumerate(combined.rounds):
        averages = one.options.get("average") == "probabilities"
        averaged = to_activation(one.options.get("activation")) if averages else None
        scores.append(
            ScoresAt(
                voxels, ways[n], along[n], one.rounding(1), combined.channel, classes[n], combined.spans[n], averaged,
                one.ends_activated,
            )
        )  # fmt: skip
    return scores


def _compare_ordered(
    combined: CombinedRound, wanted: Sequence[list[np.ndarray]], stitches: Sequence[Stitch], voxels: np.ndarray
) -> Finding:
    """Labels: those of a later model in the place of an earlier one's, wherever they are not 0."""
    together = np.zeros(len(voxels), np.int64)
    certain = np.ones(len(voxels), bool)
    for values, stitch, numbers in zip(wanted, stitches, combined.numbers, strict=True):
        labels = [numbered(one, stitch)[0].astype(np.int64) for one in values]
        table = np.zeros(max(len(numbers), *(int(one.max()) + 1 for one in labels)), np.int64)
        table[: len(numbers)] = numbers
        mapped = [table[one] for one in labels]
        certain &= np.logical_and.reduce([one == mapped[0] for one in mapped])
        together = np.where(mapped[0] > 0, mapped[0], together)
    return _labels_finding(combined.ended, together, certain, voxels)


def _compare_mean(ended: Round, wanted: Sequence[list[np.ndarray]], voxels: np.ndarray) -> list[Finding]:
    """The mean of probabilities, and the labels that are the most probable."""
    middle = np.mean([values[0] for values in wanted], 0)
    spread = np.mean([np.max([np.abs(one - values[0]) for one in values], 0) for values in wanted], 0)
    allowed = 2 * spread + 1e-4
    found = []
    if paths := ended.files_of(CLASSES, "probabilities"):
        read = [read_output(path) for path in paths]
        given = np.concatenate([values for values, *_ in read])[:, voxels[:, 0], voxels[:, 1], voxels[:, 2]]
        error = np.nan_to_num(np.abs(given - middle), nan=np.inf)
        limit = allowed + (0.51 / 255 if ended.stitch.dtype == "uint8" else 2.0**-11)
        worst = np.unravel_index((error / limit).argmax(), error.shape)
        voxel = tuple(int(n) for n in voxels[worst[1]])
        where = world(read[0][1], voxel)
        found.append(
            Finding(f"{_CHECK}: mean probabilities", float(error[worst]), float(limit[worst]), "", voxel, where)
        )
    activation = ended.stitch.activation or default_activation(len(middle))
    if paths := ended.files_of(CLASSES, "entropy"):
        each = len(middle) == 1 or activation == "sigmoid"
        found.append(_compare_entropy(ended, paths, middle, allowed, voxels, each=each))
    if activation == "softmax" and not ended.stitch.regions and ended.files_of(CLASSES, LABELS):
        ordered = np.sort(middle, 0)
        certain = ordered[-1] - ordered[-2] > 2 * allowed.max(0)
        labels = numbered(middle.argmax(0)[None], ended.stitch)[0].astype(np.int64)
        found.append(_labels_finding(ended, labels, certain, voxels))
    return found


def _compare_entropy(
    ended: Round, paths: Sequence[Path], middle: np.ndarray, allowed: np.ndarray, voxels: np.ndarray, *, each: bool
) -> Finding:
    """The entropy of mean probabilities, between the least and the most that these leave.

    Args:
        ended: The run.
        paths: The files.
        middle, allowed: (c, p) probabilities, and how far they may be off.
        voxels: (p, 3) where.
        each: Whether each channel is a label of its own.
    """
    terms = [_entropy_terms(np.clip(p, 0, 1), each=each) for p in (middle - allowed, middle, middle + allowed)]
    least, most = np.minimum(terms[0], terms[2]), np.maximum(terms[0], terms[2])
    peak = 0.5 if each else np.exp(-1)
    most = np.where(np.abs(middle - peak) < allowed, _entropy_terms(np.full(1, peak), each=each), most)
    wanted = terms[1] if each else terms[1].sum(0)[None]
    least, most = (one if each else one.sum(0)[None] for one in (least, most))
    limit = np.maximum(most - wanted, wanted - least)
    limit = limit + np.log(2 if each else len(middle)) * (0.51 / 255 if ended.stitch.dtype == "uint8" else 2.0**-11)
    read = [read_output(path) for path in paths]
    given = np.concatenate([values for values, *_ in read])[:, voxels[:, 0], voxels[:, 1], voxels[:, 2]]
    error = np.nan_to_num(np.abs(given - wanted), nan=np.inf)
    worst = np.unravel_index((error / limit).argmax(), error.shape)
    voxel = tuple(int(n) for n in voxels[worst[1]])
    where = world(read[0][1], voxel)
    return Finding(f"{_CHECK}: their entropy", float(error[worst]), float(limit[worst]), "", voxel, where)


def _entropy_terms(p: np.ndarray, *, each: bool) -> np.ndarray:
    """What probabilities add to the entropy in nats; with `each`, the entropy of their yes or no."""
    logs = np.log(p, where=p > 0, out=np.zeros_like(p))
    if not each:
        return -p * logs
    return -p * logs - (1 - p) * np.log(1 - p, where=p < 1, out=np.zeros_like(p))


def _labels_finding(ended: Round, wanted: np.ndarray, certain: np.ndarray, voxels: np.ndarray) -> Finding:
    """Of labels where rounding decides about none."""
    check = f"{_CHECK}: their labels"
    (path,) = ended.files_of(CLASSES, LABELS)
    given, *_ = read_output(path)
    given = given[0, voxels[:, 0], voxels[:, 1], voxels[:, 2]]
    wrong = np.flatnonzero(certain & (given != wanted))
    if not certain.any():
        return Finding(check, problem="rounding decides about every label")
    if not len(wrong):
        return Finding(check)
    voxel = tuple(int(n) for n in voxels[wrong[0]])
    return Finding(
        check,
        problem=f"{len(wrong)} of {int(certain.sum())} voxels have the wrong label; voxel {voxel} has "
        f"{given[wrong[0]]:g} in place of {wanted[wrong[0]]}.",
    )
