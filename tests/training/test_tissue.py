"""Tests the tissue experiment: a real training on a real brain, and the properties of its network."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from forks import Server, checked
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from voxquilt.data.subject import ScalarImage, Subject
from voxquilt.datasets import tissue_table
from voxquilt.predict import predict_volume
from voxquilt.reporting.metrics import class_dice
from voxquilt.stitching.stitch import Stitch

ROOT = Path(__file__).parents[2]


def network(seed: int) -> torch.nn.Module:
    """The experiment's network with random weights, in prediction mode."""
    net = OmegaConf.merge(
        OmegaConf.load(ROOT / "conf/model/net/dynunet.yaml"),
        OmegaConf.load(ROOT / "conf/experiment/tissue.yaml").model.net,
    )
    torch.manual_seed(seed)
    return instantiate(net, _convert_="all").eval()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_patches_overlapping_by_the_receptive_field_equal_the_whole_volume(seed: int) -> None:
    """To 1e-5 at every voxel: its patch extends at least 20 voxels beyond it."""
    brain = ScalarImage(tissue_table().parent / "anterior_t1.nii.gz").data[:, 40:140, 20:100, 40:132] / 127.5 - 1
    subject = Subject(t1=ScalarImage(tensor=brain))
    options = {"divisible_by": 4, "stitch": Stitch("crop", products=["logits"])}
    whole = predict_volume(network(seed), subject, (100, 80, 92), 0, **options)["logits"]  # type: ignore[arg-type]
    patches = predict_volume(network(seed), subject, 64, 40, **options)["logits"]  # type: ignore[arg-type]
    assert whole.std() > 0.01
    assert np.abs(whole - patches).max() < 1e-5
    # Control: with borders of 4 voxels they differ.
    close = predict_volume(network(seed), subject, 64, 8, **options)["logits"]  # type: ignore[arg-type]
    assert np.abs(whole - close).max() > 1e-4


@pytest.mark.slow
def test_a_minute_of_training_separates_tissues(forks: Server, tmp_path: Path) -> None:
    """On the half of the brain not trained on; then the checkpoint predicts without further settings."""
    run = forks.start(
        "experiment=tissue", "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=2", "data.patches_per_volume=120",
        "trainer.accelerator=cpu",
        "output_dir=trained", cwd=tmp_path, script="train",
    )  # fmt: skip
    assert checked(run.wait(400)) == 0, run.text
    (folder,) = {p.parent for p in (tmp_path / "trained/tensorboard").rglob("events*") if "hparams" not in str(p)}
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == ["validation/anterior"]
    assert len(events.Scalars("train_loss")) == 2
    (grey,), (white,) = (events.Scalars(f"val_dice_{tissue}") for tissue in ("grey", "white"))
    assert grey.value > 0.7
    assert white.value > 0.7
    image = tissue_table().parent / "anterior_t1.nii.gz"
    run = forks.start(f"data.inputs={image}", "ckpt_path=trained/checkpoints/best.ckpt", cwd=tmp_path)
    assert checked(run.wait(200)) == 0, run.text
    labels = torch.from_numpy(np.asarray(nib.load(tmp_path / "outputs/anterior_t1_labels.nii.gz").dataobj)).long()
    truth = torch.from_numpy(np.asarray(nib.load(tissue_table().parent / "anterior_label.nii.gz").dataobj)).long()
    assert class_dice(labels, truth, 3)[1:].tolist() == pytest.approx([grey.value, white.value], abs=1e-3)
