"""Provides images: voxels (C, I, J, K) and an affine, read from a file when they are used."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.data.formats.image_file import ImageFile, open_image
from voxquilt.data.formats.nifti import write
from voxquilt.data.formats.registry import stem
from voxquilt.errors import InputError
from voxquilt.geometry.frame import Frame, Triple

DATA = "data"
AFFINE = "affine"
PATH = "path"
STEM = "stem"
TYPE = "type"
INTENSITY = "intensity"
LABEL = "label"


class Image(dict[str, Any]):
    """A volume (C, I, J, K) and its affine, from a file or a tensor. Use ScalarImage or LabelMap.

    As in TorchIO it is also a dictionary of 'path', 'stem' and 'type', and once it has been read 'data' and 'affine'.

    Args:
        path: An image file, of which only the header is read until `data` is used; or a tensor, or a mapping with
            'data' and 'affine'.
        tensor: (C, I, J, K), or (I, J, K) for one channel, in place of a path.
        affine: (4, 4) voxel indices to mm in RAS of a tensor; None: the tensor's own (as MONAI's MetaTensor has), or
            the identity.

    Raises:
        InputError: neither or both of path and tensor, a tensor that is not 3-D or 4-D, a degenerate affine.
    """

    kind = INTENSITY
    # Images are compared by identity, unlike dictionaries.
    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(
        self,
        path: str | Path | Tensor | np.ndarray | Mapping[str, Any] | None = None,
        *,
        tensor: Tensor | np.ndarray | None = None,
        affine: np.ndarray | Tensor | None = None,
    ) -> None:
        if isinstance(path, Mapping) and {DATA, AFFINE} <= path.keys():
            super().__init__(path)
            path, tensor, affine = None, path[DATA], path[AFFINE]
        if isinstance(path, (Tensor, np.ndarray)):
            path, tensor = None, path
        if (path is None) == (tensor is None):
            raise InputError(f"{type(self).__name__} needs a path or a tensor, and not both.")
        if path is not None and affine is not None:
            raise InputError(f"{path}: a file has its own affine; give one only with a tensor.")
        self.path = None if path is None else Path(path).expanduser()  # type: ignore[arg-type]
        self._file: ImageFile | None = None
        self._held: Tensor | None = None
        name = "" if self.path is None else stem(self.path)
        super().__init__({PATH: str(self.path or ""), STEM: name, **self, TYPE: self.kind})
        if tensor is not None:
            affine = to_affine(tensor) if affine is None else _to_numpy(affine)
            self[DATA] = _to_four_axes(tensor)
            self[AFFINE] = Frame(_spatial(self[DATA].shape), affine).affine

    @property
    def file(self) -> ImageFile:
        """The image's file, whose header is read once.

        Raises:
            InputError: the image is a tensor, or the file cannot be used.
        """
        if self.path is None:
            raise InputError("this image is a tensor: it has no file.")
        if self._file is None:
            self._file = open_image(self.path)
        return self._file

    @property
    def frame(self) -> Frame:
        """Shape and affine; reads no more than the header."""
        return Frame(_spatial(self[DATA].shape), _to_numpy(self[AFFINE])) if DATA in self else self.file.frame

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, I, J, K); reads no more than the header."""
        channels = len(self[DATA]) if DATA in self else self.file.channels
        return (channels, *self.frame.shape)

    @property
    def spatial_shape(self) -> Triple:
        """(I, J, K); reads no more than the header."""
        return self.frame.shape

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) voxel indices to mm in RAS; reads no more than the header."""
        return self.frame.affine

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel sizes along i, j, k in mm; reads no more than the header."""
        return self.frame.spacing

    def stored(self) -> Shaped[Tensor, "c i j k"]:
        """The voxels in the file's type, which takes little memory; they are not kept, except by `hold`."""
        if self._held is not None:
            return self._held
        return self[DATA] if DATA in self else self.file.read()

    @property
    def is_in_memory(self) -> bool:
        """Whether `stored` need not read the file."""
        return self._held is not None or DATA in self

    def hold(self) -> None:
        """Read the voxels in the file's type, and keep them for all later calls of `stored`."""
        self._held = self.stored()

    @property
    def data(self) -> Shaped[Tensor, "c i j k"]:
        """The voxels, read at first use and kept."""
        self.load()
        return self[DATA]

    @property
    def tensor(self) -> Shaped[Tensor, "c i j k"]:
        """The same as `data`."""
        return self.data

    def numpy(self) -> Shaped[np.ndarray, "c i j k"]:
        """The voxels as an array."""
        return self.data.numpy(force=True)

    def load(self) -> None:
        """Read the voxels, unless they have been read."""
        if DATA not in self:
            self.update({DATA: self._converted(self.stored()), AFFINE: self.affine})

    def set_data(self, tensor: Tensor | np.ndarray) -> None:
        """Replace the voxels by (C, I, J, K); the affine stays."""
        self.update({AFFINE: self.affine, DATA: _to_four_axes(tensor)})

    def save(self, path: str | Path) -> None:
        """Write a .nii or .nii.gz, which appears only when it is complete.

        Raises:
            InputError: another suffix.
            OutputError: the file cannot be written.
        """
        path = Path(path).expanduser()
        if not path.name.endswith((".nii", ".nii.gz")):
            raise InputError(f"{path}: an image is saved as .nii or .nii.gz.")
        write(path, _storable(self.data).numpy(force=True), self.frame)

    def at(self, channel: int) -> "Image":
        """One channel of an image of a file; of voxels that are held, without reading."""
        new = type(self).__new__(type(self))
        new.path, new._file = self.path, self.file.at(channel)
        new._held = None if self._held is None else self._held[channel : channel + 1]
        new.update({PATH: self[PATH], STEM: self[STEM], TYPE: self.kind})
        return new

    def part(self, data: Shaped[Tensor, "c i j k"], affine: np.ndarray) -> "Image":
        """A part of this image, such as a patch, with the path and name of the image."""
        new = type(self).__new__(type(self))
        new.path, new._file, new._held = self.path, None, None
        new.update({**self, DATA: data, AFFINE: affine})
        return new

    def _converted(self, stored: Tensor) -> Tensor:
        raise NotImplementedError

    def __missing__(self, key: str) -> Any:
        if key not in (DATA, AFFINE):
            raise KeyError(f"an image has {DATA!r} and {AFFINE!r}, not {key!r}; its keys are {list(self)}")
        return self.data if key == DATA else self.affine

    def __repr__(self) -> str:
        where = f"path: {self.path}" if self.path is not None else f"tensor: {tuple(self.shape)}"
        return f"{type(self).__name__}({where})"


class ScalarImage(Image):
    """Intensities: float32 when they come from a file; a tensor keeps its type."""

    def _converted(self, stored: Tensor) -> Tensor:
        return stored.float().contiguous()


class LabelMap(Image):
    """Labels: the type of the file is kept, and they are never interpolated linearly."""

    kind = LABEL

    def _converted(self, stored: Tensor) -> Tensor:
        return stored.contiguous()


def _to_four_axes(tensor: Tensor | np.ndarray) -> Tensor:
    if isinstance(tensor, np.ndarray):
        # torch accepts neither foreign byte orders nor negative strides, and warns about read-only memory.
        array = tensor.astype(tensor.dtype.newbyteorder("="), copy=False)
        tensor = array if array.flags.writeable and min(array.strides, default=0) >= 0 else array.copy()
    tensor = torch.as_tensor(tensor).as_subclass(Tensor)  # a subclass such as MONAI's would turn every result into one
    if tensor.ndim not in (3, 4) or 0 in tensor.shape:
        batch = " Select one volume of a batch, such as batch[0]." if tensor.ndim == 5 else ""
        raise InputError(
            f"an image is (C, I, J, K) or (I, J, K) without empty axes; this one is {tuple(tensor.shape)}.{batch}"
        )
    return tensor[None] if tensor.ndim == 3 else tensor


def _spatial(shape: Sequence[int]) -> Triple:
    _, i, j, k = shape
    return i, j, k


def to_affine(tensor: Any) -> np.ndarray:
    """The (4, 4) affine in RAS of a tensor that has one, as MONAI's MetaTensor does; else the identity."""
    affine = getattr(tensor, "affine", None)
    if affine is None:
        return np.eye(4)
    # MONAI's reader of ITK's formats has an option to keep their axes.
    left = "LPS" in str((getattr(tensor, "meta", None) or {}).get("space"))
    return np.diag([-1.0, -1, 1, 1] if left else [1.0] * 4) @ _to_numpy(affine)


def _to_numpy(affine: np.ndarray | Tensor) -> np.ndarray:
    array = affine.numpy(force=True) if isinstance(affine, Tensor) else affine
    return np.asarray(array, dtype=np.float64)


def _storable(data: Tensor) -> Tensor:
    """The voxels in a type that NIfTI has."""
    if data.dtype == torch.bool:
        return data.byte()
    return data.float() if data.dtype in (torch.float16, torch.bfloat16) else data
