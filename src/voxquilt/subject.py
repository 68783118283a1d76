"""What is one case? A Subject: an id and co-registered images, read when a voxel is asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.errors import InputError
from voxquilt.geometry import Frame, Triple
from voxquilt.nifti import NiftiFile, read_header

DATA = "data"
AFFINE = "affine"
LOCATION = "location"
CHANNELS_DIMENSION = 1
"""The channel axis of a batch (B, C, I, J, K)."""


class Image:
    """A volume (C, I, J, K) and its affine, from a file or a tensor. Use ScalarImage or LabelMap.

    Args:
        path: A NIfTI file; nothing but its header is read until `data` is asked for. A tensor is taken too.
        tensor: (C, I, J, K), or (I, J, K) for one channel, in place of a path.
        affine: (4, 4) voxel indices to mm in RAS; the identity if a tensor comes without.

    Raises:
        InputError: neither or both of path and tensor, a tensor that is not 3-D or 4-D, a degenerate affine.
    """

    def __init__(
        self,
        path: str | Path | Tensor | np.ndarray | None = None,
        *,
        tensor: Tensor | np.ndarray | None = None,
        affine: np.ndarray | Tensor | None = None,
    ) -> None:
        if isinstance(path, (Tensor, np.ndarray)):
            path, tensor = None, path
        if (path is None) == (tensor is None):
            raise InputError(f"{type(self).__name__} needs a path or a tensor, and not both.")
        if path is not None and affine is not None:
            raise InputError(f"{path}: a file brings its own affine; give one only with a tensor.")
        self.path = None if path is None else Path(path).expanduser()
        self._file: NiftiFile | None = None
        self._data = None if tensor is None else _four_axes(tensor)
        self._frame = None if self._data is None else Frame(_spatial(self._data), _to_numpy(affine))

    @property
    def file(self) -> NiftiFile:
        """The file's header, read once.

        Raises:
            InputError: the image is a tensor, or the file cannot be used.
        """
        if self.path is None:
            raise InputError("this image is a tensor: it has no file.")
        if self._file is None:
            self._file = read_header(self.path)
        return self._file

    @property
    def frame(self) -> Frame:
        """Shape and affine; reads the header at most."""
        return self._frame if self._frame is not None else self.file.frame

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, I, J, K); reads the header at most."""
        channels = len(self._data) if self._data is not None else self.file.channels
        return (channels, *self.frame.shape)

    @property
    def spatial_shape(self) -> Triple:
        """(I, J, K); reads the header at most."""
        return self.frame.shape

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) voxel indices to mm in RAS; reads the header at most."""
        return self.frame.affine

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel sizes along i, j, k in mm; reads the header at most."""
        return self.frame.spacing

    def stored(self) -> Shaped[Tensor, "c i j k"]:
        """The voxels in the type that the file has, not kept: what pipelines read, since it is small."""
        return self._data if self._data is not None else self.file.read()

    @property
    def data(self) -> Shaped[Tensor, "c i j k"]:
        """The voxels, read at the first use and kept."""
        if self._data is None:
            self._data = self._converted(self.file.read())
        return self._data

    def _converted(self, stored: Tensor) -> Tensor:
        raise NotImplementedError

    def __getitem__(self, key: str) -> Any:
        values = {DATA: lambda: self.data, AFFINE: lambda: self.affine}
        if key not in values:
            raise KeyError(f"an image has {DATA!r} and {AFFINE!r}, not {key!r}")
        return values[key]()

    def __repr__(self) -> str:
        where = f"path: {self.path}" if self.path is not None else f"tensor: {tuple(self.shape)}"
        return f"{type(self).__name__}({where})"


class ScalarImage(Image):
    """Intensities: float32 when they come from a file; a tensor keeps its type."""

    def _converted(self, stored: Tensor) -> Tensor:
        return stored.float().contiguous()


class LabelMap(Image):
    """Labels: the type of the file is kept, and they are never interpolated linearly."""

    def _converted(self, stored: Tensor) -> Tensor:
        return stored.contiguous()


class Subject(dict[str, Any]):
    """Images that share one frame, and any other values: `Subject(t1=ScalarImage('t1.nii.gz'), age=42)`.

    Raises:
        InputError: no image among the values.
    """

    def __init__(self, mapping: dict[str, Any] | None = None, /, **values: Any) -> None:
        super().__init__({**(mapping or {}), **values})
        if not self.images:
            raise InputError("a Subject needs at least one image, such as t1=ScalarImage('t1.nii.gz').")

    @property
    def images(self) -> dict[str, Image]:
        """The images by name."""
        return {name: value for name, value in self.items() if isinstance(value, Image)}

    @property
    def frame(self) -> Frame:
        """The frame that all images share.

        Raises:
            InputError: two images differ in shape or affine; both are named.
        """
        (first, reference), *others = self.images.items()
        for name, image in others:
            if not reference.frame.matches(image.frame):
                affine = reference.spatial_shape == image.spatial_shape  # else it is not what has to be looked at
                raise InputError(
                    f"images {first!r} and {name!r} of one subject lie on different grids: "
                    f"{_described(reference, affine=affine)}; {_described(image, affine=affine)}. "
                    f"Resample one onto the other."
                )
        return reference.frame

    @property
    def spatial_shape(self) -> Triple:
        """(I, J, K) of all images."""
        return self.frame.shape

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, I, J, K) of the first image."""
        return (next(iter(self.images.values())).shape[0], *self.frame.shape)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel sizes along i, j, k in mm, of all images."""
        return self.frame.spacing

    def __repr__(self) -> str:
        return f"{type(self).__name__}(Keys: {tuple(self.keys())}; images: {len(self.images)})"


def _four_axes(tensor: Tensor | np.ndarray) -> Tensor:
    if isinstance(tensor, np.ndarray):
        # torch takes neither foreign byte orders nor negative strides, and warns of memory that it may not write.
        array = tensor.astype(tensor.dtype.newbyteorder("="), copy=False)
        tensor = array if array.flags.writeable and min(array.strides, default=0) >= 0 else array.copy()
    tensor = torch.as_tensor(tensor)
    if tensor.ndim not in (3, 4) or 0 in tensor.shape:
        raise InputError(f"an image is (C, I, J, K) or (I, J, K), no axis empty; this one is {tuple(tensor.shape)}.")
    return tensor[None] if tensor.ndim == 3 else tensor


def _spatial(tensor: Tensor) -> Triple:
    _, i, j, k = tensor.shape
    return i, j, k


def _to_numpy(affine: np.ndarray | Tensor | None) -> np.ndarray:
    return np.eye(4) if affine is None else np.asarray(affine, dtype=np.float64)


def _described(image: Image, *, affine: bool) -> str:
    spacing = ", ".join(f"{mm:.5g}" for mm in image.spacing)
    rows = f", affine {np.round(image.affine[:3], 4).tolist()}" if affine else ""
    return f"{image.path or 'a tensor'} has shape {image.spatial_shape}, spacing ({spacing}) mm{rows}"
