"""Resamples label maps: the share that each label has of a voxel is interpolated, and the largest share wins."""

from dataclasses import replace
from itertools import product

import torch
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.geometry.axis_map import AxisMaps
from voxquilt.geometry.resample import resample

# Interpolation by float32 weights is off by less, so that shares further apart than this are in the right order.
_CLOSE = 1e-5
# Voxels that are decided anew at a time: each takes some 200 bytes.
_VOXELS = 2**20


def resample_labels(
    source: Shaped[Tensor, "c si sj sk"], maps: AxisMaps, *, half: bool = False
) -> Shaped[Tensor, "c ti tj tk"]:
    """Resample labels: each label's voxels are interpolated as 1 among 0, and the label of the largest value is taken.

    Where several are the largest, the nearest voxel's label is taken if it is one of them, else the smallest: as
    batchgenerators' `resize_segmentation` does, by which nnU-Net resamples. What is level but for rounding is decided
    by rounding there, and here by the same.

    Args:
        source: The labels.
        maps: Maps from the target's voxels to the source's; those of order 0 take the nearest voxel.
        half: Whether shares count in half precision, in thousandths, and the smallest label wins where several are
            level: as nnU-Net's `resample_torch_fornnunet` has it.
    """
    nearest = resample(source, tuple(replace(m, order=0) for m in maps))  # type: ignore[arg-type]
    if all(m.order == 0 for m in maps):
        return nearest
    best = torch.full(nearest.shape, -1.0, dtype=torch.float64)
    labels, is_close = nearest.clone(), torch.zeros(nearest.shape, dtype=torch.bool)
    for value in source.unique().tolist():  # ascending, so that the smallest is kept
        share = resample((source == value).double(), maps)
        if half:
            share = (1000 * share.float()).half().double()
        labels[share > best] = value
        is_close = torch.where((share - best).abs() < _CLOSE, True, is_close & (share < best))
        best = torch.maximum(best, share)
    if not half:
        for where in is_close.nonzero().split(_VOXELS):
            _settle(labels, where, source, nearest, maps)
    return labels


def _settle(labels: Tensor, where: Tensor, source: Tensor, nearest: Tensor, maps: AxisMaps) -> None:
    """Decide anew, in place, at some voxels, by shares that are rounded as scipy's zoom does."""
    corners = _corners(where, source, maps)
    places = tuple(where.T)
    near, chosen = nearest[places], labels[places]
    best = torch.full(chosen.shape, -1.0, dtype=torch.float64)
    for value in torch.cat([found for found, _ in corners]).unique().tolist():
        share = torch.zeros_like(best)
        for found, weight in corners:
            share += torch.where(found == value, weight, 0.0)
        # A voxel whose nearest label has drawn level keeps it.
        chosen[(share > best) | ((share == best) & (share > 0) & (near == value))] = value
        best = torch.maximum(best, share)
    labels[places] = chosen


def _corners(where: Tensor, source: Tensor, maps: AxisMaps) -> list[tuple[Tensor, Tensor]]:
    """The labels of the eight voxels around each place, and their weights; products and order are those of scipy."""
    sides = [m.sides(source.shape[m.axis + 1]) for m in maps]
    corners: list[tuple[Tensor, Tensor]] = []
    for ends in product((0, 1), repeat=3):
        index = {0: where[:, 0]}
        weight = torch.ones(len(where), dtype=torch.float64)
        for axis, (end, m, (low, high, share)) in enumerate(zip(ends, maps, sides, strict=True)):
            at = where[:, axis + 1]
            index[m.axis + 1] = (high if end else low)[at]
            weight = weight * (share if end else 1 - share)[at]
        corners.append((source[tuple(index[dim] for dim in range(4))], weight))
    return corners
