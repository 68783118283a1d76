"""Tests that placements and grids of other packages work with the real command, as docs/extending.md shows."""

from pathlib import Path

import numpy as np
import pytest
from packages import install_documented
from synthetic import noise, read, run, save

JOB = (
    "data.inputs=in", "data.patch_size=8", "model=state_dict", "model.net._target_=synthetic.Over50", "ckpt_path=null",
    "callbacks.writer.tensorboard=false", "callbacks.writer.report=false", "callbacks.writer.compress=false",
)  # fmt: skip
SHAPE = (17, 12, 10)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save(tmp_path / "in/head.nii", noise(SHAPE))
    return tmp_path


@pytest.mark.parametrize("mode", ["gaussian", "crop"])
def test_a_package_adds_a_placement_by_one_file_and_one_line(place: Path, mode: str) -> None:
    """Labels of a pointwise network do not depend on where patches lie; without the package the name is refused."""
    arguments = (*JOB, "data.placement=mirrored", "data.step=0.5", f"stitch.overlap_mode={mode}")
    done = run("predict.py", *arguments, cwd=place)
    assert done.returncode == 2
    assert "data.placement must be one of regular, even, monai; it is 'mirrored'" in done.stderr
    package = install_documented("mirrored.py", place / "package")
    done = run("predict.py", *arguments, cwd=place, env={"PYTHONPATH": str(package)})
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(read(place / "outputs/head_labels.nii"), noise(SHAPE) > 50)


def test_a_package_adds_a_grid_by_one_file_and_one_line(place: Path) -> None:
    """At twice the spacing, model voxel 0 is the mean of native voxels 0 and 1, and so on."""
    arguments = (*JOB, "preprocess.spacing=[2,null,null]", "preprocess.grid=first_border", "stitch.restore=labels")
    done = run("predict.py", *arguments, cwd=place)
    assert done.returncode == 2
    known = "centre, corner, corner_measured, first_voxel, ends, monai"
    assert f"preprocess.grid must be one of {known}; it is 'first_border'" in done.stderr
    package = install_documented("first_border.py", place / "package")
    done = run("predict.py", *arguments, cwd=place, env={"PYTHONPATH": str(package)})
    assert done.returncode == 0, done.stderr
    pairs = noise(SHAPE)[:16].reshape(8, 2, *SHAPE[1:]).mean(1)
    np.testing.assert_array_equal(read(place / "outputs/head_labels.nii")[:16:2], pairs > 50)
