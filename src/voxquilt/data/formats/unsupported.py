"""Recognises image files of formats that voxquilt does not read, and tells how to convert them to NIfTI."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from voxquilt.data.formats.registry import suffix_of


class _Format(NamedTuple):
    """A format's name, and what converts it to NIfTI."""

    name: str
    convert: str


WITHOUT = "without an extension"
"""In place of the suffix, of DICOM files that are recognised by their contents."""
_DICOM = _Format("DICOM", "dcm2niix -z y -o <folder> <DICOM folder>")
_ITK = "SimpleITK.WriteImage(SimpleITK.ReadImage(path), 'name.nii.gz')"
_NIBABEL = "nibabel.Nifti1Image.from_image(nibabel.load(path)).to_filename('name.nii.gz')"
_FREESURFER = _Format("FreeSurfer", f"mri_convert name.mgz name.nii.gz, or {_NIBABEL}")
_FORMATS = {
    WITHOUT: _DICOM,
    ".dcm": _DICOM,
    ".dicom": _DICOM,
    ".ima": _DICOM,
    ".nrrd": _Format("NRRD", _ITK),
    ".nhdr": _Format("NRRD", _ITK),
    ".mha": _Format("MetaImage", _ITK),
    ".mhd": _Format("MetaImage", _ITK),
    ".mgz": _FREESURFER,
    ".mgh": _FREESURFER,
    ".mnc": _Format("MINC", f"mnc2nii name.mnc, or {_NIBABEL}"),
    ".par": _Format("Philips PAR/REC", "parrec2nii name.PAR, or dcm2niix"),
    ".gipl": _Format("GIPL", _ITK),
    ".tif": _Format("TIFF", _ITK),
    ".tiff": _Format("TIFF", _ITK),
    ".npy": _Format("NumPy", "nibabel.Nifti1Image(array, affine).to_filename('name.nii.gz')"),
    ".npz": _Format("NumPy", "nibabel.Nifti1Image(array, affine).to_filename('name.nii.gz')"),
    ".nii.bz2": _Format("NIfTI packed by bzip2", "bunzip2 name.nii.bz2"),
    ".nii.zst": _Format("NIfTI packed by Zstandard", "unzstd name.nii.zst"),
    ".nii.xz": _Format("NIfTI packed by xz", "unxz name.nii.xz"),
    ".nii.zip": _Format("NIfTI packed by zip", "unzip name.nii.zip"),
}


def foreign_suffix(name: str) -> str:
    """The suffix of an image file of a format that voxquilt does not read; '' for any other file.

    >>> foreign_suffix("brain.MGZ")
    '.mgz'
    """
    lower = name.lower()
    if suffix_of(lower):  # a package reads it
        return ""
    return next((suffix for suffix in _FORMATS if lower.endswith(suffix)), "")


def is_dicom(path: Path) -> bool:
    """Whether a file begins like DICOM, which scanners also write without a suffix."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def conversion(path: Path) -> str:
    """A sentence that names a file's format and how to convert it; '' if its suffix is not of another format."""
    unsupported = _FORMATS.get(foreign_suffix(path.name))
    return f"it is {unsupported.name}, not NIfTI; convert it with {unsupported.convert}." if unsupported else ""


def counted(suffixes: Iterable[str]) -> str:
    """The number of files of each kind, and what converts them; '' without any.

    >>> print(counted([".dcm", ".dcm"]))
    2 .dcm (DICOM: dcm2niix -z y -o <folder> <DICOM folder>)
    """
    kinds = Counter(suffixes).most_common()
    return ", ".join(f"{n} {suffix} ({_FORMATS[suffix].name}: {_FORMATS[suffix].convert})" for suffix, n in kinds)
