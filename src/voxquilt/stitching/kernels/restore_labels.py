"""Makes labels in native space of finished scores on a CUDA device, in one launch for all planes that are handed over.

A program interpolates a tile of native voxels class by class and keeps the best score and its class in registers, so
that no interpolated score is written to memory, whatever the number of classes.
"""

# Triton exists on Linux only, and its kernels are launched by an index.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false

from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.geometry.axis_map import AxisMaps
from voxquilt.geometry.neighbour_tables import NeighbourTables
from voxquilt.stitching.device_transfer import on_device
from voxquilt.stitching.kernels.label_rule import ARG_MAX, SIGMOID_ABOVE, LabelRule
from voxquilt.stitching.kernels.launcher import Launcher, kind_of

# Native voxels of a program's tile: fastest on an H100, of 32 to 128 and 4 to 16.
_WIDE, _HIGH = 32, 4
_SCORES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Kernels can only use constants of this type.
_ARG_MAX, _SIGMOID_ABOVE = tl.constexpr(ARG_MAX), tl.constexpr(SIGMOID_ABOVE)


class RestoreLabels:
    """Makes labels of scores whose planes come in order.

    Args:
        rule: What labels are made of.
        maps: Maps from native voxels to the scores.
        neighbours: The scores' voxels around each native voxel along each native axis.
        not_finite: A number on the device, which becomes NaN where scores are NaN or infinite.
    """

    def __init__(self, rule: LabelRule, maps: AxisMaps, neighbours: NeighbourTables, not_finite: Tensor) -> None:
        self._rule, self._not_finite, device = rule, not_finite, not_finite.device
        self._axes = [m.axis for m in maps]
        self._pairs, self._shares = neighbours.pairs(device), [along.share for along in neighbours.on(device)]
        self._lerps = [not copies for copies in neighbours.copies]
        # Programs read along the scores' last axis and write along the labels' first, as far as these differ.
        wide = self._axes.index(2)
        high = 0 if wide != 0 else 1
        self._roles = 3 - wide - high, high, wide
        # The order in which `interpolate` takes the axes, so that results are equal.
        steps = sorted(range(3), key=lambda n: -abs(maps[n].scale))
        self._order = [self._roles.index(n) for n in steps]
        # Blocks and types of offsets depend on whole extents: else they would be compiled again in mid-subject.
        self._wide = min(_WIDE, triton.next_power_of_2(maps[wide].size))
        self._high = min(_HIGH * _WIDE // self._wide, triton.next_power_of_2(maps[high].size))
        self._last = {n: neighbours.last[n] for n in (high, wide)}
        self._launcher = Launcher(_restore)

    def takes(self, scores: Tensor) -> bool:
        """Whether the scores' type is supported, and they are on the device."""
        return scores.device == self._not_finite.device and scores.dtype in _SCORES

    def __call__(
        self,
        scores: Shaped[Tensor, "c si sj sk"],
        offsets: Sequence[int],
        where: Sequence[slice],
        labels: Shaped[Tensor, "d ti tj tk"],
    ) -> None:
        """Make the labels of a box of native voxels.

        Args:
            scores: Scores around the box.
            offsets: The voxel of all scores at which these begin, along each of their axes.
            where: The box.
            labels: Where its labels are written, of an integer type.
        """
        strides = [scores.stride(axis + 1) for axis in self._axes]
        last = sum(voxel * abs(strides[n]) for n, voxel in self._last.items())
        deep, high, wide = (where[n] for n in self._roles)
        counts = [s.stop - s.start for s in (deep, high, wide)]
        programs = -(-counts[2] // self._wide), -(-counts[1] // self._high), counts[0]
        kind = kind_of(scores), kind_of(labels), last >= 2**31
        with on_device(scores.device):
            self._launcher(
                kind, programs,
                scores, labels, self._not_finite,
                *(table for n in self._roles for table in (self._pairs[n], self._shares[n])),
                *(strides[n] for n in self._roles), scores.stride(0),
                *(offsets[self._axes[n]] for n in self._roles),
                *(labels.stride(n + 1) for n in self._roles), labels.stride(0),
                deep.start, high.start, wide.start, counts[1], counts[2], len(scores), self._rule.threshold,
                *(self._lerps[n] for n in self._roles), *self._order,
                self._rule.mode, last >= 2**31, scores.dtype == torch.float64, self._high, self._wide,
            )  # fmt: skip


# What differs from launch to launch or from subject to subject must not lead to another compilation.
_PLAIN = [
    "scores_d", "scores_h", "scores_c", "skip_d", "skip_h", "skip_w", "labels_d", "labels_h", "labels_w", "labels_c",
    "first_d", "first_h", "first_w", "count_h", "count_w", "channels", "threshold",
]  # fmt: skip


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=["scores", "labels"])
@no_type_check
def _restore(
    scores, labels, not_finite, pairs_d, shares_d, pairs_h, shares_h, pairs_w, shares_w,
    scores_d, scores_h, scores_w, scores_c, skip_d, skip_h, skip_w, labels_d, labels_h, labels_w, labels_c,
    first_d, first_h, first_w, count_h, count_w, channels, threshold,
    LERP_D: tl.constexpr, LERP_H: tl.constexpr, LERP_W: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr,
    MODE: tl.constexpr, FAR: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # The tile: one plane of native voxels, BLOCK_H x BLOCK_W of its voxels.
    d = tl.program_id(2)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    in_h, in_w = h < count_h, w < count_w
    inside = in_h[:, None] & in_w[None, :]
    # The neighbours along each axis, as offsets between values, and the share of the second.
    at_d, at_h, at_w = pairs_d + 2 * (first_d + d), pairs_h + 2 * (first_h + h), pairs_w + 2 * (first_w + w)
    low_d, high_d = tl.load(at_d) - skip_d, tl.load(at_d + 1) - skip_d
    low_h, high_h = tl.load(at_h, mask=in_h, other=0) - skip_h, tl.load(at_h + 1, mask=in_h, other=0) - skip_h
    low_w, high_w = tl.load(at_w, mask=in_w, other=0) - skip_w, tl.load(at_w + 1, mask=in_w, other=0) - skip_w
    low_d, high_d = low_d.to(tl.int64) * scores_d, high_d.to(tl.int64) * scores_d
    if FAR:
        low_h, high_h, low_w, high_w = low_h.to(tl.int64), high_h.to(tl.int64), low_w.to(tl.int64), high_w.to(tl.int64)
    low_h, high_h, low_w, high_w = low_h * scores_h, high_h * scores_h, low_w * scores_w, high_w * scores_w
    number = tl.float64 if DOUBLE else tl.float32
    share_d = tl.load(shares_d + first_d + d).to(number)
    share_h = tl.load(shares_h + first_h + h, mask=in_h, other=0).to(number)[:, None]
    share_w = tl.load(shares_w + first_w + w, mask=in_w, other=0).to(number)[None, :]
    at_ll, at_lh = low_h[:, None] + low_w[None, :], low_h[:, None] + high_w[None, :]
    at_hl, at_hh = high_h[:, None] + low_w[None, :], high_h[:, None] + high_w[None, :]
    best = tl.full((BLOCK_H, BLOCK_W), float("-inf"), number)
    label = tl.full((BLOCK_H, BLOCK_W), 0, tl.int32)
    finite = tl.full((BLOCK_H, BLOCK_W), 1, tl.int1)
    into = labels + d.to(tl.int64) * labels_d + h.to(tl.int64)[:, None] * labels_h + w.to(tl.int64)[None, :] * labels_w
    below = scores + low_d
    for c in range(channels):
        # Scores at the corners of the cell around each voxel: at the lower or higher neighbour along d, h and w.
        s000 = tl.load(below + at_ll, mask=inside, other=0).to(number)
        s001 = tl.load(below + at_lh, mask=inside, other=0).to(number) if LERP_W else s000
        s010 = tl.load(below + at_hl, mask=inside, other=0).to(number) if LERP_H else s000
        s011, s100, s101, s110, s111 = s000, s000, s000, s000, s000
        if LERP_H and LERP_W:
            s011 = tl.load(below + at_hh, mask=inside, other=0).to(number)
        if LERP_D:
            above = below - low_d + high_d
            s100 = tl.load(above + at_ll, mask=inside, other=0).to(number)
            if LERP_W:
                s101 = tl.load(above + at_lh, mask=inside, other=0).to(number)
            if LERP_H:
                s110 = tl.load(above + at_hl, mask=inside, other=0).to(number)
            if LERP_H and LERP_W:
                s111 = tl.load(above + at_hh, mask=inside, other=0).to(number)
        # Axis by axis, in the order of `voxquilt.geometry.resample.interpolate`. Values that are not needed any more
        # are interpolated too; the compiler drops them.
        for step in tl.static_range(3):
            axis = FIRST if step == 0 else (SECOND if step == 1 else THIRD)
            if axis == 0 and LERP_D:
                s000, s001 = _lerp(s000, s100, share_d), _lerp(s001, s101, share_d)
                s010, s011 = _lerp(s010, s110, share_d), _lerp(s011, s111, share_d)
            if axis == 1 and LERP_H:
                s000, s001 = _lerp(s000, s010, share_h), _lerp(s001, s011, share_h)
                s100, s101 = _lerp(s100, s110, share_h), _lerp(s101, s111, share_h)
            if axis == 2 and LERP_W:
                s000, s010 = _lerp(s000, s001, share_w), _lerp(s010, s011, share_w)
                s100, s110 = _lerp(s100, s101, share_w), _lerp(s110, s111, share_w)
        finite = finite & (tl.abs(s000) < float("inf"))
        if MODE == _ARG_MAX:
            better = s000 > best  # so that the first of several is kept
            best, label = tl.where(better, s000, best), tl.where(better, c, label)
        else:
            # In single precision, as activations are.
            score = s000.to(tl.float32)
            score = 1 / (1 + tl.exp(-score)) if MODE == _SIGMOID_ABOVE else score
            tl.store(into, (score > threshold).to(labels.dtype.element_ty), mask=inside)
            into += labels_c
        below += scores_c
    if MODE == _ARG_MAX:
        tl.store(into, label.to(labels.dtype.element_ty), mask=inside)
    # Several programs may write, but all of them the same.
    tl.store(not_finite + tl.full((BLOCK_H, BLOCK_W), 0, tl.int32), float("nan"), mask=inside & (finite == 0))


@triton.jit
@no_type_check
def _lerp(low, high, share):
    """torch.lerp's formula; the nearer of the two is the one that is corrected."""
    near_low = share < 0.5
    return tl.where(near_low, low, high) + tl.where(near_low, share, share - 1) * (high - low)
