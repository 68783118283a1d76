"""Opens image files of any registered format, and names the file in every error that reading it raises."""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from voxquilt.data.formats.registry import FORMATS, entry_of
from voxquilt.errors import InputError
from voxquilt.geometry.frame import Frame

# torch has few operations on most unsigned types, so their values are read as a wider type.
WIDER = {"u2": np.int32, "u4": np.int64, "f2": np.float32, "f16": np.float64, "f12": np.float64}


class ImageHeader(NamedTuple):
    """What a file says about its volume before voxels are read.

    Args:
        shape: (I, J, K) or (C, I, J, K).
        affine: (4, 4) voxel indices to mm in RAS.
        voxel_bytes: Bytes per voxel and channel as `read` returns them.
        nifti: A NIfTI header whose orientation fields outputs take over; None: they are made of the affine.
    """

    shape: tuple[int, ...]
    affine: Any
    voxel_bytes: int = 4
    nifti: Any = None


@runtime_checkable
class FileFormat(Protocol):
    """A format of image files. Whatever these two raise becomes an InputError that names the file."""

    def read_header(self, path: Path) -> tuple[Any, ...]:
        """An ImageHeader, or a tuple of its values. The file exists and is not empty."""
        ...

    def read(self, path: Path) -> Tensor | np.ndarray:
        """The voxels in the shape that the header has, in the stored type."""
        ...


@dataclass(frozen=True)
class ImageFile:
    """An image file whose header has been read.

    Args:
        path: The file.
        channels: Number of channels.
        frame: Native shape and affine, in mm.
        voxel_bytes: Bytes per voxel and channel as `read` returns them.
        header: A NIfTI header whose orientation fields outputs take over, or None.
        read_voxels: Reads the voxels of a path.
    """

    path: Path
    channels: int
    frame: Frame
    voxel_bytes: int
    header: Any
    read_voxels: Callable[[Path], Tensor | np.ndarray]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, I, J, K)."""
        return (self.channels, *self.frame.shape)

    def at(self, channel: int) -> "ImageFile":
        """The file as if it had one of its channels only; it is read whole nonetheless."""
        return replace(self, channels=1, read_voxels=partial(_read_channel, self, channel))

    def read(self) -> Tensor:
        """(C, I, J, K) in the stored type, or in a wider one where torch lacks it.

        Raises:
            InputError: the file is damaged or gone, or its voxels are not what its header says.
        """
        with naming(self.path, "reading its voxels failed; the file may be truncated or damaged"):
            ahead = _AHEAD.pop((self.path, _state_of(self.path)), None)
            voxels = self.read_voxels(self.path) if ahead is None else ahead.result()
            tensor = voxels if isinstance(voxels, Tensor) else to_tensor(np.asarray(voxels))
            tensor = tensor[None] if tensor.ndim == 3 else tensor
            if tuple(tensor.shape) != self.shape:
                raise InputError(f"its voxels have shape {tuple(tensor.shape)}, but its header says {self.shape}.")
            return tensor


def _read_channel(file: ImageFile, channel: int, _: Path) -> Tensor:
    return file.read()[channel : channel + 1]


# Files that are being read before anybody asks for them, each until it is read for the first time.
_AHEAD: dict[tuple[Path, tuple[int, int]], Future[Tensor | np.ndarray]] = {}


def read_ahead(file: ImageFile) -> None:
    """Start to read a file in a thread; the next `read` of its path takes over the voxels, if it has not changed."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="voxquilt-reader")
    _AHEAD[file.path, _state_of(file.path)] = pool.submit(file.read_voxels, file.path)
    pool.shutdown(wait=False)


def drop_read_ahead() -> None:
    """Give up the voxels that nobody has asked for."""
    _AHEAD.clear()


def _state_of(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size


def open_image(path: Path | str) -> ImageFile:
    """Read the header of an image file and check that voxquilt can use the volume.

    Raises:
        InputError: there is no such file, it is empty or damaged, its volume is not 3-D with channels, an axis has no
            voxels, or its affine is degenerate.
    """
    path = Path(path)
    with naming(path, "its header cannot be read"):
        check_file(path)
        file_format = FORMATS.load(entry_of(path.name))
        header = ImageHeader(*file_format.read_header(path))
        if len(header.shape) not in (3, 4) or 0 in header.shape:
            raise InputError(f"its shape is {tuple(header.shape)}; voxquilt reads (I, J, K) or (C, I, J, K).")
        channels, i, j, k = (int(n) for n in ((1, *header.shape) if len(header.shape) == 3 else header.shape))
        pixdim = None if header.nifti is None else header.nifti["pixdim"][1:4]
        zooms = None if pixdim is None else (float(pixdim[0]), float(pixdim[1]), float(pixdim[2]))
        frame = Frame((i, j, k), header.affine, zooms)
        return ImageFile(path, channels, frame, header.voxel_bytes, header.nifti, file_format.read)


def check_file(path: Path) -> None:
    """Check that a path is a file that can be opened and is not empty.

    Raises:
        InputError: it is not; the message does not name the path.
    """
    if os.path.islink(path) and not os.path.exists(path):
        target = os.path.realpath(path)
        if os.path.islink(target):  # what realpath returns for a loop of links
            raise InputError(f"the link points to itself, by way of {os.readlink(path)}; there is no file behind it.")
        raise InputError(f"the link points to {target}, which does not exist.")
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            open(path, "rb").close()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError("there is no such file.") from error
    except OSError as error:
        raise InputError(f"it cannot be opened: {error.strerror}.") from error
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise InputError(f"it is {kinds.get(stat.S_IFMT(status.st_mode), 'a device')}, not a file.")
    if not status.st_size:
        raise InputError("the file is empty.")


@contextlib.contextmanager
def naming(path: Path, problem: str) -> Iterator[None]:
    """Turn every error in the block into an InputError that names the file: damaged bytes raise errors of many kinds.

    Args:
        path: The file.
        problem: What an error other than an InputError means.
    """
    try:
        yield
    except InputError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise InputError(f"{path}: {error}") from error
    except Exception as error:
        detail = str(error).split("\n")[0] or type(error).__name__
        raise InputError(f"{path}: {problem} ({detail}).") from error


def to_tensor(array: np.ndarray) -> Tensor:
    """A tensor of an array's values, in a type that torch computes on.

    Raises:
        InputError: values are not real numbers, or unsigned integers beyond int64.
    """
    dtype = array.dtype
    if dtype.kind not in "biuf":
        raise InputError(f"its voxels are {dtype}; voxquilt reads real numbers.")
    kind = f"{dtype.kind}{dtype.itemsize}"
    wider = np.uint8 if dtype.kind == "b" else WIDER.get(kind)
    if kind == "u8":
        if array.max() > np.iinfo(np.int64).max:
            raise InputError(
                f"its uint64 voxels do not fit int64: the largest is {array.max()}. Convert the file to a type that "
                f"holds its numbers, such as float32 for images."
            )
        wider = np.int64
    array = array.astype(wider or dtype.newbyteorder("="), copy=False)
    usable = array.flags.writeable and min(array.strides, default=0) >= 0  # torch has no negative strides
    return torch.from_numpy(array if usable else array.copy())
