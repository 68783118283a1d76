"""Adds patches with their weights to a ring of sums on a CUDA device, in one launch for all patches of a row.

A program owns a tile of the ring and adds the patches that cover it one after the other, in the order in which they are
given. So there are no atomics, and sums depend neither on how patches are batched nor on chance.
"""

# Triton exists on Linux only, and its kernels are launched by an index.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false

from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import no_type_check

import numpy as np
import torch
import triton
import triton.language as tl
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.geometry.device_queue import queue_on
from voxquilt.geometry.grid import Grid
from voxquilt.stitching.device_transfer import on_device, upload
from voxquilt.stitching.kernels.launcher import Launcher, kind_of

# Values per program, of these along k and, with channels last, along the channels: fastest on an H100, of 256 to 4096
# values, 32 to 128 along k, 16 to 64 channels, with 4 warps or 8.
_VALUES, _ALONG_K, _CHANNELS = 1024, 32, 16
_PATCHES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SUMS = (torch.float32, torch.float64)


class BlendAdd:
    """Adds patches to sums and their weights to sums of weights.

    Args:
        grid: Where patches lie.
        axis: Axis along which patches come and along which sums are a ring.
        weights: (patches along the axis, patch size) for i, j and k, on the device and in the type of the sums.
        planes: The sums (C, I, J, K) and, if patches are skipped, the sums of weights (1, I, J, K), contiguous along k.
            Those of a ring have only its planes along `axis`.
    """

    def __init__(self, grid: Grid, axis: int, weights: Sequence[Tensor], planes: Sequence[Tensor]) -> None:
        self._sums, self._covers = planes[0], planes[-1]
        self._places = _places(grid, axis, self._sums.device, queue_on(self._sums.device))
        self._has_covers, self._weights = len(planes) > 1, weights
        self._axis = axis if self._sums.shape[axis + 1] < grid.shape[axis] else -1
        self._launcher = Launcher(_add)
        self._tiles: dict[Hashable, tuple[int, int, int]] = {}

    def takes(self, batch: Tensor) -> bool:
        """Whether the patches' and sums' types are supported and both are on one device."""
        return batch.device == self._sums.device and batch.dtype in _PATCHES and self._sums.dtype in _SUMS

    def __call__(self, batch: Shaped[Tensor, "b c pi pj pk"], numbers: Sequence[int]) -> None:
        """Add patches with these numbers in the grid; along a ring, all of one row."""
        with on_device(self._sums.device):
            for first, stop in _runs([self._places.positions[number] for number in numbers]):
                self._launch(batch[first:stop], self._places.positions[numbers[first]])

    def _launch(self, batch: Tensor, position: int) -> None:
        count, channels, *patch = batch.shape
        i0, j0, k0, i1, j1, k1 = self._places.box(position, count)
        kind = kind_of(batch)
        if kind not in self._tiles:
            self._tiles[kind] = _tile(batch)
        block_c, block_j, block_k = self._tiles[kind]
        tiles_k = -(-(k1 - k0) // block_k)
        programs = -(-(j1 - j0) // block_j) * tiles_k, i1 - i0, -(-channels // block_c)
        self._launcher(
            kind, programs,
            batch, self._sums, self._covers, self._places.table, *self._weights,
            *batch.stride(), *self._sums.stride()[:3], *self._covers.stride()[1:3], *self._sums.shape[1:], *patch,
            channels, position, count, i0, j0, j1, k0, k1, tiles_k,
            self._axis, self._has_covers, block_c, block_j, block_k,
        )  # fmt: skip


class _Places:
    """Where the patches of a grid lie.

    Args:
        grid: The grid.
        axis: Axis along which patches come.
        device: Where the kernel reads it.
    """

    def __init__(self, grid: Grid, axis: int, device: torch.device) -> None:
        order = grid.order_along(axis)
        positions = np.empty(len(grid), dtype=np.int64)
        positions[order] = np.arange(len(grid))
        # Lists, since batches have few patches: arrays would take longer than their kernels.
        self.positions: list[int] = positions.tolist()
        """The place of each patch in the order in which patches come."""
        self._locations: list[list[int]] = grid.locations[order].tolist()
        places = np.stack(np.unravel_index(order, grid.counts), 1)
        rows = np.hstack([grid.locations[order, :3], places])
        with torch.inference_mode(False):
            self.table = upload(torch.from_numpy(rows.astype(np.int32)), device)
            """The first voxel of each patch in that order, and its numbers along the axes."""
        self._boxes: dict[tuple[int, int], list[int]] = {}

    def box(self, first: int, count: int) -> list[int]:
        """The first voxels, and those behind the last, of the box around some patches that follow each other."""
        if (first, count) not in self._boxes:
            along = list(zip(*self._locations[first : first + count], strict=True))
            self._boxes[first, count] = [*map(min, along[:3]), *map(max, along[3:])]
        return self._boxes[first, count]


# For the volumes of a cohort that are alike.
@lru_cache(maxsize=8)
def _places(grid: Grid, axis: int, device: torch.device, _queue: Hashable) -> _Places:
    return _Places(grid, axis, device)


def _tile(batch: Tensor) -> tuple[int, int, int]:
    """Channels, j and k of a program's tile: neighbours in memory, which with outputs channels last are channels."""
    c, j, k = (triton.next_power_of_2(batch.shape[n]) for n in (1, 3, 4))
    k = min(_ALONG_K, k)
    if batch.stride(4) == 1:
        j = min(_VALUES // k, j)
        return min(_VALUES // k // j, c), j, k
    c = min(_CHANNELS, c)
    return c, min(max(1, _VALUES // k // c), j), k


def _runs(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last index, end exclusive, of patches that follow each other in streaming order."""
    edges = [n for n, (before, after) in enumerate(pairwise(positions), 1) if after != before + 1]
    return pairwise([0, *edges, len(positions)])


# What differs from launch to launch or from subject to subject must not lead to another compilation.
_PLAIN = [
    "batch_b", "batch_i", "batch_j", "sums_c", "sums_i", "sums_j", "covers_i", "covers_j",
    "window_i", "window_j", "window_k", "patch_i", "patch_j", "patch_k", "channels", "first", "count",
    "i0", "j0", "j1", "k0", "k1", "tiles_k",
]  # fmt: skip


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=["batch"])
@no_type_check
def _add(
    batch, sums, covers, table, weights_i, weights_j, weights_k,
    batch_b, batch_c, batch_i, batch_j, batch_k, sums_c, sums_i, sums_j, covers_i, covers_j,
    window_i, window_j, window_k, patch_i, patch_j, patch_k,
    channels, first, count, i0, j0, j1, k0, k1, tiles_k,
    AXIS: tl.constexpr, HAS_COVERS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # The tile: one plane i, some j, k and channels, of the box around all patches of the launch.
    i = i0 + tl.program_id(1)
    tile_j, tile_k = j0 + tl.program_id(0) // tiles_k * BLOCK_J, k0 + tl.program_id(0) % tiles_k * BLOCK_K
    # The box has corners where no patch lies.
    is_covered = 0
    for n in range(first, first + count):
        row = table + n * 6
        is_covered |= _meets(row, i, tile_j, tile_k, patch_i, patch_j, patch_k, BLOCK_J, BLOCK_K)
    if is_covered == 0:
        return
    j, k = tile_j + tl.arange(0, BLOCK_J), tile_k + tl.arange(0, BLOCK_K)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    # Where it lies in the ring.
    kept_i, kept_j, kept_k = i, j, k
    if AXIS == 0:
        kept_i = i % window_i
    if AXIS == 1:
        kept_j = j % window_j
    if AXIS == 2:
        kept_k = k % window_k
    far_c = c.to(tl.int64)[:, None, None]  # offsets between channels and planes can be beyond 2^31
    within = (j < j1)[:, None] & (k < k1)[None, :]
    wanted = (c < channels)[:, None, None] & within[None, :, :]
    place = kept_i.to(tl.int64) * sums_i + kept_j.to(tl.int64)[:, None] * sums_j + kept_k[None, :]
    into = sums + far_c * sums_c + place[None, :, :]
    total = tl.load(into, mask=wanted, other=0)
    over = covers + kept_i.to(tl.int64) * covers_i + kept_j.to(tl.int64)[:, None] * covers_j + kept_k[None, :]
    if HAS_COVERS:
        cover = tl.load(over, mask=within, other=0)
    for n in range(first, first + count):
        row = table + n * 6
        if _meets(row, i, tile_j, tile_k, patch_i, patch_j, patch_k, BLOCK_J, BLOCK_K):
            in_i, in_j, in_k = i - tl.load(row), j - tl.load(row + 1), k - tl.load(row + 2)
            has_j, has_k = (in_j >= 0) & (in_j < patch_j), (in_k >= 0) & (in_k < patch_k)
            share_i = tl.load(weights_i + tl.load(row + 3) * patch_i + in_i)
            share_j = tl.load(weights_j + tl.load(row + 4) * patch_j + in_j, mask=has_j, other=0)
            share_k = tl.load(weights_k + tl.load(row + 5) * patch_k + in_k, mask=has_k, other=0)
            # Multiplied in the order of the torch way, so that results are equal.
            share = share_i * (share_j[:, None] * share_k[None, :])
            source = batch + (n - first).to(tl.int64) * batch_b + in_i.to(tl.int64) * batch_i
            voxel = in_j.to(tl.int64)[:, None] * batch_j + in_k.to(tl.int64)[None, :] * batch_k
            covered = wanted & (has_j[:, None] & has_k[None, :])[None, :, :]
            value = tl.load(source + far_c * batch_c + voxel[None, :, :], mask=covered, other=0)
            total += value.to(total.dtype) * share[None, :, :]
            if HAS_COVERS:
                cover += share.to(cover.dtype)
    tl.store(into, total, mask=wanted)
    if HAS_COVERS and tl.program_id(2) == 0:
        tl.store(over, cover, mask=within)


@triton.jit
@no_type_check
def _meets(row, i, tile_j, tile_k, patch_i, patch_j, patch_k, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr):
    """Whether a patch has voxels in a tile of a plane."""
    in_i, after_j, after_k = i - tl.load(row), tile_j - tl.load(row + 1), tile_k - tl.load(row + 2)
    meets_i = (in_i >= 0) & (in_i < patch_i)
    return meets_i & (after_j > -BLOCK_J) & (after_j < patch_j) & (after_k > -BLOCK_K) & (after_k < patch_k)
