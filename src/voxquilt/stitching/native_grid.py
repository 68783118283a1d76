"""Maps finished planes of an output to native space."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from voxquilt.geometry.axis_map import AxisMaps
from voxquilt.geometry.frame import Triple
from voxquilt.geometry.space import Where
from voxquilt.geometry.streamed_resample import Restorer
from voxquilt.stitching.execution import Execution
from voxquilt.stitching.output_volumes import OutputVolumes, Scratch
from voxquilt.stitching.products.base import Product, compute
from voxquilt.stitching.products.encoded import encoded


@dataclass(frozen=True)
class NativeGrid:
    """The mapping from finished planes of an output to native space.

    Args:
        maps: Maps from native voxels to the scores.
        axis: The scores' axis along which planes come.
        shape: Voxels of the scores along i, j, k.
        channels: Channels of the scores.
        planes: The scores' planes that are finished here; the plane behind them comes too.
        holds_all: Whether volumes are whole, with room for the planes of other processes.
        scratch: Where volumes that are too large for memory are kept.
        device: Where scores come from.
        execution: How products are computed there.
        keeps: Whether the device has memory for the volumes, which then stay there until they are complete.
        native: Native voxels along i, j, k, and those of them that the maps are of.
        fill: Scores outside of these.
    """

    maps: AxisMaps
    axis: int
    shape: Triple
    channels: int
    planes: range
    holds_all: bool
    scratch: Scratch | None
    device: torch.device
    execution: Execution
    keeps: bool
    native: tuple[Triple, Where]
    fill: list[float]

    @property
    def copies(self) -> bool:
        """Whether native voxels are voxels of the scores, and nothing is interpolated."""
        return all(m.neighbours(self.shape[m.axis]).copies for m in self.maps)

    @property
    def is_linear(self) -> bool:
        """Whether native voxels lie between the two voxels of the scores around them, along each axis."""
        return all(m.order < 3 for m in self.maps)

    @property
    def read(self) -> Where:
        """The voxels of the scores that are read: those outside the padding."""
        slices = {m.axis: slice(*(m.within or (0, self.shape[m.axis]))) for m in self.maps}
        return slices[0], slices[1], slices[2]

    def make_restorer(self, *, linear: bool = True, tile: int | None = None) -> Restorer:
        """A restorer of planes to native space."""
        return Restorer(self.maps, self.axis, self.shape, linear=linear, tile=tile, planes=self.planes)

    def make_volumes(self, products: Mapping[str, Product], restorer: Restorer) -> OutputVolumes:
        """Volumes for products of the voxels that a restorer hands out."""
        shape, where = self.native
        background = None
        if shape != tuple(m.size for m in self.maps):
            scores = torch.tensor(self.fill, dtype=torch.float64).float().reshape(-1, 1, 1, 1)
            values = {name: compute(product, scores, self.channels) for name, product in products.items()}
            background = {name: encoded(products[name], value) for name, value in values.items()}
        return OutputVolumes(
            products,
            self.channels,
            shape,
            restorer.axis,
            self.scratch,
            planes=restorer.native,
            holds_all=self.holds_all,
            device=self.device if self.keeps else None,
            box=None if background is None else where,
            background=background,
        )
