"""Provides unusual and broken files for several test files."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

OBLIQUE = np.array([[0.9, -0.3, 0.1, -30], [0.4, 1.9, 0.2, 12], [-0.1, 0.1, 3.1, 7], [0, 0, 0, 1]])


def full_range(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Values up to both limits of a type, or of int64."""
    random = np.random.default_rng(seed)
    if dtype[0] == "f":
        return random.normal(0, 1000, shape).astype(dtype)
    info = np.iinfo(dtype)
    high = min(int(info.max), 2**63 - 1)
    array = random.integers(info.min, high, shape, endpoint=True, dtype=dtype if dtype != "u8" else np.int64)
    array.flat[0], array.flat[-1] = info.min, high
    return array.astype(dtype)


def save_raw(
    path: Path,
    array: np.ndarray,
    *,
    scaling: tuple[float, float] | None = None,
    order: str = "<",
    kind: int = 1,
    **fields: Any,
) -> Path:
    """Write a file byte by byte from a header, so that nibabel neither chooses nor changes a field."""
    pair = path.name.endswith(".img")
    single, double = (nib.Nifti1Header, nib.nifti1.Nifti1PairHeader), (nib.Nifti2Header, nib.nifti2.Nifti2PairHeader)
    header = (single if kind == 1 else double)[int(pair)](endianness=order)
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_sform(OBLIQUE, "scanner")
    offset = 0 if pair else 352 if kind == 1 else 544
    header["vox_offset"] = offset
    header["scl_slope"], header["scl_inter"] = scaling or (0, 0)
    for key, value in fields.items():
        header[key] = value
    voxels = array.astype(array.dtype.newbyteorder(order)).tobytes(order="F")
    content = header.binaryblock.ljust(offset, b"\0") + voxels
    if pair:
        path.write_bytes(voxels)
        path.with_suffix(".hdr").write_bytes(header.binaryblock + bytes(4))
    else:
        path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


def spoil(path: Path, keep: int) -> Path:
    path.write_bytes(path.read_bytes()[:keep])
    return path


def text_file(path: Path) -> Path:
    path.write_text("subject,t1\nsub-01,t1.nii.gz\n" * 50)
    return path


def of_dtype(path: Path, dtype: Any) -> Path:
    nib.save(nib.Nifti1Image(np.zeros((2, 3, 4), dtype), np.eye(4)), path)
    return path


def made(make: Any, path: Path) -> Path:
    make(path)
    return path


def linked(path: Path, aim: str) -> Path:
    path.symlink_to(aim)
    return path


def mgh(path: Path) -> Path:
    nib.save(nib.MGHImage(np.zeros((2, 3, 4), np.int16), np.eye(4)), path)
    return path


def analyze_pair(folder: Path) -> Path:
    nib.AnalyzeImage(np.zeros((2, 3, 4), np.int16), np.eye(4)).to_filename(folder / "old.img")
    return folder / "old.hdr"


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


VOLUME = full_range((8, 9, 10), "i2")


SMALLER = "the file is smaller than its header says"


NOT_NIFTI = "it is not a NIfTI file that can be read"


BAD_HEADERS = {
    "missing": (lambda d: d / "a.nii.gz", "there is no such file"),
    "folder": (lambda d: d, "it is a folder, not a file"),
    "pipe": (lambda d: made(os.mkfifo, d / "a.nii.gz"), "it is a pipe, not a file"),
    "dangling link": (
        lambda d: linked(d / "a.nii.gz", "gone.nii.gz"),
        r"the link points to /.*/gone\.nii\.gz, which does not exist",
    ),
    "link to itself": (lambda d: linked(d / "a.nii.gz", "a.nii.gz"), "the link points to itself, by way of a.nii.gz"),
    "NRRD": (lambda d: text_file(d / "a.nrrd"), r"it is NRRD, not NIfTI; convert it with SimpleITK"),
    "MGZ": (lambda d: mgh(d / "a.mgz"), r"it is FreeSurfer, not NIfTI; convert it with mri_convert"),
    "empty": (lambda d: spoil(save_raw(d / "a.nii", VOLUME), 0), "the file is empty"),
    "empty gz": (lambda d: spoil(save_raw(d / "a.nii.gz", VOLUME), 0), "the file is empty"),
    "header cut": (lambda d: spoil(save_raw(d / "a.nii", VOLUME), 200), NOT_NIFTI),
    "gz header cut": (lambda d: spoil(save_raw(d / "a.nii.gz", VOLUME), 30), NOT_NIFTI),
    "text": (lambda d: text_file(d / "a.nii"), NOT_NIFTI),
    "text named gz": (lambda d: text_file(d / "a.nii.gz"), NOT_NIFTI),
    "2-D": (
        lambda d: save_raw(d / "a.nii", VOLUME[0]),
        r"the data is 2-D, \(9, 10\); voxquilt takes 3-D, .*\[:, :, None\]",
    ),
    "5-D": (
        lambda d: save_raw(d / "a.nii", VOLUME.reshape(8, 9, 5, 2, 1)[..., [0, 0]]),
        r"the data is 5-D, \(8, 9, 5, 2, 2\)",
    ),
    "zero-size axis": (
        lambda d: save_raw(d / "a.nii", VOLUME, dim=[3, 8, 0, 10, 1, 1, 1, 1]),
        r"the data has an axis without voxels: \(8, 0, 10\)",
    ),
    "no channels": (
        lambda d: save_raw(d / "a.nii", VOLUME, dim=[4, 8, 9, 10, 0, 1, 1, 1]),
        r"an axis without voxels: \(8, 9, 10, 0\)",
    ),
    "negative axis": (
        lambda d: save_raw(d / "a.nii", VOLUME, dim=[3, 8, -9, 10, 1, 1, 1, 1]),
        "at least 1 along axis j",
    ),
    "complex64": (lambda d: of_dtype(d / "a.nii", np.complex64), "the voxels are complex"),
    "complex128": (lambda d: of_dtype(d / "a.nii.gz", np.complex128), "the voxels are complex"),
    "RGB": (lambda d: of_dtype(d / "a.nii", RGB), "the voxels are RGB"),
    "1-bit": (lambda d: save_raw(d / "a.nii", VOLUME, datatype=1, bitpix=1), NOT_NIFTI),
    "unknown type": (lambda d: save_raw(d / "a.nii", VOLUME, datatype=999), NOT_NIFTI),
    "degenerate": (lambda d: save_raw(d / "a.nii", VOLUME, srow_x=[0, 0, 0, 0]), "the affine is degenerate"),
    "NaN affine": (lambda d: save_raw(d / "a.nii", VOLUME, srow_y=[0, np.nan, 0, 0]), "must be a finite 4 x 4 matrix"),
    "infinite offset": (lambda d: save_raw(d / "a.nii", VOLUME, srow_y=[0, 1, 0, np.inf]), "must be a finite 4 x 4"),
    "NaN quaternion": (
        lambda d: save_raw(d / "a.nii", VOLUME, sform_code=0, qform_code=1, quatern_b=np.nan),
        f"{NOT_NIFTI}|must be a finite",
    ),
    "no quaternion": (
        lambda d: save_raw(d / "a.nii", VOLUME, sform_code=0, qform_code=1, quatern_b=1, quatern_c=1, quatern_d=1),
        "its quaternion has length 1.732; that of a rotation is at most 1",
    ),
    "slope without intercept": (lambda d: save_raw(d / "a.nii", VOLUME, scaling=(2, np.nan)), NOT_NIFTI),
    "Analyze": (analyze_pair, "convert it, since its orientation is ambiguous"),
    "cut": (
        lambda d: spoil(save_raw(d / "a.nii", VOLUME), 1000),
        "needs? .*1792 bytes with the header, and it has 1000",
    ),
    "one byte short": (lambda d: spoil(save_raw(d / "a.nii", VOLUME), 352 + VOLUME.nbytes - 1), SMALLER),
    "img missing": (
        lambda d: (save_raw(d / "a.img", VOLUME).unlink(), d / "a.hdr")[1],
        r"there is no file with its voxels: .*\.img",
    ),
    "img cut": (lambda d: spoil(save_raw(d / "a.img", VOLUME), 10), SMALLER),
    "gz cannot hold it": (
        lambda d: save_raw(d / "a.nii.gz", VOLUME, dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]),
        f"{SMALLER}: 30000x30000x30000 int16 voxels need 54000000000352 bytes .* at most unpacked",
    ),
    "2^32 voxels an axis": (
        lambda d: save_raw(d / "a.nii", VOLUME, kind=2, dim=[3, 2**32, 2**32, 2**32, 1, 1, 1, 1]),
        SMALLER,
    ),
}


BAD_VOXELS = {
    "cut gz": lambda d: spoil(save_raw(d / "a.nii.gz", VOLUME), 900),
    "gz without its end": lambda d: spoil(path := save_raw(d / "a.nii.gz", VOLUME), path.stat().st_size - 3),
    "more voxels than the file": lambda d: save_raw(d / "a.nii.gz", VOLUME, dim=[3, 80, 90, 10, 1, 1, 1, 1]),
}


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)
