"""Keeps finished volumes until they are written, in memory or, if they are too large, in files."""

import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.errors import LedgerError, OutputError, PatchShapeError
from voxquilt.geometry.frame import AXES, Triple
from voxquilt.geometry.space import Where
from voxquilt.stitching.device_transfer import Progress
from voxquilt.stitching.products.base import Product
from voxquilt.stitching.products.encoded import encoded, slope_of
from voxquilt.stitching.products.labels import classes_of
from voxquilt.text import gib


@dataclass(frozen=True)
class Scratch:
    """Keeps arrays that are too large for memory in files without a name, which vanish with their process.

    Args:
        folder: A folder on a disk with room for the files.
        limit: Bytes; larger arrays are kept in files.
    """

    folder: Path
    limit: float

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array mapped to a file, of unknown content.

        Raises:
            OutputError: the disk has no room for it.
        """
        size = int(np.prod(shape)) * dtype.itemsize
        with tempfile.TemporaryFile(dir=self.folder) as file:
            try:
                # Allocated now, since a mapped file that outgrows its disk later kills the process.
                if sys.platform == "linux":
                    os.posix_fallocate(file.fileno(), 0, size)
                else:  # macOS and Windows have no such function: the file only gets its length
                    file.truncate(size)
            except OSError as error:
                raise OutputError(
                    f"a product of {gib(size, 1)} is too large for memory and {self.folder} has no room for it "
                    f"({error.strerror}); ask for fewer products, or free some disk."
                ) from error
            return np.memmap(file, dtype, "r+", shape=shape)


class OutputVolumes:
    """Collects products in native space plane by plane, so that scores at native resolution never exist as a whole.

    Args:
        products: Products by name.
        channels: Channels of the scores that they are computed from.
        shape: Native voxels along i, j, k.
        axis: The native axis along which planes come.
        scratch: Keeps arrays that are too large for memory; None keeps all in memory.
        planes: The planes of the box along the axis that are stored here; None for all.
        holds_all: Whether there is room for all planes, of which others are placed here, or only for these.
        device: A device that keeps the planes until `fetch`; None keeps them on the host from the start.
        box: The native voxels that come; all others keep the background. None for all.
        background: Values of a voxel outside the box, by product.
    """

    def __init__(
        self,
        products: Mapping[str, Product],
        channels: int,
        shape: Triple,
        axis: int = 0,
        scratch: Scratch | None = None,
        *,
        planes: range | None = None,
        holds_all: bool = True,
        device: torch.device | None = None,
        box: Where | None = None,
        background: Mapping[str, Shaped[Tensor, "c 1 1 1"]] | None = None,
    ) -> None:
        self._products, self._channels = products, channels
        self._axis = axis
        self._begin = (0, 0, 0) if box is None else tuple(along.start for along in box)
        self._filled = _native_planes(range(shape[axis]), box and box[axis], planes)
        self._first = 0 if holds_all else self._filled.start
        kept = list(shape)
        kept[axis] = shape[axis] if holds_all else len(self._filled)
        self.arrays: dict[str, np.ndarray] = {}
        """(C, I, J, K) by product: in memory in the order of NIfTI files, in scratch files in the order of planes."""
        self._holes: dict[str, np.ndarray] = {}
        self._on_device: dict[str, Tensor] = {}
        for name, product in products.items():
            count, dtype = product.form(channels)
            large = scratch is not None and count * int(np.prod(kept)) * dtype.itemsize > scratch.limit
            # Axes of the array from the slowest to the fastest.
            order = [0, *(n + 1 for n in sorted((2, 1, 0), key=lambda n: n != axis))] if large else [0, 3, 2, 1]
            shape_in_memory = tuple((count, *kept)[n] for n in order)
            array = (
                scratch.empty(shape_in_memory, dtype)
                if scratch is not None and large
                else np.empty(shape_in_memory, dtype)
            )
            self.arrays[name] = array.transpose(np.argsort(order))
            if box is not None and background is not None:
                self.arrays[name][...] = background[name].numpy(force=True)
            # Planes that are still missing.
            self._holes[name] = np.ones(kept[axis], dtype=bool)
            self._holes[name][self._filled.start - self._first : self._filled.stop - self._first] = False
            if device is not None:
                with torch.inference_mode(False):
                    self._on_device[name] = _like(self._own(name), device)
                    if box is not None and background is not None:
                        self._on_device[name].copy_(background[name])

    def kind(self, name: str) -> str:
        """The kind of a product."""
        return self._products[name].kind

    def described(self, name: str) -> tuple[str, int, float | None]:
        """The kind of a product, the number of its classes, and its slope; see FinishedVolume."""
        product = self._products[name]
        return product.kind, classes_of(product, self._channels), slope_of(product)

    def store(self, name: str, where: Where, voxels: Shaped[Tensor, "c i j k"]) -> None:
        """Store a product of the box's voxels `where`; a single voxel stands for all of them."""
        voxels, into = encoded(self._products[name], voxels), self.on_device(name, where)
        if into is None:
            self.arrays[name][:, *self._shifted(where, self._first)] = voxels.numpy(force=True)
        else:
            into.copy_(voxels)

    def on_device(self, name: str, where: Where) -> Shaped[Tensor, "c i j k"] | None:
        """The box's voxels `where` of a product on the device; None if it is kept on the host."""
        if name not in self._on_device:
            return None
        return self._on_device[name][:, *self._shifted(where, self._filled.start)]

    def new_planes(self, name: str, where: Where, device: torch.device) -> Shaped[Tensor, "c i j k"]:
        """Memory on a device for the box's voxels `where` of a product, in the order in which they are kept."""
        return _like(self.arrays[name][:, *self._shifted(where, self._first)], device)

    def fetch(self, progress: Progress) -> None:
        """Bring what the device keeps to the host, once the work that is marked is done; then nothing is kept there."""
        while self._on_device:
            name, planes = self._on_device.popitem()
            own = self._own(name)
            axes = sorted(range(4), key=lambda n: -own.strides[n])
            into = own.transpose(axes)
            array = into if into.flags.c_contiguous else np.empty(into.shape, into.dtype)
            progress.download([planes.permute(axes)], [array])
            if array is not into:
                into[...] = array

    def part(self, name: str) -> tuple[Where, np.ndarray]:
        """The planes of a product that are stored here: native slices, and a contiguous (C, I, J, K) array."""
        where = [slice(0, n) for n in self.arrays[name].shape[1:]]
        where[self._axis] = slice(self._filled.start, self._filled.stop)
        i, j, k = where
        return (i, j, k), np.ascontiguousarray(self._own(name))

    def place(self, name: str, where: Where, array: np.ndarray) -> None:
        """Copy planes of a product that another process made; there must be room for all planes.

        Raises:
            PatchShapeError: (a RuntimeError) an array of another shape or type.
            LedgerError: (a RuntimeError and AssertionError) some of the planes have come before.
        """
        into, planes = self.arrays[name][:, *where], self._holes[name][where[self._axis]]
        if into.shape != array.shape or into.dtype != array.dtype:
            raise PatchShapeError(
                f"planes of {name} are {array.dtype} {array.shape}; wanted is {into.dtype} {into.shape}."
            )
        if not planes.all():
            raise LedgerError(f"planes of {name} came twice, of {where[self._axis]} along {AXES[self._axis]}.")
        into[...] = array
        planes[...] = False

    def check_complete(self) -> None:
        """Raises LedgerError, naming a product and its first missing plane, when planes are missing."""
        for name, holes in self._holes.items():
            if holes.any():
                raise LedgerError(
                    f"{holes.sum()} of {len(holes)} planes of {name} are missing, the first at {holes.argmax()} along "
                    f"{AXES[self._axis]}: place() what the other parts made."
                )

    def _own(self, name: str) -> np.ndarray:
        """The planes of a product that are stored here."""
        where = [slice(None)] * 4
        where[self._axis + 1] = slice(self._filled.start - self._first, self._filled.stop - self._first)
        return self.arrays[name][tuple(where)]

    def _shifted(self, where: Where, first: int) -> Where:
        """Slices of the box as slices of arrays that begin with the native plane `first`."""
        moves = [begin - (first if axis == self._axis else 0) for axis, begin in enumerate(self._begin)]
        i, j, k = (slice(along.start + move, along.stop + move) for along, move in zip(where, moves, strict=True))
        return i, j, k


def _native_planes(native: range, box: slice | None, planes: range | None) -> range:
    """The native planes that are complete with some planes of a box: before and behind the box, all of them are."""
    if box is None:
        return native if planes is None else planes
    count = box.stop - box.start
    planes = range(count) if planes is None else planes
    start = native.start if planes.start == 0 else planes.start + box.start
    return range(start, native.stop if planes.stop == count else planes.stop + box.start)


def _like(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of an array's shape and type, with its axes in the same order in memory but no gaps."""
    axes = sorted(range(4), key=lambda n: -array.strides[n])
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    empty = torch.empty([array.shape[n] for n in axes], dtype=dtype, device=device)
    return empty.permute(*np.argsort(axes).tolist())
