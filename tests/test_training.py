"""Training: patches are cut where they should be, and what is trained predicts."""

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from voxquilt.errors import ConfigError, InputError
from voxquilt.sampler import GridSampler
from voxquilt.subject import LabelMap, ScalarImage, Subject
from voxquilt.training import RandomPatches, TrainingDataModule

ROOT = Path(__file__).parents[1]


def blobs(folder: Path, count: int = 5) -> None:
    """Noisy images in images/ and what is bright in them in labels/."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for n in range(count):
        smooth = gaussian_filter(rng.normal(size=(40, 44, 36)), 4)
        smooth /= smooth.std()
        image = (smooth + 0.3 * rng.normal(size=smooth.shape)).astype(np.float32)
        nib.save(nib.Nifti1Image(image, np.eye(4)), folder / f"images/s{n}.nii.gz")
        nib.save(nib.Nifti1Image((smooth > 0.7).astype(np.uint8), np.eye(4)), folder / f"labels/s{n}.nii.gz")


def sampler(shape: tuple[int, int, int], patch: int) -> GridSampler:
    """An image whose voxels hold their own number, and a label with one rare class."""
    image = torch.arange(np.prod(shape), dtype=torch.float32).reshape(shape)
    label = torch.zeros(shape, dtype=torch.uint8)
    label[0, 0, 0] = 3
    return GridSampler(Subject(image=ScalarImage(tensor=image), label=LabelMap(tensor=label)), patch, fit=True)


def test_image_and_label_of_a_random_patch_come_from_one_place() -> None:
    """The label at a voxel of a patch is the label of the voxel whose number the image patch holds there."""
    one = sampler((12, 9, 14), 6)
    patches = RandomPatches([one], 50, 0.5, torch.Generator().manual_seed(0))
    volume = one.volume("label")[0].flatten()
    for n in range(len(patches)):
        image, label = patches[n]
        assert image.shape == label.shape == (1, 6, 6, 6)
        assert torch.equal(volume[image[0].long()], label[0])


def test_balanced_patches_hold_a_rare_class_half_of_the_time() -> None:
    """With two classes and balanced=1, half of the patches are centred on the class that has one voxel."""
    patches = RandomPatches([sampler((40, 40, 40), 4)], 400, 1.0, torch.Generator().manual_seed(0))
    share = np.mean([bool((patches[n][1] == 3).any()) for n in range(len(patches))])
    assert 0.4 < share < 0.6


def test_unbalanced_patches_reach_every_voxel() -> None:
    """Starts are uniform over all that fit, the outermost included."""
    patches = RandomPatches([sampler((4, 3, 3), 3)], 60, 0.0, torch.Generator().manual_seed(0))
    firsts = {int(patches[n][0].min()) for n in range(len(patches))}
    assert firsts == {0, 9}


def test_volumes_smaller_than_the_patch_are_padded() -> None:
    """A patch larger than the volume holds all of it."""
    image, label = RandomPatches([sampler((3, 9, 9), 8)], 1, 0.0, torch.Generator())[0]
    assert image.shape == label.shape == (1, 8, 8, 8)


def test_the_split_depends_on_the_seed_alone_and_shares_no_subject(tmp_path: Path) -> None:
    """Training and validation subjects are disjoint, complete, and the same for one seed."""
    blobs(tmp_path)

    def split(seed: int) -> tuple[list[str], list[str]]:
        data = TrainingDataModule(tmp_path / "images", f"{tmp_path}/labels/{{subject}}.nii.gz", 16, seed=seed)
        return [c.subject for c in data.training_cases], [c.subject for c in data.validation_cases]

    training, validating = split(1)
    assert sorted(training + validating) == ["s0", "s1", "s2", "s3", "s4"]
    assert len(validating) == 1
    assert split(1) == (training, validating)
    assert len({tuple(split(seed)[1]) for seed in range(8)}) > 1


def test_a_missing_label_or_too_few_subjects_are_named_before_training(tmp_path: Path) -> None:
    """Both are configuration errors with the subject or the number in them."""
    blobs(tmp_path, 2)
    labels = f"{tmp_path}/labels/{{subject}}.nii.gz"
    with pytest.raises(ConfigError, match="leave none to train on"):
        TrainingDataModule(tmp_path / "images/s0.nii.gz", labels, 16)
    (tmp_path / "labels/s1.nii.gz").unlink()
    with pytest.raises(ConfigError, match=r"s1: data\.labels names .*s1\.nii\.gz"):
        TrainingDataModule(tmp_path / "images", labels, 16)


def test_a_label_on_another_grid_is_named(tmp_path: Path) -> None:
    """Training never silently goes on with labels beside their image."""
    blobs(tmp_path, 2)
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "labels/s1.nii.gz")
    data = TrainingDataModule(tmp_path / "images", f"{tmp_path}/labels/{{subject}}.nii.gz", 16, validation=0)
    with pytest.raises(InputError, match=r"s1: .*'image' and 'label'.*different grids"):
        data.setup("fit")


@pytest.mark.slow
def test_what_train_py_trains_predict_py_predicts(tmp_path: Path) -> None:
    """Eight epochs on noisy blobs give a checkpoint whose labels have a Dice above 0.85; curves are in TensorBoard."""
    blobs(tmp_path)
    environment = os.environ | {"PYTHONWARNINGS": "default"}

    def run(script: str, *arguments: str) -> None:
        command = [sys.executable, str(ROOT / script), "data.inputs=images", "data.patch_size=32", *arguments]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr

    run(
        "train.py", "data.labels=labels/{subject}.nii.gz", "trainer.max_epochs=8", "output_dir=trained",
        "trainer.enable_progress_bar=false", "data.patches_per_volume=6",
    )  # fmt: skip
    checkpoint = "ckpt_path=trained/checkpoints/epoch_007.ckpt"
    run("predict.py", "model=state_dict", "model/net=unet", "model.prefix=net.", checkpoint, "data.patch_overlap=16")
    for n in range(5):
        found = nib.load(tmp_path / f"outputs/s{n}_labels.nii.gz").get_fdata() > 0
        truth = nib.load(tmp_path / f"labels/s{n}.nii.gz").get_fdata() > 0
        assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.85

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (tmp_path / "trained").rglob("events.out.tfevents.*")
    curves = EventAccumulator(str(events))
    curves.Reload()
    losses = [scalar.value for scalar in curves.Scalars("train_loss")]
    assert len(losses) == len(curves.Scalars("val_loss")) == 8
    assert losses[-1] < 0.7 * losses[0]
