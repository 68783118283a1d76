"""Reads volumes from NIfTI files and writes them; written files are complete or absent, and keep the input's header."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.imageclasses import all_image_classes
from nibabel.nifti1 import Nifti1Extension, Nifti1Header, Nifti1Image, Nifti1Pair
from nibabel.nifti2 import Nifti2Header, Nifti2Image
from nibabel.spatialimages import HeaderDataError
from torch import Tensor

from voxquilt.data.formats.gzip import MAGIC, first_bytes, is_packed, packing, stored
from voxquilt.data.formats.image_file import WIDER, ImageHeader, check_file, naming, to_tensor
from voxquilt.data.formats.unsupported import conversion
from voxquilt.errors import InputError
from voxquilt.filesystem import replacing
from voxquilt.geometry.frame import Frame

# Units per mm, by the code in the lowest three bits of xyzt_units (meter, micron); any other code counts as mm.
_PER_MM = {1: 1e-3, 3: 1e3}
# A quaternion stored with three digits is shorter than this; a longer one is not a rounded rotation.
_LONGEST = 1.01
# By how much the square of a unit quaternion's length may exceed 1 in float32, as nibabel has it: a normalised one lies
# within, so that a written affine is read back as it was.
_ROUNDING = 3 * float(np.finfo(np.float32).eps)
# DEFLATE packs at most so many bytes into one; a header that claims more is wrong.
_MOST_PACKED = 1032


@dataclass(frozen=True)
class NiftiFile:
    """A NIfTI file whose header has been read.

    Args:
        path: The file.
        channels: Volumes along the 4th axis, or components along the 5th; 1 for a 3-D file.
        frame: Native shape and affine, in mm whatever the header's unit.
        header: nibabel's header, from which outputs take qform, sform, their codes and units.
        voxels: The file that holds the voxels: the path itself, or the .img of a pair.
        voxel_bytes: Bytes per voxel and channel as `read` returns them.
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
        """(C, I, J, K) in the stored type; float32 if the header scales, a wider type where torch lacks the stored one.

        Raises:
            InputError: the file is truncated, damaged or gone, or holds unsigned integers beyond int64.
        """
        problem = "reading its voxels failed; the file may be truncated or damaged"
        spec = self.header.get_data_shape(), self.header.get_data_dtype(), _offset(self.header)
        with naming(self.path, problem):
            array = stored(self.voxels, *spec).reshape((*self.frame.shape, self.channels), order="F")
            scaling = _scaling(self.header)
            return to_tensor(array if scaling == (1, 0) else _scaled(array, *scaling)).movedim(3, 0)


def read_header(path: Path | str) -> NiftiFile:
    """Read a header and check that voxquilt can use the volume.

    The affine is brought to mm where the header has microns or meters. Axes of length 1 after the third are dropped,
    so that one vector per voxel, (I, J, K, 1, C), becomes C channels.

    Raises:
        InputError: no such file, not NIfTI, fewer than three axes or several after the third, an empty axis, complex
            or RGB voxels, a degenerate affine, or a file that is smaller than its header says.
    """
    path = Path(path)
    with naming(path, "it is not a NIfTI file that can be read"):
        check_file(path)
        header, voxels = _load(path)
        shape, dtype = header.get_data_shape(), np.dtype(header.get_data_dtype())
        spatial, channels = _axes(shape)
        if dtype.kind not in "iuf":
            kind = "complex" if dtype.kind == "c" else "RGB"
            raise InputError(f"the voxels are {kind} ({dtype}); convert the file to real numbers, one per channel.")
        read_as = np.float32 if _scaling(header) != (1, 0) else WIDER.get(f"{dtype.kind}{dtype.itemsize}", dtype)
        frame = Frame(spatial, _affine(header))
        _check_size(voxels, _offset(header) + prod(shape) * dtype.itemsize, f"{'x'.join(map(str, shape))} {dtype.name}")
        return NiftiFile(path, channels, frame, header, voxels, np.dtype(read_as).itemsize)


class Nifti:
    """The entry of NIfTI in the registry of file formats."""

    def read_header(self, path: Path) -> ImageHeader:
        file = read_header(path)
        return ImageHeader(file.shape, file.frame.affine, file.voxel_bytes, file.header)

    def read(self, path: Path) -> Tensor:
        return read_header(path).read()


NIFTI = Nifti()


def write(
    path: Path,
    data: np.ndarray,
    frame: Frame,
    *,
    header: Nifti1Header | None = None,
    label_names: Mapping[int, str] | None = None,
    slope: float | None = None,
) -> None:
    """Write a volume; the file appears under its name only when it is complete.

    Files of equal volumes have equal headers and voxels, and hold neither a name nor a time. The packed bytes of a
    .nii.gz may differ: isal at its fastest level now and then packs equal voxels into other bytes. Compare unpacked
    contents.

    Args:
        path: Ends in .nii or .nii.gz; its folder must exist.
        data: (C, I, J, K); one channel is written as 3-D, several as 4-D with channels last. Or a series (C, T, I, J,
            K), written as 4-D with time last, and then channels. float16, which NIfTI does not have, is written as
            float32.
        frame: The geometry, used where `header` is None.
        header: The input's header, whose affine, qform, sform, codes and units are copied unchanged; for a series also
            the time between volumes, and of the first.
        label_names: Names of labels by number, written to a header extension as JSON.
        slope: What readers multiply voxels by, for the header; None for 1.

    Raises:
        OutputError: the file cannot be written; no partial file is left.
    """
    array = np.moveaxis(data, 1, 4) if data.ndim == 5 else data
    array = array[0] if len(data) == 1 else np.moveaxis(array, 0, -1)
    new = _new_header(array, frame, header, is_series=data.ndim == 5)
    if label_names:
        names = {"labels": {str(number): name for number, name in label_names.items()}}
        new.extensions.append(Nifti1Extension(6, json.dumps(names, ensure_ascii=False).encode()))
    image = (Nifti2Image if isinstance(new, Nifti2Header) else Nifti1Image)(array, None, new)
    if slope is not None:  # here, since making an image drops it
        image.header.set_slope_inter(slope, 0)
    with replacing(path) as file:
        if path.name.endswith(".gz"):
            with packing(file) as packed:
                image.to_stream(packed)
        else:
            image.to_stream(file)


def _new_header(
    array: np.ndarray, frame: Frame, source: Nifti1Header | None, *, is_series: bool = False
) -> Nifti1Header:
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
    new.set_data_dtype(np.float32 if array.dtype == np.float16 else array.dtype)
    new["pixdim"][4:] = 1 if array.ndim >= 4 else 0
    if is_series and source is not None:
        new["pixdim"][4], new["toffset"] = source["pixdim"][4], source["toffset"]
    return new


def _load(path: Path) -> tuple[Nifti1Header, Path]:
    """The header, and the file that holds the voxels. Extensions are not read, since outputs do not copy them."""
    sniff = None
    for kind in all_image_classes:
        matches, sniff = kind.path_maybe_image(path, sniff)
        if not matches:
            continue
        if not issubclass(kind, Nifti1Pair):  # base of Nifti1Image, Nifti2Pair and Nifti2Image
            raise InputError(
                conversion(path) or f"it is {kind.__name__}, not NIfTI; convert it, since its orientation is ambiguous."
            )
        files = kind.filespec_to_file_map(path)
        header_path, voxels = (
            Path(str(files[role].filename)) for role in ("header" if "header" in files else "image", "image")
        )
        header_class = kind.header_class
        return header_class(first_bytes(header_path, header_class.template_dtype.itemsize)), voxels
    if advice := conversion(path):
        raise InputError(advice)
    raise ImageFileError(f"its first bytes are not a NIfTI header{_misnamed(path)}")


def _misnamed(path: Path) -> str:
    """What to do about a file whose name does not say whether it is packed."""
    with open(path, "rb") as file:
        looks_packed = file.read(len(MAGIC)) == MAGIC
    if looks_packed == is_packed(path):
        return ""
    return "; gzip has packed it: let its name end in .gz" if looks_packed else "; gzip has not packed it, as .gz says"


def _axes(shape: tuple[int, ...]) -> tuple[tuple[int, int, int], int]:
    """(I, J, K) and channels of a stored shape."""
    if len(shape) < 3:
        raise InputError(
            f"the data is {len(shape)}-D, {shape}; voxquilt takes 3-D, or 4-D with channels last. Save a slice with a "
            f"third axis of one voxel (in NumPy, data[:, :, None])."
        )
    if 0 in shape:
        raise InputError(f"the data has an axis without voxels: {shape}.")
    after = [n for n in shape[3:] if n != 1]
    if len(after) > 1 or min(after, default=1) < 0:
        raise InputError(f"the data is {len(shape)}-D, {shape}; voxquilt takes one axis of channels after i, j, k.")
    i, j, k = (int(n) for n in shape[:3])
    return (i, j, k), int(after[0]) if after else 1


def _affine(header: Nifti1Header) -> np.ndarray:
    """Voxel indices to mm. A quaternion longer than 1 by rounding is normalised, in the header as well, since programs
    that read outputs are as strict as nibabel."""
    if header["sform_code"] == 0 and header["qform_code"] != 0:
        fields = ("quatern_b", "quatern_c", "quatern_d")
        quaternion = np.array([header[field] for field in fields], dtype=np.float64)
        length = float(np.linalg.norm(quaternion))
        if length > _LONGEST:
            raise HeaderDataError(f"its quaternion has length {length:.4g}; that of a rotation is at most 1")
        if length**2 > 1 + _ROUNDING:
            for field, value in zip(fields, quaternion / length, strict=True):
                header[field] = value
    affine = np.array(header.get_best_affine(), dtype=np.float64)
    affine[:3] /= _PER_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    return affine


def _offset(header: Nifti1Header) -> int:
    """Where voxels begin. An offset of 0 in a single file was not set: voxels follow the header."""
    offset = int(header.get_data_offset())
    return header.single_vox_offset if header.is_single and offset == 0 else offset


def _scaling(header: Nifti1Header) -> tuple[float, float]:
    slope, inter = header.get_slope_inter()
    return (1.0 if slope is None else float(slope)), (0.0 if inter is None else float(inter))


def _check_size(voxels: Path, wanted: int, described: str) -> None:
    """Raise InputError where a header claims more voxels than its file can hold, before anything is planned with it."""
    if not voxels.is_file():
        raise InputError(f"there is no file with its voxels: {voxels}.")
    size = voxels.stat().st_size
    most = size * _MOST_PACKED if is_packed(voxels) else size
    if wanted > most:
        packed = f", which can be {most} at most unpacked" if most != size else ""
        raise InputError(
            f"the file is smaller than its header says: {described} voxels need {wanted} bytes with the header, and it "
            f"has {size}{packed}. It is truncated, or its header is wrong."
        )


def _scaled(array: np.ndarray, slope: float, inter: float) -> np.ndarray:
    # float32 holds every value of 16 bits, so the float64 volume that nibabel makes is not needed there.
    small = array.dtype.itemsize <= 2 or array.dtype == np.float32
    scaled = array.astype(np.float32 if small else np.float64)
    scaled *= slope
    scaled += inter
    return scaled.astype(np.float32, copy=False)
