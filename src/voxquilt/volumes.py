"""Where are finished voxels kept until they are written? In memory, or in a file if they are too many."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.errors import OutputError
from voxquilt.geometry import Triple
from voxquilt.products import Product
from voxquilt.space import Where


@dataclass(frozen=True)
class Scratch:
    """Where arrays that are too large for memory go: files without a name, which vanish with their process.

    Args:
        folder: On a disk with room for them.
        limit: Bytes; a larger array goes to a file.
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
                # All of it now: a mapped file that outgrows its disk later kills the process.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:  # macOS and Windows, where a file is only made as long
                    file.truncate(size)
            except OSError as error:
                raise OutputError(
                    f"a product of {size / 2**30:.1f} GiB is too large for memory and {self.folder} has no room for it "
                    f"({error.strerror}); ask for fewer products, or free some disk."
                ) from error
            return np.memmap(file, dtype, "r+", shape=shape)


class Volumes:
    """Products in native space while scores come slab by slab; scores at native resolution never exist as a whole.

    Args:
        products: By name.
        channels: Of the scores.
        shape: Native voxels along i, j, k.
        axis: The native axis along which slabs come.
        scratch: For arrays that are too large; None keeps all in memory.
    """

    def __init__(
        self,
        products: Mapping[str, Product],
        channels: int,
        shape: Triple,
        axis: int = 0,
        scratch: Scratch | None = None,
    ) -> None:
        self._products = products
        self.arrays: dict[str, np.ndarray] = {}
        """For each product (C, I, J, K), in memory laid out as NIfTI wants it, in a file as slabs come."""
        for name, product in products.items():
            made, dtype = product.form(channels)
            large = scratch is not None and made * int(np.prod(shape)) * dtype.itemsize > scratch.limit
            # Axes of the array from the slowest to the fastest.
            order = [0, *(n + 1 for n in sorted((2, 1, 0), key=lambda n: n != axis))] if large else [0, 3, 2, 1]
            laid = tuple((made, *shape)[n] for n in order)
            array = scratch.empty(laid, dtype) if scratch is not None and large else np.empty(laid, dtype)
            self.arrays[name] = array.transpose(np.argsort(order))

    def fill(self, where: Where, slab: Shaped[Tensor, "c i j k"]) -> None:
        """Compute every product of the native voxels `where`."""
        for name, product in self._products.items():
            self.arrays[name][:, *where] = product(slab).numpy(force=True)
