"""How do volumes come out of NIfTI files and go back into them? Headers are kept, and writing is all or nothing."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from isal import igzip
from nibabel.filebasedimages import ImageFileError
from nibabel.imageclasses import all_image_classes
from nibabel.nifti1 import Nifti1Extension, Nifti1Header, Nifti1Image, Nifti1Pair
from nibabel.nifti2 import Nifti2Header, Nifti2Image
from nibabel.spatialimages import HeaderDataError
from torch import Tensor

from voxquilt.data.formats.gzip import first_bytes, is_packed, stored
from voxquilt.data.formats.unsupported import conversion
from voxquilt.errors import InputError
from voxquilt.filesystem import replacing
from voxquilt.geometry.frame import Frame

# torch computes on few unsigned types, so the others are widened; the file's own type is kept by the header.
_WIDER = {"u2": np.int32, "u4": np.int64, "f2": np.float32, "f16": np.float64, "f12": np.float64}
# Units in one mm, by the code in a header's lowest three bits (meter, micron); any other code is taken for mm.
_PER_MM = {1: 1e-3, 3: 1e3}
# A quaternion that was stored with three digits is longer than 1 by less than this; a longer one is no rotation.
_LONGEST = 1.01
# DEFLATE never packs more bytes into one; a file that claims more than that holds less than its header says.
_MOST_PACKED = 1032


@dataclass(frozen=True)
class NiftiFile:
    """What a file says of its volume before a voxel is read.

    Args:
        path: The file.
        channels: Of a voxel: volumes along the 4th axis, or components along the 5th; 1 for a 3-D file.
        frame: Native shape and affine, in mm whatever unit the header has.
        header: nibabel's header, from which outputs take qform, sform, their codes and units.
        voxels: The file that holds the voxels: the path itself, or the .img of a pair.
        voxel_bytes: Of a voxel as `read` gives it.
    """

    path: Path
    channels: int
    frame: Frame
    header: Nifti1Header
    voxels: Path
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
        spec = self.header.get_data_shape(), self.header.get_data_dtype(), _offset(self.header)
        with _named(self.path, problem):
            array = stored(self.voxels, *spec).reshape((*self.frame.shape, self.channels), order="F")
            scaling = _scaling(self.header)
            return _to_tensor(array if scaling == (1, 0) else _scaled(array, *scaling))


def read_header(path: Path | str) -> NiftiFile:
    """Read a header and check that voxquilt can use the volume.

    The affine is brought to mm where the header has microns or meters. Axes of one voxel behind the third are dropped,
    so that a vector a voxel, (I, J, K, 1, C), is C channels.

    Raises:
        InputError: no such file, not NIfTI, fewer than three axes or several behind the third, an empty axis, complex
            or RGB voxels, a degenerate affine, or a file that is smaller than its header says.
    """
    path = Path(path)
    with _named(path, "it is not a NIfTI file that can be read"):
        _check_file(path)
        header, voxels = _load(path)
        shape, dtype = header.get_data_shape(), np.dtype(header.get_data_dtype())
        spatial, channels = _axes(shape)
        if dtype.kind not in "iuf":
            kind = "complex" if dtype.kind == "c" else "RGB"
            raise InputError(f"the voxels are {kind} ({dtype}); convert the file to real numbers, one per channel.")
        size = (
            4 if _scaling(header) != (1, 0) else np.dtype(_WIDER.get(f"{dtype.kind}{dtype.itemsize}", dtype)).itemsize
        )
        frame = Frame(spatial, _affine(header))
        _check_size(voxels, _offset(header) + prod(shape) * dtype.itemsize, f"{'x'.join(map(str, shape))} {dtype.name}")
        return NiftiFile(path, channels, frame, header, voxels, size)


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


def _check_file(path: Path) -> None:
    if os.path.islink(path) and not os.path.exists(path):
        aim = os.path.realpath(path)
        if os.path.islink(aim):  # what a loop of links comes to
            raise InputError(f"the link points to itself, by way of {os.readlink(path)}; there is no file behind it.")
        raise InputError(f"the link points to {aim}, which is not there.")
    try:
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):
            open(path, "rb").close()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError("there is no such file.") from error
    except OSError as error:
        raise InputError(f"it cannot be opened: {error.strerror}.") from error
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise InputError(f"it is {kinds.get(stat.S_IFMT(found.st_mode), 'a device')}, not a file.")
    if not found.st_size:
        raise InputError("the file is empty.")


def _load(path: Path) -> tuple[Nifti1Header, Path]:
    """A header, and the file that holds the voxels. Extensions are not read, since outputs do not take them over."""
    sniff = None
    for kind in all_image_classes:
        fits, sniff = kind.path_maybe_image(path, sniff)
        if not fits:
            continue
        if not issubclass(kind, Nifti1Pair):  # base of Nifti1Image, Nifti2Pair and Nifti2Image
            raise InputError(
                conversion(path)
                or f"it is {kind.__name__}, not NIfTI; convert it, since its orientation is not certain."
            )
        files = kind.filespec_to_file_map(path)
        header_path, voxels = (
            Path(str(files[role].filename)) for role in ("header" if "header" in files else "image", "image")
        )
        header_class = kind.header_class
        return header_class(first_bytes(header_path, header_class.template_dtype.itemsize)), voxels
    if advice := conversion(path):
        raise InputError(advice)
    raise ImageFileError("its first bytes are no header of NIfTI")


def _axes(shape: tuple[int, ...]) -> tuple[tuple[int, int, int], int]:
    """(I, J, K) and channels of a stored shape."""
    if len(shape) < 3:
        raise InputError(f"the data is {len(shape)}-D, {shape}; voxquilt takes 3-D, or 4-D with channels last.")
    if 0 in shape:
        raise InputError(f"the data has an axis without voxels: {shape}.")
    behind = [n for n in shape[3:] if n != 1]
    if len(behind) > 1 or min(behind, default=1) < 0:
        raise InputError(f"the data is {len(shape)}-D, {shape}; voxquilt takes one axis of channels behind i, j, k.")
    i, j, k = (int(n) for n in shape[:3])
    return (i, j, k), int(behind[0]) if behind else 1


def _affine(header: Nifti1Header) -> np.ndarray:
    """Voxel indices to mm. A quaternion that is too long by rounding is shortened, in the header as well, since
    programs that read outputs are no less strict than nibabel."""
    if header["sform_code"] == 0 and header["qform_code"] != 0:
        fields = ("quatern_b", "quatern_c", "quatern_d")
        quaternion = np.array([header[field] for field in fields], dtype=np.float64)
        length = float(np.linalg.norm(quaternion))
        if length > _LONGEST:
            raise HeaderDataError(f"its quaternion has length {length:.4g}, and no rotation has more than 1")
        if length > 1:
            for field, value in zip(fields, quaternion / length, strict=True):
                header[field] = value
    affine = np.array(header.get_best_affine(), dtype=np.float64)
    affine[:3] /= _PER_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    return affine


def _offset(header: Nifti1Header) -> int:
    """Where voxels begin. 0 in a single file would be the header itself: it was not set, and they follow the header."""
    offset = int(header.get_data_offset())
    return header.single_vox_offset if header.is_single and offset == 0 else offset


def _scaling(header: Nifti1Header) -> tuple[float, float]:
    slope, inter = header.get_slope_inter()
    return (1.0 if slope is None else float(slope)), (0.0 if inter is None else float(inter))


def _check_size(voxels: Path, wanted: int, described: str) -> None:
    """Before anything is planned with it, a header must not claim more than its file can hold."""
    if not voxels.is_file():
        raise InputError(f"its voxels are not there: {voxels}.")
    size = voxels.stat().st_size
    most = size * _MOST_PACKED if is_packed(voxels) else size
    if wanted > most:
        packed = f", which can be {most} at most unpacked" if most != size else ""
        raise InputError(
            f"the file is smaller than its header says: {described} voxels need {wanted} bytes with the header, and it "
            f"has {size}{packed}. It was cut off, or its header is wrong."
        )


@contextlib.contextmanager
def _named(path: Path, problem: str) -> Iterator[None]:
    """Errors while reading become one InputError that names the file: nibabel raises many kinds of odd bytes."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:
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
            raise InputError(
                f"its uint64 voxels do not fit int64: the largest is {array.max()}. Convert the file to a type that "
                f"holds its numbers, such as float32 for images."
            )
        wider = np.int64
    array = array.astype(wider or dtype.newbyteorder("="), copy=False)
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor.movedim(3, 0)
