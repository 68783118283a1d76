"""Opens the rings in which the patches of one network output are averaged, one per blend and kind of average."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from voxquilt.errors import OutputError
from voxquilt.geometry.frame import Padding
from voxquilt.geometry.output_layout import factor_of
from voxquilt.geometry.space import Space
from voxquilt.stitching.accumulator import Accumulator
from voxquilt.stitching.blend import Blend
from voxquilt.stitching.buffer_pool import BufferPool, choose_device
from voxquilt.stitching.execution import Execution, execution_on
from voxquilt.stitching.ledger import Ledger
from voxquilt.stitching.native_grid import NativeGrid
from voxquilt.stitching.native_products import NativeProducts
from voxquilt.stitching.output_volumes import Scratch
from voxquilt.stitching.products.labels import Regions, Threshold
from voxquilt.stitching.products.spec import ProductSpec, background
from voxquilt.stitching.stitch import Stitch
from voxquilt.stitching.streaming import SlabStream, planes_of
from voxquilt.stitching.sum_type import SumType

Averaged = Callable[[Tensor], Tensor] | None
"""Turns (B, C, ...) patches into the values that are averaged; None if patches are averaged as they are."""


@dataclass(frozen=True)
class Memory:
    """Where a subject's sums and volumes are kept.

    Args:
        device: Device of the sums; None for where the outputs are.
        buffers: Memory for sums, reused from subject to subject.
        scratch: Where products that are too large for memory go; None keeps all in memory.
        execution: How sums and products are computed; None chooses by the device. Tests set it, to take a device's way
            on the host.
    """

    device: torch.device | str | None = None
    buffers: BufferPool | None = None
    scratch: Scratch | None = None
    execution: Execution | None = None


@dataclass(frozen=True)
class Ring:
    """Averages patches of one output by one blend, and computes products of the averages."""

    averaged: Averaged
    stream: SlabStream
    products: NativeProducts


@dataclass(frozen=True)
class _Plan:
    """The products that are computed from the same averages, for which a ring is opened."""

    blend: Blend
    averaged: Averaged
    specs: Mapping[str, ProductSpec]
    fill: list[float]

    def type_of(self, patches: Tensor) -> torch.dtype:
        """Type of the values that are averaged."""
        return patches.dtype if self.averaged is None else self.averaged(patches[:0]).dtype


@dataclass(frozen=True)
class RingOpener:
    """Opens rings for a subject's outputs, once their channels are known.

    Args:
        stitch: How patches become volumes.
        padding: Padding of the subject's grid.
        space: The mapping back to native space.
        ledger: Records the patches that come.
        memory: Where sums and volumes are kept.
        holds_all: Whether volumes are whole, with room for the planes of other processes.
        layout: How outputs lie in patches; see `voxquilt.geometry.output_layout.factor_of`.
    """

    stitch: Stitch
    padding: Padding
    space: Space
    ledger: Ledger
    memory: Memory
    holds_all: bool
    layout: str

    def open(self, name: str, patches: Tensor) -> list[Ring]:
        """Open the rings of an output.

        Args:
            name: Name of the output.
            patches: Its first batch, (B, C, pi, pj, pk).

        Raises:
            PatchShapeError: patches of a shape that does not suit the grid.
            OutputError: a product that cannot be made of the output.
        """
        grid, part, channels = self.ledger.grid, self.ledger.part, patches.shape[1]
        factor = factor_of(self.layout, name, patches.shape, grid.patch_size)
        scores = grid.downsampled(factor)
        maps = self.space.in_scores(self.padding, factor, self.stitch.order, self.stitch.per_slice)
        native_shape = self.space.native.shape
        plans = self._plans(name, channels)
        values = sum(len(plan.fill) for plan in plans) * prod(scores.shape)
        planes = grid.patch_size[part.axis] / grid.shape[part.axis]
        width = max(4, patches.element_size()) if patches.is_floating_point() else 8
        ring, device = int(values * planes) * width, self.memory.device
        buffers = self.memory.buffers or BufferPool()
        device = self._choose_device(patches.device, ring, buffers) if device is None else torch.device(device)
        execution = self.memory.execution or execution_on(device)
        volumes = prod(native_shape) * sum(_voxel_bytes(plan, channels) for plan in plans)
        keeps = execution.deferred and choose_device(device, ring + volumes, buffers.held(device)) == device
        rings = []
        for plan in plans:
            fill = plan.fill if self.ledger.skipped else None
            finished = planes_of(part, scores, plan.blend)
            native = NativeGrid(
                maps, part.axis, scores.shape, channels, finished, self.holds_all, self.memory.scratch,
                device, execution, keeps, (native_shape, self.space.where), plan.fill,
            )  # fmt: skip
            products = NativeProducts(plan.specs, native)
            sums = Accumulator(
                scores,
                plan.blend,
                part.axis,
                scores.patch_size[part.axis],
                channels=len(plan.fill),
                types=SumType.of_patches(plan.type_of(patches), plan.blend, None, fill),
                device=device,
                buffers=buffers,
                fill=fill,
                execution=execution,
            )
            rings.append(Ring(plan.averaged, SlabStream(sums, self.ledger, products), products))
        return rings

    @staticmethod
    def _choose_device(device: torch.device, ring: int, buffers: BufferPool) -> torch.device:
        chosen = choose_device(device, ring, buffers.held(device))
        if chosen != device:
            buffers.release(device)
        return chosen

    def _plans(self, name: str, channels: int) -> list[_Plan]:
        stitch = self.stitch
        fill = torch.tensor(background(channels, stitch.activation, stitch.fill), dtype=torch.float64)
        plans = []
        for blend, specs in stitch.specs(name, channels):
            if stitch.fill is None and (self.ledger.skipped or not self.space.covers_all):
                self._check_fill(fill, specs.values())
            for averaged in dict.fromkeys(spec.averaged for spec in specs.values()):
                same_average = {product: spec for product, spec in specs.items() if spec.averaged == averaged}
                values = fill if averaged is None else averaged(fill.reshape(1, channels, 1, 1, 1)).flatten()
                plans.append(_Plan(blend, averaged, same_average, values.tolist()))
        return plans

    def _check_fill(self, fill: Tensor, specs: Iterable[ProductSpec]) -> None:
        values = fill.reshape(-1, 1, 1, 1)
        if any(isinstance(spec.product, (Threshold, Regions)) and spec.product(values).any() for spec in specs):
            raise OutputError(
                f"voxels that are not predicted would count as label 1, since a score of 0 is above "
                f"stitch.threshold={self.stitch.threshold}; set stitch.fill to the background's score."
            )


def _voxel_bytes(plan: _Plan, channels: int) -> int:
    """Bytes of a native voxel of all products."""
    forms = [spec.product.form(channels) for spec in plan.specs.values()]
    return sum(count * dtype.itemsize for count, dtype in forms)
