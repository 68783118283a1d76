"""Determines how much volumes are padded so that patches fit, and pads them."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from voxquilt.errors import GridError, PaddingModeError
from voxquilt.geometry.frame import Padding, Triple, to_triple
from voxquilt.geometry.grid import Grid, make_grid, overlap_of_step
from voxquilt.vocabulary import FIT_MODES, PADDING_MODES

NO_PADDING: Padding = ((0, 0), (0, 0), (0, 0))
# Modes by which padded voxels are copies of voxels of the volume.
_COPYING = ("edge", "reflect", "symmetric", "wrap")


def lay_grid(
    shape: Triple,
    patch_size: int | Iterable[int],
    patch_overlap: int | Iterable[int],
    *,
    border: bool,
    fit: bool,
    divisible_by: int | Iterable[int],
    halo: Padding = NO_PADDING,
    placement: str = "regular",
    step: float | None = None,
) -> tuple[Grid, Padding]:
    """The grid of a padded volume, and the padding; see GridSampler.

    Args:
        shape: Voxels of the volume along i, j, k, without padding.
        patch_size, patch_overlap: Voxels, an integer or three.
        border: Whether to pad by half of the overlap on every side.
        fit: Whether to pad to at least the patch size, and to `divisible_by`.
        divisible_by: The padded volume is a multiple of this many voxels.
        halo: Voxels around the grid's patches that patches include.
        placement, step: See `voxquilt.geometry.grid.make_grid`.

    Raises:
        GridError: (a ValueError) sizes that make no grid.
    """
    patch_size = _without_halo(to_triple(patch_size, "patch_size", minimum=1), halo)
    patch_overlap = to_triple(patch_overlap, "patch_overlap")
    shared = patch_overlap if step is None else overlap_of_step(patch_size, step)
    around = [o // 2 if border else 0 for o in shared]
    multiple = to_triple(divisible_by, "divisible_by", minimum=1)
    i, j, k = (
        _pad_axis(*sizes) if fit else (b, b)
        for b, *sizes in zip(around, shape, around, patch_size, multiple, strict=True)
    )
    padded = [n + before + after for n, (before, after) in zip(shape, (i, j, k), strict=True)]
    return make_grid(padded, patch_size, patch_overlap, placement=placement, step=step), (i, j, k)


def _without_halo(patch_size: Triple, halo: Padding) -> Triple:
    inner = [n - sum(around) for n, around in zip(patch_size, halo, strict=True)]
    if min(inner) < 1:
        raise GridError(
            f"patches of {patch_size} voxels are all halo: {halo} before and after; use a larger patch_size."
        )
    return inner[0], inner[1], inner[2]


def pads_border(mode: str | float | None) -> bool:
    """Whether a padding mode pads volumes by half of the overlap, and not only to the size of a patch."""
    return mode is not None and mode not in FIT_MODES


def to_padding(mode: str | float) -> Callable[[Tensor, Padding], Tensor]:
    """A function that pads a (C, I, J, K) tensor, from a mode of numpy.pad (perhaps after 'fit_') or a number.

    Raises:
        PaddingModeError: anything else.
    """
    if isinstance(mode, (int, float)) and not isinstance(mode, bool):
        return lambda tensor, padding: _pad_with(tensor, padding, mode)
    if mode in FIT_MODES:
        mode = mode.removeprefix("fit_")
    if mode not in PADDING_MODES:
        raise PaddingModeError(f"padding_mode must be a number or one of {', '.join(PADDING_MODES)}; it is {mode!r}.")
    return lambda tensor, padding: _pad(tensor, padding, mode)


def _pad_with(tensor: Tensor, padding: Padding, value: float) -> Tensor:
    if not tensor.is_floating_point() and torch.tensor(value).to(tensor.dtype).item() != value:
        tensor = tensor.float()  # unsigned voxels cannot hold -1024, nor integers 0.5
    return _pad(tensor, padding, "constant", constant_values=value)


def _pad(tensor: Tensor, padding: Padding, mode: str, **options: Any) -> Tensor:
    if tensor.device.type == "cpu":
        return _numpy_pad(tensor, padding, mode=mode, **options)
    if mode in ("constant", *_COPYING):
        return pad_by_torch(tensor, padding, mode, options.get("constant_values", 0))
    return _numpy_pad(tensor, padding, mode=mode, **options).to(tensor.device)


def pad_by_torch(tensor: Tensor, padding: Padding, mode: str, value: float = 0) -> Tensor:
    """Pad a (C, I, J, K) tensor where it is, on any device, as numpy.pad does on the host.

    Args:
        tensor: The tensor.
        padding: Voxels before and after along i, j, k.
        mode: 'constant', or a mode by which each padded voxel is a copy of one of the volume's.
        value: The constant.
    """
    if mode == "constant":
        around = [voxels for pair in reversed(padding) for voxels in pair]
        return torch.nn.functional.pad(tensor, around, value=value)
    for axis, around in enumerate(padding, 1):
        if around != (0, 0):
            options: Any = {"mode": mode}
            index = np.pad(np.arange(tensor.shape[axis]), around, **options)
            tensor = tensor.index_select(axis, torch.from_numpy(index).to(tensor.device))
    return tensor


def _numpy_pad(tensor: Tensor, padding: Padding, **options: Any) -> Tensor:
    if tensor.dtype == torch.bfloat16:  # numpy has no such type
        return _numpy_pad(tensor.float(), padding, **options).bfloat16()
    return torch.from_numpy(np.pad(tensor.numpy(force=True), ((0, 0), *padding), **options))


def _pad_axis(size: int, border: int, patch: int, multiple: int) -> tuple[int, int]:
    """Voxels to add before and after an axis so that it holds a patch and is a multiple, with the volume centred."""
    wanted = max(size + 2 * border, patch)
    wanted += -wanted % multiple
    before = (wanted - size) // 2
    return before, wanted - size - before
