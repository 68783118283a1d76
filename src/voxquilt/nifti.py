"""How do volumes come out of NIfTI files and go back into them? Headers are kept, and writing is all or nothing."""

import contextlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from isal import igzip, igzip_lib
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Extension, Nifti1Header, Nifti1Image, Nifti1Pair
from nibabel.nifti2 import Nifti2Header, Nifti2Image
from nibabel.spatialimages import HeaderDataError
from torch import Tensor

from voxquilt.atomic import replacing
from voxquilt.errors import InputError
from voxquilt.geometry import Frame

# torch computes on few unsigned types, so the others are widened; the file's own type is kept by the header.
_WIDER = {"u2": np.int32, "u4": np.int64, "f2": np.float32, "f16": np.float64, "f12": np.float64}
_UNPACK_ERROR: Any = igzip_lib.IsalError  # isal's stub has an instance where the class is
_READ_ERRORS = (ImageFileError, OSError, EOFError, zlib.error, _UNPACK_ERROR, ValueError, KeyError, HeaderDataError)


@dataclass(frozen=True)
class NiftiFile:
    """What a file says of its volume before a voxel is read.

    Args:
        path: The file.
        channels: Volumes along the 4th axis, 1 for a 3-D file.
        frame: Native shape and affine.
        header: nibabel's header, from which outputs take qform, sform, their codes and units.
        voxel_bytes: Of a voxel as `read` gives it.
    """

    path: Path
    channels: int
    frame: Frame
    header: Nifti1Header
    voxel_bytes: int = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, I, J, K)."""
        return (self.channels, *self.frame.shape)

    def read(self) -> Tensor:
        """(C, I, J, K) in the stored type; float32 if the header scales, the next wider type if torch lacks the stored.

        Raises:
            InputError: the file is truncated, damaged or gone, or holds unsigned integers beyond int64.
        """
        problem = "reading its voxels failed; the file may be truncated or damaged"
        with _named(self.path, problem), _to_the_end(_load(self.path).dataobj) as proxy:  # type: ignore[arg-type]
            array = np.asarray(proxy.get_unscaled())
            scaling = float(proxy.slope), float(proxy.inter)
            return _to_tensor(array if scaling == (1, 0) else _scaled(array, *scaling))


def read_header(path: Path | str) -> NiftiFile:
    """Read a header and check that voxquilt can use the volume.

    Raises:
        InputError: no such file, not NIfTI, not 3-D or 4-D, an empty axis, complex or RGB voxels, a degenerate affine.
    """
    path = Path(path)
    with _named(path, "it is not a NIfTI file that can be read"):
        if not path.is_file():
            raise InputError("there is no such file.")
        if not path.stat().st_size:
            raise InputError("the file is empty.")
        image = _load(path)
        shape, dtype = image.shape, np.dtype(image.get_data_dtype())
        if len(shape) not in (3, 4):
            raise InputError(f"the data is {len(shape)}-D, {shape}; voxquilt takes 3-D, or 4-D with channels last.")
        if 0 in shape:
            raise InputError(f"the data has an axis without voxels: {shape}.")
        if dtype.kind not in "iuf":
            kind = "complex" if dtype.kind == "c" else "RGB"
            raise InputError(f"the voxels are {kind} ({dtype}); convert the file to real numbers, one per channel.")
        i, j, k = (int(n) for n in shape[:3])
        frame = Frame((i, j, k), np.asarray(image.affine))
        scaled = (image.dataobj.slope, image.dataobj.inter) != (1, 0)  # type: ignore[attr-defined]
        size = 4 if scaled else np.dtype(_WIDER.get(f"{dtype.kind}{dtype.itemsize}", dtype)).itemsize
        return NiftiFile(path, int(shape[3]) if len(shape) == 4 else 1, frame, image.header, size)


def write(
    path: Path,
    data: np.ndarray,
    frame: Frame,
    *,
    header: Nifti1Header | None = None,
    label_names: Mapping[int, str] | None = None,
) -> None:
    """Write a volume beside its input: complete under its final name, or not at all.

    Equal volumes make files of equal headers and voxels, without a name or a time. How a .nii.gz is packed is not
    promised: isal, at its fastest level, now and then packs equal voxels into other bytes. Compare what is unpacked.

    Args:
        path: A name that ends in .nii or .nii.gz; its folder must exist.
        data: (C, I, J, K); one channel is written as 3-D, several as 4-D with channels last. Never scaled.
        frame: The geometry, used when there is no header.
        header: The input's header: affine, qform, sform, codes and units are taken from it as they are.
        label_names: Names of labels by their numbers, put into a header extension as JSON.

    Raises:
        OutputError: the file cannot be written; no partial file is left.
    """
    array = data[0] if len(data) == 1 else np.moveaxis(data, 0, 3)
    new = _new_header(array, frame, header)
    if label_names:
        names = {"labels": {str(number): name for number, name in label_names.items()}}
        new.extensions.append(Nifti1Extension(6, json.dumps(names, ensure_ascii=False).encode()))
    image = (Nifti2Image if isinstance(new, Nifti2Header) else Nifti1Image)(array, None, new)
    with replacing(path) as file:
        if path.name.endswith(".gz"):
            # Level 1: labels compress well anyhow.
            with igzip.IGzipFile(filename="", fileobj=file, mode="wb", compresslevel=1, mtime=0) as packed:
                image.to_stream(packed)
        else:
            image.to_stream(file)


def _new_header(array: np.ndarray, frame: Frame, source: Nifti1Header | None) -> Nifti1Header:
    # NIfTI-1 counts voxels in 16 bits.
    kind = Nifti2Header if isinstance(source, Nifti2Header) or max(array.shape) > 32767 else Nifti1Header
    new = kind()
    if source is None:
        new.set_data_shape(array.shape[:3])
        new.set_sform(frame.affine, code="aligned")
        new["pixdim"][1:4] = frame.spacing
        try:
            new.set_qform(frame.affine, code="aligned", strip_shears=False)
        except HeaderDataError:  # a sheared affine does not fit a qform; then the sform stands alone
            new["qform_code"] = 0
        new.set_xyzt_units("mm")
    else:
        for key in ("pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "xyzt_units"):
            new[key] = source[key]
        for key in ("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "descrip", "aux_file"):
            new[key] = source[key]
    new.set_data_shape(array.shape)
    new.set_data_dtype(array.dtype)
    new["pixdim"][4:] = 1 if array.ndim == 4 else 0
    return new


def _load(path: Path) -> Nifti1Pair:
    image = nib.load(path)
    if not isinstance(image, Nifti1Pair):  # base of Nifti1Image, Nifti2Pair and Nifti2Image
        raise InputError(f"it is {type(image).__name__}, not NIfTI; convert it, since its orientation is not certain.")
    return image


@contextlib.contextmanager
def _to_the_end(proxy: ArrayProxy) -> Iterator[ArrayProxy]:
    """The proxy of a file that is read to its end, where gzip keeps a checksum; nibabel stops at the last voxel."""
    if not str(proxy.file_like).lower().endswith(".gz"):
        yield proxy
        return
    with igzip.open(proxy.file_like) as file:
        yield ArrayProxy(file, (proxy.shape, proxy.dtype, proxy.offset, proxy.slope, proxy.inter))
        while file.read(2**20):
            pass


@contextlib.contextmanager
def _named(path: Path, problem: str) -> Iterator[None]:
    """Errors while reading become one InputError that names the file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except _READ_ERRORS as error:
        detail = str(error).split("\n")[0] or type(error).__name__
        raise InputError(f"{path}: {problem} ({detail}).") from error


def _scaled(array: np.ndarray, slope: float, inter: float) -> np.ndarray:
    # Every value of 16 bits is a float32, so there a volume in float64, as nibabel makes it, is not needed.
    small = array.dtype.itemsize <= 2 or array.dtype == np.float32
    scaled = array.astype(np.float32 if small else np.float64)
    scaled *= slope
    scaled += inter
    return scaled.astype(np.float32, copy=False)


def _to_tensor(array: np.ndarray) -> Tensor:
    dtype = array.dtype
    kind = f"{dtype.kind}{dtype.itemsize}"
    wider = _WIDER.get(kind)
    if kind == "u8":
        if array.max() > np.iinfo(np.int64).max:
            raise InputError("its uint64 voxels do not fit int64.")
        wider = np.int64
    array = array.astype(wider or dtype.newbyteorder("="), copy=False)
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor[None] if tensor.ndim == 3 else tensor.movedim(3, 0)
