"""Tests that names, checkpoints and predictions from before the modules moved into folders still work."""

import importlib
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import Server, checked
from synthetic import noise, read, run, save

import voxquilt
from voxquilt.cli.instantiate import check_classes, matches
from voxquilt.models.weights.stored_settings import carried
from voxquilt.old_names import NEW, OLD
from voxquilt.prediction.fingerprint import digest, settings

CHECKPOINT = Path(__file__).parent / "data/trained_before_the_folders.ckpt"
"""Made by train.py of the last commit before the move: a Conv3d of one voxel, an epoch on two subjects."""
TRAINING = (
    "data.inputs=in", "data.labels=labels/{subject}.nii", "data.folds=null", "data.patch_size=8", "data.batch_size=1",
    "data.patches_per_volume=2", "data/augment=none", "~model/net", "+model.net._target_=torch.nn.Conv3d",
    "+model.net.in_channels=1", "+model.net.out_channels=2", "+model.net.kernel_size=1", "trainer=cpu",
    "stitch.overlap_mode=crop", "logger=null",
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The subjects on which the checkpoint was trained, and the checkpoint."""
    for n in range(2):
        save(tmp_path / f"in/s{n}.nii", noise((12, 12, 12), n))
        save(tmp_path / f"labels/s{n}.nii", (noise((12, 12, 12), n) > 50).astype("uint8"))
    shutil.copyfile(CHECKPOINT, tmp_path / "old.ckpt")
    return tmp_path


# Checkpoints


def test_an_old_checkpoint_predicts(forks: Server, place: Path) -> None:
    """Its settings have the old module names; labels are those of its network."""
    content = torch.load(CHECKPOINT, weights_only=True)
    assert content["voxquilt"]["preprocess"]["_target_"] == "voxquilt.preprocess.Preprocess"
    brought = carried(CHECKPOINT)
    assert brought is not None
    assert brought["preprocess"]["_target_"] == "voxquilt.Preprocess"
    done = forks.run("data.inputs=in/s0.nii", "ckpt_path=old.ckpt", "callbacks.writer.compress=false", cwd=place)
    assert (done.returncode, done.stderr) == (0, "")
    weight, bias = (content["state_dict"][f"net.{name}"].flatten().numpy() for name in ("weight", "bias"))
    scores = weight[:, None, None, None] * noise((12, 12, 12), 0) + bias[:, None, None, None]
    labels = read(place / "outputs/s0_labels.nii")
    np.testing.assert_array_equal(labels, scores.argmax(0))
    assert labels.any()


def test_a_training_resumes_from_an_old_checkpoint(forks: Server, place: Path) -> None:
    """Its recorded settings and data equal what is typed now; a changed setting is still named."""
    arguments = (*TRAINING, "ckpt_path=old.ckpt", "trainer.max_epochs=2")
    job = forks.start(*arguments, "data.batch_size=2", cwd=place, script="train")
    assert checked(job.wait()) == 2
    assert "old.ckpt was trained with other settings or data:\n  data.batch_size was 1 and is 2\n" in job.text
    job = forks.start(*arguments, cwd=place, script="train")
    assert checked(job.wait()) == 0, job.text
    assert "epoch 2 of 2" in job.text
    assert torch.load(place / "outputs/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1


# Configurations


def test_old_targets_on_the_command_line_work(forks: Server, place: Path) -> None:
    """Predicting with an old blend name under an old allow-list."""
    allowed = "voxquilt.stitch.*,voxquilt.preprocess.*,voxquilt.datamodule.*,voxquilt.module.*,voxquilt.writer.*"
    done = forks.run(
        "data.inputs=in/s0.nii", "ckpt_path=old.ckpt", "stitch._target_=voxquilt.stitch.Stitch",
        "model._target_=voxquilt.module.from_file", f"run.allowed_targets=[{allowed},torch.nn.*,lightning.*]",
        cwd=place,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (place / "outputs/s0_labels.nii.gz").is_file()


def test_an_old_schedule_trains(forks: Server, place: Path) -> None:
    """As docs/howto.md had it."""
    schedule = ("model.schedule._target_=voxquilt.training.polynomial", "~model.schedule.warmup")
    job = forks.start(*TRAINING, *schedule, "trainer.max_epochs=1", cwd=place, script="train")
    assert checked(job.wait()) == 0, job.text


@pytest.mark.parametrize("old", NEW)
def test_every_old_target_leads_to_a_public_name(old: str) -> None:
    """And back, since fingerprints use a class's first name; an allow-list may have either."""
    name = NEW[old].removeprefix("voxquilt.")
    assert name in voxquilt.__all__
    assert OLD[NEW[old]] == old
    assert matches(NEW[old], [f"{old.rpartition('.')[0]}.*"])
    assert matches(NEW[old], ["voxquilt.*"])
    assert not matches(NEW[old], ["voxquilt.other.*", "monai.*"])
    if isinstance(getattr(voxquilt, name), type):
        check_classes({"_target_": NEW[old]}, [old])


# Fingerprints


def configuration() -> dict[str, Any]:
    """The configuration of a run as plain values."""
    return {
        "data": {
            "_target_": "voxquilt.GridDataModule", "inputs": "in", "images": None, "patch_size": [96, 96, 96],
            "patch_overlap": 48, "padding_mode": None, "divisible_by": 1, "batch_size": 1, "num_workers": 1,
            "skip": None, "labels": None, "nonfinite": "error",
        },
        "preprocess": {
            "_target_": "voxquilt.Preprocess", "orientation": "RAS", "spacing": 1.0,
            "intensity": [{"_target_": "monai.transforms.NormalizeIntensity"}],
        },
        "model": {
            "_target_": "voxquilt.predictor_from_file", "ckpt_path": None, "prefix": None, "flips": [0],
            "average": "logits", "net": {"_target_": "monai.networks.nets.UNet", "channels": [4, 8]},
        },
        "stitch": {"_target_": "voxquilt.Stitch", "overlap_mode": "gaussian", "products": None, "compare": []},
        "callbacks": {
            "writer": {
                "_target_": "voxquilt.VolumeWriter", "output_dir": "outputs", "on_error": "skip", "compress": True,
                "overlay": False,
            },
        },
        "trainer": {"_target_": "lightning.pytorch.Trainer", "accelerator": "auto", "precision": None},
        "run": {"seed": 3, "on_error": "skip"},
        "ckpt_path": None, "output_dir": "outputs", "logger": None,
    }  # fmt: skip


def test_subjects_predicted_before_the_move_stay_done() -> None:
    """The digest is the one that the old code gave to these settings by their old names."""
    assert digest(settings(configuration())) == "8d29e35c3741e79f"
    assert digest(settings({**configuration(), "run": {"seed": 4}})) != "8d29e35c3741e79f"


# Imports


@pytest.mark.parametrize(
    ("module", "name", "new"),
    [
        ("blend", "Windowed", "voxquilt.stitching.blend.Windowed"),
        ("blend", "gaussian", "voxquilt.stitching.blend.gaussian"),
        ("blend", "to_blend", "voxquilt.stitching.blend.to_blend"),
        ("datamodule", "GridDataModule", "voxquilt.GridDataModule"),
        ("grid", "make_grid", "voxquilt.geometry.grid.make_grid"),
        ("module", "PatchPredictor", "voxquilt.PatchPredictor"),
        ("module", "from_file", "voxquilt.predictor_from_file"),
        ("preprocess", "Preprocess", "voxquilt.Preprocess"),
        ("stitch", "Stitch", "voxquilt.Stitch"),
        ("traindata", "TrainingDataModule", "voxquilt.TrainingDataModule"),
        ("writer", "VolumeWriter", "voxquilt.VolumeWriter"),
    ],
)
def test_an_old_import_works_and_names_the_new_one(module: str, name: str, new: str) -> None:
    """For imports that documents showed before."""
    with pytest.warns(FutureWarning, match=rf"^voxquilt\.{module}\.{name} is now {new.replace('.', '[.]')}\.$"):
        value = getattr(importlib.import_module(f"voxquilt.{module}"), name)
    place, _, attribute = new.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value is getattr(importlib.import_module(place), attribute)


def test_an_old_import_statement_in_a_users_file_works(tmp_path: Path) -> None:
    """The warning names its line."""
    (tmp_path / "mine.py").write_text("from voxquilt.writer import VolumeWriter\nprint(VolumeWriter.__name__)\n")
    save(tmp_path / "a.nii", noise((4, 4, 4)))
    done = run(str(tmp_path / "mine.py"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "VolumeWriter\n")
    assert "mine.py:1: FutureWarning: voxquilt.writer.VolumeWriter is now voxquilt.VolumeWriter." in done.stderr


def test_a_name_that_never_existed_is_an_import_error() -> None:
    """Of a module, or in one that did exist."""
    with pytest.raises(ModuleNotFoundError, match=r"voxquilt\.blends"):
        importlib.import_module("voxquilt.blends")
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = importlib.import_module("voxquilt.blend").no_such_name
