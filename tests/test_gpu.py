"""Tests that a CUDA device gives the same results as the host."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from synthetic import Over50, noise, read, save

from voxquilt.data.foreground import patches_to_predict
from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.subject import ScalarImage, Subject
from voxquilt.geometry.slab_split import Part, split_rows
from voxquilt.models.predictor import PatchPredictor
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.writer_callback import VolumeWriter
from voxquilt.stitching.blend_registry import BLENDS
from voxquilt.stitching.stitch import Stitch
from voxquilt.stitching.subject_stitcher import SubjectStitcher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("mode", [*BLENDS])
@pytest.mark.parametrize("spacing", [None, 1.7])
def test_sums_on_the_device_equal_sums_on_the_host(mode: str, spacing: float | None) -> None:
    """The ring, the restoring to native space and the products all run on the device."""
    generator = torch.Generator().manual_seed(0)
    subject = Subject(t1=ScalarImage(tensor=torch.randn(1, 30, 22, 26, generator=generator)))
    model_subject, space = Preprocess(spacing=spacing)(subject)
    sampler = GridSampler(model_subject, 12, 4, fit=True)
    patches = torch.randn(len(sampler), 3, 12, 12, 12, generator=generator)
    names = ["logits", "probabilities", "entropy", "disagreement"]
    made = {}
    for device in ("cpu", "cuda"):
        quilt = SubjectStitcher(Stitch(mode, names, fill=0), sampler, space, skipped=[1, 5])
        for n in sampler.grid.streaming_order.tolist():
            if n not in (1, 5):
                quilt.add({"": patches[n : n + 1].to(device)}, [n])
        made[device] = quilt.volumes()
    for name in names:
        np.testing.assert_allclose(made["cuda"][name], made["cpu"][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("restore", ["scores", "labels"])
def test_labels_made_on_the_device_equal_those_of_the_host(restore: str) -> None:
    """The scores are whole numbers, so rounding has no effect."""
    subject = Subject(t1=ScalarImage(tensor=torch.zeros(1, 30, 22, 26)))
    model_subject, space = Preprocess(spacing=2.0)(subject)
    sampler = GridSampler(model_subject, 8, 4, fit=True)
    patches = torch.randint(0, 50, (len(sampler), 40, 8, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    made = {}
    for device in ("cpu", "cuda"):
        quilt = SubjectStitcher(Stitch("crop", compare=["average"], restore=restore), sampler, space)
        for n in sampler.grid.streaming_order.tolist():
            quilt.add({"": patches[n : n + 1].to(device)}, [n])
        made[device] = quilt.volumes()
    for name, labels in made["cpu"].items():
        np.testing.assert_array_equal(made["cuda"][name], labels)


def test_a_run_on_the_device_writes_the_labels_of_the_host(tmp_path: Path) -> None:
    """A voxel-wise network gives identical labels."""
    save(tmp_path / "in/a.nii", volume := noise((20, 17, 14)))
    writer = VolumeWriter(tmp_path / "out")
    trainer = Trainer(accelerator="gpu", devices=1, logger=False, callbacks=[writer], enable_progress_bar=False)
    data = GridDataModule(tmp_path / "in", 8, 4, batch_size=3)
    trainer.predict(PatchPredictor(Over50()), datamodule=data, return_predictions=False)
    np.testing.assert_array_equal(read(tmp_path / "out/a_labels.nii.gz"), np.asarray(volume) > 50)


@pytest.mark.parametrize("mode", [*BLENDS])
@pytest.mark.parametrize("skipped", [[], [0, 5]])
def test_parts_on_the_device_and_on_the_host_equal_one_process(mode: str, skipped: list[int]) -> None:
    """Heads travel through the host, between any two kinds of process."""
    generator = torch.Generator().manual_seed(0)
    subject = Subject(t1=ScalarImage(tensor=torch.randn(1, 40, 14, 12, generator=generator)))
    model_subject, space = Preprocess(spacing=0.9)(subject)
    sampler = GridSampler(model_subject, 8, 4, fit=True)
    patches = torch.randn(len(sampler), 3, 8, 8, 8, generator=generator)
    stitch = Stitch(mode, ["logits", "disagreement"], fill=0)

    def quilted(device: str, part: Part, *, whole: bool) -> SubjectStitcher:
        quilt = SubjectStitcher(stitch, sampler, space, skipped=skipped, part=part, holds_all=whole)
        for n in patches_to_predict(sampler, skipped, part):
            quilt.add({"": patches[n : n + 1].to(device)}, [n])
        return quilt

    parts = split_rows(sampler.grid, 3)
    expected = quilted("cpu", Part(parts[0].axis, 0, parts[-1].stop), whole=True).volumes()
    for devices in (("cuda", "cpu", "cuda"), ("cpu", "cuda", "cuda")):
        team = [quilted(d, part, holds_all=n == 0) for n, (d, part) in enumerate(zip(devices, parts, strict=True))]
        for quilt, following in reversed(list(pairwise(team))):
            head = following.head()
            assert head is not None
            assert {planes.device.type for planes in head} == {"cpu"}
            quilt.join(head)
        for quilt in team[1:]:
            for name, where, array in quilt.parts():
                team[0].place(name, where, array)
        for name, volume in team[0].volumes().items():
            np.testing.assert_allclose(volume, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["crop", "gaussian"])
def test_sums_that_move_to_the_host_halfway_equal_those_that_stay(mode: str) -> None:
    """Patches that were added before the device was full are kept."""
    subject = Subject(t1=ScalarImage(tensor=torch.zeros(1, 30, 22, 26)))
    model_subject, space = Preprocess()(subject)
    sampler = GridSampler(model_subject, 12, 4)
    patches = torch.randn(len(sampler), 3, 12, 12, 12, generator=torch.Generator().manual_seed(0)).cuda()
    made = []
    for moved in (False, True):
        quilt = SubjectStitcher(Stitch(mode, ["logits"]), sampler, space, skipped=[2])
        for place, n in enumerate(sampler.grid.streaming_order.tolist()):
            if n != 2:
                quilt.add({"": patches[n : n + 1]}, [n])
            if moved and place == len(sampler) // 2:
                quilt.to(torch.device("cpu"))
        made.append(quilt.volumes()["logits"])
    np.testing.assert_allclose(made[1], made[0], rtol=1e-5, atol=1e-5)


class Hungry(Over50):
    """Needs 256 MiB of device memory per patch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = torch.empty(len(x) * 2**28, dtype=torch.uint8, device=x.device)
        return super().forward(x) + held[0] * 0


@pytest.mark.parametrize(("room", "wanted"), [(3 * 2**29, "done"), (2**27, "failed")])
def test_a_full_device_makes_batches_smaller_before_subjects_fail(room: int, wanted: str, tmp_path: Path) -> None:
    """With CUDA's own error: labels are right if one patch fits; if none does, every subject has its reason."""
    save(tmp_path / "in/a.nii", volume := noise((20, 17, 14)))
    writer = VolumeWriter(tmp_path / "out")
    trainer = Trainer(accelerator="gpu", devices=1, logger=False, callbacks=[writer], enable_progress_bar=False)
    data = GridDataModule(tmp_path / "in", 8, 4, batch_size=8)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    try:
        trainer.predict(PatchPredictor(Hungry()), datamodule=data, return_predictions=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [row.status for row in writer.rows] == [wanted]
    if wanted == "done":
        np.testing.assert_array_equal(read(tmp_path / "out/a_labels.nii.gz"), np.asarray(volume) > 50)
    else:
        assert "out of memory" in writer.rows[0].error
