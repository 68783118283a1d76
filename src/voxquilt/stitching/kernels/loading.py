"""Loads Triton kernels where they can run."""

import logging
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from voxquilt.geometry.axis_map import AxisMaps
from voxquilt.geometry.grid import Grid
from voxquilt.geometry.neighbour_tables import NeighbourTables
from voxquilt.stitching.kernels.label_rule import LabelRule

log = logging.getLogger("voxquilt")


@runtime_checkable
class BlendAddKernel(Protocol):
    """Adds patches to sums; see `voxquilt.stitching.kernels.blend_add.BlendAdd`."""

    def takes(self, batch: Tensor) -> bool: ...
    def __call__(self, batch: Tensor, numbers: Sequence[int]) -> None: ...


@runtime_checkable
class LabelKernel(Protocol):
    """Makes labels of scores; see `voxquilt.stitching.kernels.restore_labels.RestoreLabels`."""

    def takes(self, scores: Tensor) -> bool: ...
    def __call__(self, scores: Tensor, offsets: Sequence[int], where: Sequence[slice], labels: Tensor) -> None: ...


# Kernels are imported only where they are used, since Triton does not exist on every system.


@cache
def kernels_run_on(device: torch.device) -> bool:
    """Whether kernels can run on a device: on CUDA with Triton, which CUDA builds of torch for Linux bring along."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    try:
        from voxquilt.stitching.kernels.probe import launch

        launch(device)
    except Exception as error:  # whatever Triton misses, such as a C compiler, torch alone does not need it
        log.warning(
            "Triton does not work here (%s: %s): stitching on %s takes more kernels of torch and more time.",
            type(error).__name__, error, device,
        )  # fmt: skip
        return False
    return True


def load_blend_add(grid: Grid, axis: int, weights: Sequence[Tensor], planes: Sequence[Tensor]) -> BlendAddKernel:
    """A kernel for the sums of a volume; see BlendAdd."""
    from voxquilt.stitching.kernels.blend_add import BlendAdd

    return BlendAdd(grid, axis, weights, planes)


def load_restore_labels(
    rule: LabelRule, maps: AxisMaps, neighbours: NeighbourTables, not_finite: Tensor
) -> LabelKernel:
    """A kernel for the labels of a volume; see RestoreLabels."""
    from voxquilt.stitching.kernels.restore_labels import RestoreLabels

    return RestoreLabels(rule, maps, neighbours, not_finite)
