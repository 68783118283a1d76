"""Tests a real head: patches, blends and orientations of Colin27 against its published brain mask."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from voxquilt.cli.main import conf_dir, run_predict
from voxquilt.cli.resolvers import register_resolvers
from voxquilt.example_files import fetch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # lightning's, monai's and torch.jit's, which are not the subject here
]
TWO_MM = ("preprocess.spacing=2", "data.patch_size=96", "data.patch_overlap=48")


def masks(folder: Path, inputs: list[Path], *overrides: str) -> list[np.ndarray]:
    """Brain masks of heads, as `predict.py experiment=brain_extraction` gives them."""
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        paths = ",".join(f'"{path}"' for path in inputs)
        arguments = ["experiment=brain_extraction", f"data.inputs=[{paths}]", f"output_dir={folder}", *overrides]
        cfg = compose("predict", overrides=arguments)
    assert run_predict(cfg) == 0
    return [
        np.asarray(nib.load(folder / path.name.replace(".nii", "_labels.nii")).dataobj).astype(bool) for path in inputs
    ]


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.fixture(scope="module")
def head() -> Path:
    return fetch("colin27_t1")


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return np.asarray(nib.load(fetch("colin27_brain")).dataobj) > 0


@pytest.mark.parametrize(
    ("spacing", "patch", "overlap", "whole"), [(2, 96, 48, "[96,128,96]"), (1, 160, 80, "[192,224,192]")]
)
def test_patches_give_the_brain_mask_of_the_whole_volume(
    spacing: int, patch: int, overlap: int, whole: str, head: Path, truth: np.ndarray, tmp_path: Path
) -> None:
    """Dice of at least 0.935 against the published mask, and of 0.985 against the mask from a single patch."""
    common = f"preprocess.spacing={spacing}"
    grid = (f"data.patch_size={patch}", f"data.patch_overlap={overlap}")
    (patched,) = masks(tmp_path / "patched", [head], common, *grid)
    (single,) = masks(tmp_path / "single", [head], common, f"data.patch_size={whole}", "data.patch_overlap=0")
    assert dice(patched, truth) >= 0.935
    assert dice(patched, single) >= 0.985
    written, source = nib.load(tmp_path / "patched/ch2_labels.nii.gz"), nib.load(head)
    assert written.shape == source.shape
    np.testing.assert_array_equal(written.affine, source.affine)


def test_plain_averages_of_small_patches_give_a_poor_mask(head: Path, truth: np.ndarray, tmp_path: Path) -> None:
    """A Dice of 0.66 to 0.76, as documented: patches this small need the network's Gaussian blend."""
    small = ("data.patch_size=128", "data.patch_overlap=64", "stitch.overlap_mode=average")
    (average,) = masks(tmp_path, [head], *small)
    assert 0.66 <= dice(average, truth) <= 0.76


def test_a_reoriented_head_has_the_same_brain_mask(head: Path, truth: np.ndarray, tmp_path: Path) -> None:
    """Flipped and permuted, or scanned obliquely: a Dice of at least 0.99 at the same tissue."""
    image = nib.load(head)
    voxels, affine = np.asarray(image.dataobj), image.affine
    to_old = np.array([[0, 0, -1, voxels.shape[0] - 1], [1, 0, 0, 0], [0, -1, 0, voxels.shape[2] - 1], [0, 0, 0, 1]])
    turned = voxels.transpose(1, 2, 0)[:, ::-1, ::-1]
    nib.save(nib.Nifti1Image(turned, affine @ to_old), tmp_path / "turned.nii")
    angle = np.deg2rad(10)
    rotation = np.eye(4)
    rotation[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    nib.save(nib.Nifti1Image(voxels, rotation @ affine), tmp_path / "oblique.nii")
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "straight.nii")
    names = [tmp_path / f"{name}.nii" for name in ("straight", "turned", "oblique")]
    straight, turned_mask, oblique = masks(tmp_path / "out", names, *TWO_MM, "callbacks.writer.compress=false")
    back = turned_mask[:, ::-1, ::-1].transpose(2, 0, 1)
    assert turned_mask.shape == (217, 181, 181)
    assert dice(back, straight) >= 0.99
    assert dice(oblique, straight) >= 0.99
    assert dice(straight, truth) >= 0.935
    assert dice(oblique, truth) >= 0.935
