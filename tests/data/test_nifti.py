"""Tests NIfTI: files are read as the standard means, outputs overlay their input exactly, writing is all or nothing."""

import contextlib
import errno
import gzip
import io
import json
import os
import threading
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from isal import igzip
from nibabel.nifti1 import header_dtype, unit_codes
from nibabel.nifti2 import header_dtype as header_dtype_2
from odd_files import BAD_HEADERS, BAD_VOXELS, OBLIQUE, VOLUME, full_range, save_raw
from synthetic import noise, save, unpacked

from voxquilt import filesystem
from voxquilt.data.formats.image_file import open_image
from voxquilt.data.formats.nifti import read_header, write
from voxquilt.errors import InputError, OutputError
from voxquilt.geometry.frame import Frame

# The tensor type of each stored type: torch computes on few unsigned types.
TYPES = {
    "u1": torch.uint8,
    "i1": torch.int8,
    "i2": torch.int16,
    "u2": torch.int32,
    "i4": torch.int32,
    "u4": torch.int64,
    "i8": torch.int64,
    "u8": torch.int64,
    "f4": torch.float32,
    "f8": torch.float64,
}
GEOMETRY = ("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
GEOMETRY += ("srow_x", "srow_y", "srow_z", "xyzt_units")


def raw_header(path: Path) -> np.ndarray:
    """The header's fields as stored in the file."""
    content = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    kind = header_dtype if int.from_bytes(content[:4], "little") == 348 else header_dtype_2
    return np.frombuffer(content[: kind.itemsize], kind.newbyteorder("<"))[0]


# Reading.


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.img", "A B ü.NII.GZ"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [1, 2])
def test_every_kind_of_file_is_read(tmp_path: Path, name: str, order: str, kind: int) -> None:
    """Single and pair, packed or not, both byte orders, NIfTI-1 and 2, 3 and 4 axes, every type."""
    for dtype, shape in product(TYPES, [(2, 3, 4), (4, 3, 2, 5), (3, 1, 2, 1)]):
        array = full_range(shape, dtype)
        path = save_raw(tmp_path / name.replace("NII.GZ", "nii.gz"), array, order=order, kind=kind)
        if name.endswith("GZ"):
            path = path.rename(tmp_path / name)
        for named in (path, path.with_suffix(".hdr")) if name == "a.img" else (path,):
            file = read_header(named)
            assert file.shape == (shape[3] if len(shape) == 4 else 1, *shape[:3])
            np.testing.assert_allclose(file.frame.affine, OBLIQUE, rtol=1e-6)
            data = file.read()
            assert data.dtype == TYPES[dtype]
            expected = array[None] if array.ndim == 3 else np.moveaxis(array, 3, 0)
            np.testing.assert_array_equal(data.numpy(), expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scaling", [(2.5, -3.25), (1.0, -1024.0), (0.01, 0.0), (-1.0, 0.0)])
def test_scaled_voxels_are_float32(tmp_path: Path, dtype: str, scaling: tuple[float, float], order: str) -> None:
    """slope * stored + inter to float32 rounding, for every stored type."""
    slope, inter = np.float32(scaling)
    for name, shape in (("a.nii", (3, 4, 5)), ("a.nii.gz", (3, 4, 2, 2))):
        array = full_range(shape, dtype)
        data = read_header(save_raw(tmp_path / name, array, scaling=scaling, order=order)).read()
        assert data.dtype == torch.float32
        expected = array.astype(np.float64) * slope + inter
        rounding = np.abs(array.astype(np.float64) * slope).max() * 2e-7
        found = data[0].numpy() if len(shape) == 3 else data.movedim(0, 3).numpy()
        np.testing.assert_allclose(found, expected, rtol=2e-7, atol=rounding)


@pytest.mark.parametrize("scaling", [(0.0, 5.0), (1.0, 0.0), (np.nan, np.nan), (np.nan, 0.0), (0.0, 0.0)])
def test_an_identity_or_invalid_scaling_is_ignored(tmp_path: Path, scaling: tuple[float, float]) -> None:
    """A slope of 0 or NaN, or of 1 with an intercept of 0: the stored type stays."""
    array = full_range((3, 4, 5), "i2")
    data = read_header(save_raw(tmp_path / "a.nii", array, scaling=scaling)).read()
    assert data.dtype == torch.int16
    np.testing.assert_array_equal(data[0].numpy(), array)


def test_scaling_of_large_integers_is_computed_before_rounding_to_float32(tmp_path: Path) -> None:
    """2^30 + 1 stored with an intercept of -2^30 is 1, although float32 cannot hold 2^30 + 1."""
    array = np.array([[[2**30 + 1, 2**30 + 7]]], dtype=np.int32)
    data = read_header(save_raw(tmp_path / "a.nii", array, scaling=(1, -(2.0**30)))).read()
    assert data.flatten().tolist() == [1, 7]


def test_uint64_beyond_int64_is_refused(tmp_path: Path) -> None:
    """It would become negative."""
    path = save_raw(tmp_path / "a.nii", np.full((2, 2, 2), 2**63, dtype=np.uint64))
    with pytest.raises(InputError, match=r"a\.nii: its uint64 voxels do not fit int64"):
        read_header(path).read()


def test_changing_read_voxels_does_not_change_the_file(tmp_path: Path) -> None:
    """Even where voxels of an unpacked file are memory-mapped."""
    path = save_raw(tmp_path / "a.nii", full_range((3, 4, 5), "f4"))
    content = path.read_bytes()
    read_header(path).read().fill_(7)
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_reading_a_header_reads_no_voxels(tmp_path: Path, name: str) -> None:
    """It works for a file with damaged voxels; reading those names the file."""
    path = save_raw(tmp_path / name, np.random.default_rng(0).integers(0, 99, (30, 40, 50)).astype("i2"))
    content = bytearray(path.read_bytes())
    content[30000:] = bytes(len(content) - 30000)
    path.write_bytes(content)
    assert read_header(path).shape == (1, 30, 40, 50)
    if name.endswith(".gz"):
        with pytest.raises(InputError, match=r"a\.nii\.gz: reading its voxels failed; the file may be truncated or"):
            read_header(path).read()


UNITS = {"unknown": 1.0, "meter": 1000.0, "mm": 1.0, "micron": 0.001}


@given(
    st.sampled_from(sorted(UNITS)),
    st.sampled_from([0, 8, 16, 24, 32, 40, 48, 64]),
    st.sampled_from([(0, 0), (1, 0), (0, 2), (1, 1)]),
    st.sampled_from([1, 2]),
    st.sampled_from(["in.nii", "in.nii.gz", "in.img"]),
    st.lists(st.floats(0.25, 8), min_size=3, max_size=3),
)
@settings(deadline=None, max_examples=60)
def test_an_affine_is_in_mm_for_every_unit_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, unit: str, time: int, codes: tuple[int, int], kind: int, name: str,
    sizes: list[float],
) -> None:  # fmt: skip
    r"""Microns and meters of sform, qform and voxel sizes become mm, as in ITK; no unit counts as mm.

    The unit of time in the same byte does not matter. Outputs keep the input's unit, and so its place in the world.
    """
    folder = tmp_path_factory.mktemp("units")
    mm = np.array(sizes, dtype=np.float32)
    stored = (mm / UNITS[unit]).astype(np.float32)
    fields = {
        "pixdim": [1, *stored, 1, 0, 0, 0], "xyzt_units": unit_codes[unit] + time, "qform_code": codes[0],
        "sform_code": codes[1], "srow_x": [stored[0], 0, 0, 0], "srow_y": [0, stored[1], 0, 0],
        "srow_z": [0, 0, stored[2], 0],
    }  # fmt: skip
    file = read_header(save_raw(folder / name, full_range((3, 4, 5), "i2"), kind=kind, **fields))
    np.testing.assert_allclose(file.frame.spacing, mm, rtol=1e-6)
    np.testing.assert_allclose(np.abs(np.diag(file.frame.affine)[:3]), mm, rtol=1e-6)
    assert int(file.header["xyzt_units"]) == unit_codes[unit] + time
    write(folder / "out.nii", np.zeros((1, 3, 4, 5), np.uint8), file.frame, header=file.header)
    np.testing.assert_array_equal(read_header(folder / "out.nii").frame.affine, file.frame.affine)
    assert raw_header(folder / "out.nii")["xyzt_units"] == unit_codes[unit] + time


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3), st.floats(1 - 1e-3, 1 + 1e-3), st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=60)
@example([0.5, 0.6796875, 0.5492702013590528], 1.000947311721862, 1)
def test_a_quaternion_that_rounding_made_too_long_is_normalised(
    tmp_path_factory: pytest.TempPathFactory, axis: list[float], length: float, kind: int
) -> None:
    """Without an sform, as ITK reads it; nibabel, which refuses such an input, opens the output."""
    folder = tmp_path_factory.mktemp("quaternion")
    if np.linalg.norm(axis) < 0.1:
        axis = [1.0, 0.0, 0.0]
    b, c, d = np.array(axis) / np.linalg.norm(axis) * length
    fields = {"sform_code": 0, "qform_code": 1, "quatern_b": b, "quatern_c": c, "quatern_d": d}
    fields["pixdim"] = [1, 2, 2, 2, 1, 0, 0, 0]
    file = read_header(save_raw(folder / "in.nii", full_range((3, 4, 5), "u1"), kind=kind, **fields))
    a = np.sqrt(max(0, 1 - b * b - c * c - d * d))
    a, b, c, d = np.array([a, b, c, d]) / np.linalg.norm([a, b, c, d])
    rotation = [  # nifti1.h, method 2
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
    ]
    np.testing.assert_allclose(file.frame.affine[:3, :3], 2 * np.array(rotation), atol=4e-3)
    write(folder / "out.nii", np.zeros((1, 3, 4, 5), np.uint8), file.frame, header=file.header)
    np.testing.assert_allclose(nib.load(folder / "out.nii").affine, file.frame.affine, atol=1e-5)
    np.testing.assert_array_equal(read_header(folder / "out.nii").frame.affine, file.frame.affine)


@given(
    st.lists(st.integers(1, 4), min_size=3, max_size=3), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3),
    st.sampled_from(["a.nii", "a.nii.gz", "a.img"]),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_axes_of_one_voxel_after_the_third_are_dropped(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], channels: int, before: int, behind: int, name: str
) -> None:
    """A NIfTI vector (I, J, K, 1, C) is C channels, as is (I, J, K, C, 1, 1); (I, J, K, 1, 1) is a volume."""
    stored = (*shape, *[1] * before, channels, *[1] * (min(behind, 3 - before)))
    array = full_range(stored, "i2")
    file = read_header(save_raw(tmp_path_factory.mktemp("axes") / name, array))
    assert file.shape == (channels, *shape)
    expected = np.moveaxis(array.reshape((*shape, channels)), 3, 0)
    np.testing.assert_array_equal(file.read().numpy(), expected)


@pytest.mark.parametrize("dtype", ["u8", "i8"])
@pytest.mark.parametrize("largest", [2**53, 2**53 - 1, 2**24 + 1])
def test_64_bit_integers_are_read_exactly(tmp_path: Path, dtype: str, largest: int) -> None:
    """As int64, also integers that float32 cannot hold."""
    array = np.array([[[0, 1, largest]]], dtype=dtype)
    for name in ("a.nii", "a.nii.gz"):
        data = read_header(save_raw(tmp_path / name, array)).read()
        assert data.dtype == torch.int64
        assert data.flatten().tolist() == [0, 1, largest]


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_voxel_offset_of_zero_means_directly_after_the_header(tmp_path: Path, name: str, kind: int) -> None:
    """In a single file without vox_offset the header is not read as voxels."""
    array = full_range((3, 4, 5), "i2")
    path = save_raw(tmp_path / name, array, kind=kind)
    content = bytearray(gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes())
    content[108:112] = bytes(4) if kind == 1 else content[108:112]
    content[168:176] = bytes(8) if kind == 2 else content[168:176]
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert raw_header(path)["vox_offset"] == 0
    np.testing.assert_array_equal(read_header(path).read()[0].numpy(), array)
    short = tmp_path / f"short_{name}"
    short.write_bytes(gzip.compress(content[:-1]) if name.endswith(".gz") else content[:-1])
    with pytest.raises(InputError, match="short_"):
        read_header(short).read()


@given(st.binary(min_size=1, max_size=40), st.booleans())
@settings(deadline=None, max_examples=60)
def test_bytes_after_a_complete_gzip_are_ignored(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes, zeros: bool
) -> None:
    """As by gunzip and nibabel; but a further gzip member, once begun, must be complete."""
    path = save_raw(tmp_path_factory.mktemp("tail") / "a.nii.gz", VOLUME)
    content = path.read_bytes()
    tail = bytes(8) + tail if zeros else tail
    path.write_bytes(content + tail)
    assume(not tail.lstrip(b"\0").startswith(b"\x1f\x8b"))
    np.testing.assert_array_equal(read_header(path).read()[0].numpy(), VOLUME)
    path.write_bytes(content[:-8] + bytes(8) + tail)  # another checksum
    with pytest.raises(InputError, match="reading its voxels failed"):
        read_header(path).read()
    path.write_bytes(content + content[:-9])  # a second part that is cut off
    with pytest.raises(InputError, match="reading its voxels failed"):
        read_header(path).read()


@given(
    st.integers(0, 7), st.lists(st.integers(-(2**15), 2**15 - 1), min_size=7, max_size=7),
    st.sampled_from(["a.nii", "a.nii.gz", "a.img"]), st.floats(width=32), st.floats(width=32),
)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_a_corrupt_header_is_at_most_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, axes: int, sizes: list[int], name: str, number: float, offset: float
) -> None:
    """No content of a file may end a run, and no buffer of a claimed absurd size is allocated."""
    path = save_raw(tmp_path_factory.mktemp("odd") / name, VOLUME, dim=[axes, *sizes], vox_offset=offset,
                    pixdim=[1, number, number, 1, 1, 1, 1, 1], sform_code=0)  # fmt: skip
    with contextlib.suppress(InputError):
        read_header(path).read()


# Writing.


@pytest.mark.parametrize("name", ["in.nii", "in.nii.gz", "in.img"])
@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("qform", "sform"), [*product([0, 1, 2, 4], repeat=2)])
def test_outputs_keep_the_geometry_of_their_input_to_the_bit(
    tmp_path: Path, name: str, kind: int, order: str, qform: int, sform: int
) -> None:
    """qform and sform with their codes, also if the two disagree, voxel sizes and units."""
    fields = {
        **{"qform_code": qform, "sform_code": sform, "quatern_b": 0.1, "quatern_c": -0.7, "quatern_d": 0.05},
        **{"qoffset_x": 1.1, "qoffset_y": -2.2, "qoffset_z": 3.3, "pixdim": [-1, 0.7, 0.8, 0.9, 2.5, 0, 0, 0]},
        "xyzt_units": unit_codes["mm"] + unit_codes["msec"],
    }
    file = read_header(save_raw(tmp_path / name, full_range((3, 4, 5), "i2"), kind=kind, order=order, **fields))
    for channels, dtype in ((1, np.uint8), (3, np.float32)):
        data = np.random.default_rng(0).integers(0, 9, (channels, 3, 4, 5)).astype(dtype)
        path = tmp_path / "out.nii.gz"
        write(path, data, file.frame, header=file.header)
        raw = raw_header(path)
        assert raw["sizeof_hdr"] == {1: 348, 2: 540}[kind]
        for key in GEOMETRY:
            np.testing.assert_array_equal(raw[key], file.header[key], err_msg=key)
        np.testing.assert_array_equal(raw["pixdim"][:4], file.header["pixdim"][:4])
        np.testing.assert_array_equal(nib.load(path).affine, file.frame.affine)
        np.testing.assert_array_equal(read_header(path).frame.affine, file.frame.affine)
        np.testing.assert_array_equal(read_header(path).read().numpy(), data)


@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.uint16, np.uint32, np.int16, np.int32, np.float32]),
        st.tuples(*[st.integers(1, 4)] * 4),
        elements={"allow_nan": False, "allow_infinity": False},
    ),
    st.sampled_from([".nii", ".nii.gz"]),
)
@settings(deadline=None, max_examples=60)
def test_values_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, data: np.ndarray, suffix: str
) -> None:
    """Every value of every type; one channel in 3-D, several in 4-D with channels last; never scaled."""
    path = tmp_path_factory.mktemp("out") / f"out{suffix}"
    write(path, data, Frame(data.shape[1:], OBLIQUE))
    loaded = nib.load(path)
    expected = data[0] if len(data) == 1 else np.moveaxis(data, 0, 3)
    assert loaded.shape == expected.shape
    assert loaded.get_data_dtype() == data.dtype
    np.testing.assert_array_equal(np.asarray(loaded.dataobj), expected)
    raw = raw_header(path)
    assert (raw["scl_slope"], raw["scl_inter"]) == (1, 0)
    assert raw["dim"][0] == expected.ndim


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("scaling", [None, (2.5, -3.25)])
def test_the_scaling_of_an_input_does_not_reach_its_outputs(
    tmp_path: Path, suffix: str, scaling: tuple[float, float] | None
) -> None:
    """Label values are exact: slope and intercept are stored as 1 and 0, which every viewer reads as no scaling."""
    file = read_header(save_raw(tmp_path / "in.nii", full_range((2, 2, 2), "i2"), scaling=scaling, cal_max=500))
    labels = np.arange(8, dtype=np.uint8).reshape(1, 2, 2, 2)
    path = tmp_path / f"out{suffix}"
    write(path, labels, file.frame, header=file.header)
    content = gzip.decompress(path.read_bytes()) if suffix == ".nii.gz" else path.read_bytes()
    assert np.frombuffer(content, "<f4", 2, 112).tolist() == [1, 0]
    assert content[352:] == labels[0].tobytes(order="F")
    assert raw_header(path)["cal_max"] == 0
    np.testing.assert_array_equal(nib.load(path).get_fdata(), labels[0])


def test_without_a_header_the_frame_is_written_as_qform_and_sform(tmp_path: Path) -> None:
    """For volumes made of tensors: both forms, mm, and voxel sizes."""
    affine = nib.affines.from_matvec(np.array([[0, -1.5, 0], [0.6, 0, 0.8 * 3], [0.8, 0, -0.6 * 3]]), [1, 2, 3])
    frame = Frame((2, 3, 4), affine)
    write(tmp_path / "out.nii", np.zeros((1, 2, 3, 4), dtype=np.uint8), frame)
    header = nib.load(tmp_path / "out.nii").header
    np.testing.assert_allclose(header.get_sform(), affine, atol=1e-6)
    np.testing.assert_allclose(header.get_qform(), affine, atol=1e-6)
    assert (header["qform_code"], header["sform_code"]) == (2, 2)
    np.testing.assert_allclose(header.get_zooms(), frame.spacing, rtol=1e-6)
    assert header.get_xyzt_units() == ("mm", "unknown")


def test_a_sheared_frame_is_written_as_sform_alone(tmp_path: Path) -> None:
    """A qform cannot hold shears, and some viewers would use a wrong one; voxel sizes are still right."""
    frame = Frame((2, 3, 4), OBLIQUE)
    write(tmp_path / "out.nii", np.zeros((1, 2, 3, 4), dtype=np.uint8), frame)
    header = nib.load(tmp_path / "out.nii").header
    np.testing.assert_allclose(header.get_sform(), OBLIQUE, atol=1e-6)
    assert (header["qform_code"], header["sform_code"]) == (0, 2)
    np.testing.assert_allclose(header.get_zooms(), frame.spacing, rtol=1e-6)


def test_an_axis_beyond_16_bits_is_written_as_nifti_2(tmp_path: Path) -> None:
    """40,000 voxels or channels, with the geometry of a NIfTI-1 input."""
    source = read_header(save_raw(tmp_path / "in.nii", full_range((2, 2, 2), "u1")))
    for n, (data, header) in enumerate(
        [
            (np.arange(40_000, dtype=np.uint16).reshape(1, 1, 40_000, 1), None),
            (np.arange(40_000, dtype=np.uint16).reshape(1, 40_000, 1, 1), source.header),
            (np.arange(40_000, dtype=np.uint16).reshape(40_000, 1, 1, 1), source.header),
        ]
    ):
        path = tmp_path / f"{n}.nii.gz"
        write(path, data, Frame(data.shape[1:], source.frame.affine), header=header)
        assert isinstance(nib.load(path), nib.Nifti2Image)
        np.testing.assert_array_equal(read_header(path).read().numpy(), data)
        np.testing.assert_allclose(read_header(path).frame.affine, source.frame.affine, rtol=1e-6)
    write(tmp_path / "largest.nii", np.zeros((1, 32_767, 1, 1), np.uint8), Frame((32_767, 1, 1), np.eye(4)))
    assert isinstance(nib.load(tmp_path / "largest.nii"), nib.Nifti1Image)


@pytest.mark.parametrize("kind", [1, 2])
def test_class_names_are_written_to_a_header_extension(tmp_path: Path, kind: int) -> None:
    """As JSON by label, in any script; voxels after the extension are read correctly."""
    source = read_header(save_raw(tmp_path / "in.nii", full_range((2, 2, 2), "u1"), kind=kind))
    names, labels = ["background", "Kleinhirn, größer", "海馬"], np.arange(8, dtype=np.uint8).reshape(1, 2, 2, 2) % 3
    write(tmp_path / "out.nii.gz", labels, source.frame, header=source.header, label_names=dict(enumerate(names)))
    loaded = nib.load(tmp_path / "out.nii.gz")
    (extension,) = loaded.header.extensions
    content = json.loads(bytes(extension.get_content()).rstrip(b"\0"))
    assert content == {"labels": {"0": names[0], "1": names[1], "2": names[2]}}
    np.testing.assert_array_equal(np.asarray(loaded.dataobj), labels[0])


@pytest.mark.parametrize(("suffix", "cores"), [(".nii", 1), (".nii.gz", 1), (".nii.gz", 64)])
def test_equal_volumes_are_equal_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, cores: int
) -> None:
    """Header and voxels to the byte; the gzip wrapper has no time and no name."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    data = full_range((2, 9, 9, 9), "f4")
    (tmp_path / "other").mkdir()
    paths = [tmp_path / f"one{suffix}", tmp_path / "other" / f"two{suffix}"]
    for path in paths:
        write(path, data, Frame((9, 9, 9), OBLIQUE), label_names={0: "a"})
    assert unpacked(paths[0]) == unpacked(paths[1])
    if suffix == ".nii.gz":
        for path in paths:
            flags, time = path.read_bytes()[3], path.read_bytes()[4:8]
            assert (flags, time) == (0, bytes(4))


def test_an_output_replaces_an_older_one(tmp_path: Path) -> None:
    """And leaves nothing else in the folder."""
    for value in (1, 2):
        write(tmp_path / "out.nii.gz", np.full((1, 2, 2, 2), value, np.uint8), Frame((2, 2, 2), np.eye(4)))
        assert set(np.unique(nib.load(tmp_path / "out.nii.gz").dataobj)) == {value}
    assert [path.name for path in tmp_path.iterdir()] == ["out.nii.gz"]


def no_space(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("target", "name", "suffix"),
    [
        (igzip.IGzipFile, "write", ".nii.gz"),
        (igzip.IGzipFile, "close", ".nii.gz"),
        (nib.Nifti1Image, "to_stream", ".nii"),
        (os, "fsync", ".nii"),
        (os, "fsync", ".nii.gz"),
        (os, "replace", ".nii.gz"),
    ],
)
@pytest.mark.parametrize("failure", [no_space, interrupt])
def test_a_failed_write_leaves_no_file_and_keeps_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Any, name: str, suffix: str, old: bool, failure: Any
) -> None:
    """A full disk or Ctrl-C at any step leaves no partial and no temporary file; the error names the path."""
    path, frame = tmp_path / f"out{suffix}", Frame((8, 8, 8), np.eye(4))
    if old:
        write(path, np.ones((1, 8, 8, 8), np.uint8), frame)
    content = path.read_bytes() if old else b""
    with monkeypatch.context() as patch:
        patch.setattr(target, name, failure)
        with pytest.raises((OutputError, KeyboardInterrupt)) as error:
            write(path, np.full((1, 8, 8, 8), 2, np.uint8), frame)
    if failure is no_space:
        assert str(error.value) == f"{path}: writing failed: No space left on device. No partial file is left."
    assert [p.name for p in tmp_path.iterdir()] == ([path.name] if old else [])
    if old:
        assert path.read_bytes() == content


class SmallDisk(io.BufferedWriter):
    """Has room for a megabyte."""

    def write(self, buffer: Any, /) -> int:
        if self.tell() > 2**20:
            no_space()
        return super().write(buffer)


@pytest.mark.parametrize("cores", [1, 64])
def test_volumes_are_packed_by_as_many_threads_as_there_are_cores_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    """Of many megabytes, which no level packs well; a disk that is full halfway is an error, and no thread is left."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    volume = np.random.default_rng(0).integers(0, 2**16, (1, 200, 150, 100), dtype=np.uint16)
    frame, path = Frame(volume.shape[1:], np.eye(4)), tmp_path / "out.nii.gz"
    before = threading.active_count()
    write(path, volume, frame)
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), volume[0])
    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "open", lambda path, _: SmallDisk(io.FileIO(path, "w")), raising=False)
        with pytest.raises(OutputError, match="No space left on device"):
            write(path, volume, frame)
    assert threading.active_count() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_writing_to_a_missing_folder_is_an_output_error(tmp_path: Path) -> None:
    """The message names the path."""
    with pytest.raises(OutputError, match=r"none/out\.nii: writing failed: No such file or directory"):
        write(tmp_path / "none" / "out.nii", np.zeros((1, 2, 2, 2), np.uint8), Frame((2, 2, 2), np.eye(4)))


# Bad input.


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_file_with_an_unusable_header_is_named_with_the_reason(tmp_path: Path, case: str) -> None:
    """An InputError, raised from the header alone, that begins with the path."""
    make, message = BAD_HEADERS[case]
    path = make(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        read_header(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n\n" not in str(error.value)


@pytest.mark.parametrize("case", BAD_VOXELS)
def test_a_file_with_unreadable_voxels_is_named_with_the_reason(tmp_path: Path, case: str) -> None:
    """The header is valid, the voxels are not: an InputError that begins with the path, never garbage."""
    path = BAD_VOXELS[case](tmp_path)
    with pytest.raises(InputError) as error:
        read_header(path).read()
    assert str(error.value).startswith(f"{path}: ")


def test_a_flipped_bit_in_a_packed_file_is_an_error(tmp_path: Path) -> None:
    """gzip stores a checksum of the voxels, so it shows wherever the bit is."""
    path = save_raw(tmp_path / "a.nii.gz", VOLUME)
    content = path.read_bytes()
    for place in range(60, len(content), len(content) // 20):
        spoilt = bytearray(content)
        spoilt[place] ^= 1
        path.write_bytes(spoilt)
        with pytest.raises(InputError, match=r"a\.nii\.gz: "):
            read_header(path).read()


def test_a_name_that_does_not_say_whether_gzip_has_packed_is_pointed_out(tmp_path: Path) -> None:
    """Both ways; a file that is neither is only not NIfTI."""
    save(tmp_path / "a.nii.gz", noise((4, 4, 4)))
    save(tmp_path / "b.nii", noise((4, 4, 4)))
    (tmp_path / "a.nii.gz").rename(tmp_path / "packed.nii")
    (tmp_path / "b.nii").rename(tmp_path / "plain.nii.gz")
    (tmp_path / "text.nii").write_text("not an image" * 100)
    wanted = {"packed.nii": "let its name end in .gz", "plain.nii.gz": "as .gz says", "text.nii": "not a NIfTI header"}
    for name, message in wanted.items():
        with pytest.raises(InputError, match=message) as caught:
            open_image(tmp_path / name)
        assert ("gzip" in str(caught.value)) == (name != "text.nii")
