"""Tests file formats: a package adds one by one file and one line, and it works like NIfTI."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from packages import install_documented
from synthetic import ROOT, noise, read, run, save
from torch import Tensor

import voxquilt.data.formats.image_file
from voxquilt.data.formats.image_file import ImageHeader, open_image
from voxquilt.data.formats.nifti import read_header
from voxquilt.data.formats.registry import FORMATS, NIFTI_SUFFIXES, entry_of, stem, suffixes
from voxquilt.data.subject import LabelMap, ScalarImage
from voxquilt.errors import InputError
from voxquilt.reporting.manifest import read_rows

OVER_50 = ("data.patch_size=8", "model=state_dict", "model.net._target_=synthetic.Over50", "ckpt_path=null")
SHAPE = (12, 9, 10)
AFFINE = np.array([[-2.0, 0, 0, 5], [0, 1.5, 0, -7], [0, 0, 1, 3], [0, 0, 0, 1]])


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder of installed packages with the one from docs/extending.md."""
    return install_documented("npz_format.py", tmp_path / "site")


def test_a_package_adds_a_file_format_by_one_file_and_one_line(installed: Path, tmp_path: Path) -> None:
    """The real command reads its files beside NIfTI; labels and grid equal those of the same voxels as NIfTI."""
    volume = noise(SHAPE)
    save(tmp_path / "in/nifti.nii.gz", volume, AFFINE)
    np.savez(tmp_path / "in/own.npz", voxels=volume, affine=AFFINE)
    np.savez(tmp_path / "in/other_shape.npz", voxels=volume[0], affine=AFFINE)
    np.savez(tmp_path / "in/without_affine.npz", voxels=volume)
    (tmp_path / "in/damaged.npz").write_bytes((tmp_path / "in/own.npz").read_bytes()[:900])
    done = run(
        "predict.py",
        "data.inputs=in",
        *OVER_50,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{installed}{os.pathsep}{ROOT / 'src'}"},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    manifest = read_rows([tmp_path / "outputs/manifest.csv"])
    assert {name: row.status for name, row in manifest.items()} == {
        "nifti": "done", "own": "done", "other_shape": "failed", "without_affine": "failed", "damaged": "failed",
    }  # fmt: skip
    for name in ("other_shape", "without_affine", "damaged"):
        assert manifest[name].error.startswith(f"in/{name}.npz: "), manifest[name].error
    assert "affine" in manifest["without_affine"].error
    np.testing.assert_array_equal(read(tmp_path / "outputs/own_labels.nii.gz"), volume > 50)
    own, nifti = (read_header(tmp_path / f"outputs/{name}_labels.nii.gz") for name in ("own", "nifti"))
    np.testing.assert_allclose(own.frame.affine, nifti.frame.affine)
    assert own.frame.shape == nifti.frame.shape == SHAPE


def test_without_the_package_its_files_are_reported_as_left_out(tmp_path: Path) -> None:
    """As files in a format that cannot be read."""
    np.savez(tmp_path / "own.npz", voxels=noise(SHAPE), affine=AFFINE)
    done = run("predict.py", f"data.inputs={tmp_path}", *OVER_50, cwd=tmp_path)
    assert done.returncode == 2
    assert f"the folder {tmp_path} has no image file (.nii.gz, .nii," in done.stderr
    assert "1 .npz (NumPy: " in done.stderr
    with pytest.raises(InputError, match=r"own\.npz: it is NumPy, not NIfTI"):
        open_image(tmp_path / "own.npz")


def test_every_suffix_of_nifti_is_registered_and_removed_from_the_id() -> None:
    """In upper and lower case; a name without a suffix is read as NIfTI, whose content decides."""
    assert set(NIFTI_SUFFIXES) <= set(FORMATS)
    for suffix in suffixes():
        assert stem(f"deep/er/A.b{suffix.upper()}") == "A.b"
        assert f".{entry_of(f'x{suffix}')}" == suffix
    assert stem("scan") == "scan"
    assert entry_of("scan") == "nii.gz"


class Memory:
    """A format whose reader returns the given image."""

    def __init__(self, header: object, voxels: object = None) -> None:
        self.header, self.voxels = header, voxels

    def read_header(self, path: Path) -> object:
        return self.header

    def read(self, path: Path) -> object:
        return self.voxels


def image_of(path: Path, monkeypatch: pytest.MonkeyPatch, header: object, voxels: object = None) -> Path:
    """A file that reads as the given image."""
    path.write_bytes(b"something")

    class Formats:
        def load(self, name: str) -> Memory:
            return Memory(header, voxels)

    monkeypatch.setattr(voxquilt.data.formats.image_file, "FORMATS", Formats())
    return path


@pytest.mark.parametrize(
    ("voxels", "dtype"),
    [
        (np.arange(24, dtype=">u2").reshape(2, 3, 4), torch.int32),
        (np.arange(24, dtype=np.uint64).reshape(1, 2, 3, 4), torch.int64),
        (np.arange(24, dtype=np.float16).reshape(4, 3, 2).T, torch.float32),
        (np.arange(24).reshape(2, 3, 4)[:, ::-1] > 5, torch.uint8),
        (torch.arange(24).reshape(2, 3, 4), torch.int64),
    ],
)
def test_voxels_of_any_type_and_memory_layout_are_read_unchanged(
    voxels: np.ndarray | Tensor, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the file's type or a wider one, with the array's values and affine; the header may be a plain tuple."""
    path = image_of(tmp_path / "a.x", monkeypatch, (voxels.shape, AFFINE), voxels)
    image = ScalarImage(path)
    assert image.shape == (1, 2, 3, 4)
    np.testing.assert_array_equal(image.affine, AFFINE)
    assert image.stored().dtype == dtype
    np.testing.assert_array_equal(image.stored().numpy(), np.asarray(voxels).astype(np.int64).reshape(1, 2, 3, 4))
    np.testing.assert_array_equal(LabelMap(path).data.numpy(), image.stored().numpy())


@pytest.mark.parametrize(
    ("header", "voxels", "message"),
    [
        (ImageHeader((2, 3), AFFINE), None, r"its shape is \(2, 3\); voxquilt reads \(I, J, K\) or"),
        (ImageHeader((2, 3, 0), AFFINE), None, r"its shape is \(2, 3, 0\)"),
        (ImageHeader((2, 3, 4), np.zeros((4, 4))), None, "the affine is degenerate"),
        (ImageHeader((2, 3, 4), np.eye(3)), None, "the affine must be a finite 4 x 4 matrix"),
        ((), None, r"its header cannot be read \("),
        (((2, 3, 4), AFFINE), np.zeros((2, 3, 5)), r"its voxels have shape \(1, 2, 3, 5\), but its header says \(1, 2"),
        (((2, 3, 4), AFFINE), np.zeros((2, 3, 4), np.complex64), "its voxels are complex64; voxquilt reads real"),
        (((2, 3, 4), AFFINE), np.full((2, 3, 4), 2**64 - 1, np.uint64), "its uint64 voxels do not fit int64"),
        (((2, 3, 4), AFFINE), None, "its voxels are object"),
    ],
)
def test_an_invalid_result_of_a_format_is_an_error_that_names_the_file(
    header: object, voxels: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One InputError, whatever is wrong."""
    path = image_of(tmp_path / "a.x", monkeypatch, header, voxels)
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: {message}"):
        open_image(path).read()
