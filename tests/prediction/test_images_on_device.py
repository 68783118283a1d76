"""Tests runs whose images are on a device, for which the host stands: they write the files of other runs."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices import HostAsDevice, host_as_device
from lightning.pytorch import Trainer
from synthetic import Cramped, FirstMinusSecond, Over50, Plus, is_planned, noise, save
from torch import Tensor

from voxquilt.data.preprocess import Preprocess
from voxquilt.data.staging import Staging
from voxquilt.data.subject import LabelMap, ScalarImage
from voxquilt.filesystem import read_json
from voxquilt.models.predictor import PatchPredictor
from voxquilt.predict import predict_volume
from voxquilt.prediction import open_subjects, output_files
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.dry_run import DryRun
from voxquilt.prediction.open_subjects import OpenSubjects
from voxquilt.prediction.output_files import OutputOptions
from voxquilt.prediction.writer_callback import VolumeWriter
from voxquilt.reporting.manifest import Row
from voxquilt.stitching.stitch import Stitch

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]
AFFINE = np.array([[0, 0, -1.3, 4], [-0.8, 0, 0, 9], [0, 2, 0, -7], [0, 0, 0, 1.0]])


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Four subjects of two images, one of them smaller than a patch."""
    for n, shape in enumerate([(19, 11, 14), (3, 9, 2), (8, 8, 8), (9, 8, 31)]):
        save(tmp_path / f"scans/s{n}_t1.nii.gz", noise(shape, n), AFFINE)
        save(tmp_path / f"scans/s{n}_t2.nii", noise(shape, n + 9).astype(np.uint8), AFFINE)
    return tmp_path / "scans"


def predict(out: Path, scans: Path, network: Any, *, stitch: Stitch | None = None, **options: Any) -> list[Row]:
    options = {"images": {"t1": "{subject}_t1.nii.gz"}, "batch_size": 3} | options
    writer = VolumeWriter(out, stitch, compress=False, log="plain")
    data = GridDataModule(scans, 8, 4, **options)
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[writer], enable_progress_bar=False)
    trainer.predict(PatchPredictor(network), datamodule=data, return_predictions=False)
    return writer.rows


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.nii")}


BOTH = {"images": {"t1": "{subject}_t1.nii.gz", "t2": "{subject}_t2.nii"}}


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (Plus(), {}),
        (Plus(), {"num_workers": 0}),
        (FirstMinusSecond(), {**BOTH, "num_workers": 2, "batch_size": 5}),
        (Plus(), {"preprocess": Preprocess("LPS", 1.1)}),
        (Plus(), {"preprocess": Preprocess(None, intensity=[torch.neg, lambda x: x.numpy() + 0.5])}),
        (Plus(), {"padding_mode": "reflect"}),
        (Plus(), {"padding_mode": "mean", "divisible_by": 16}),
        (Over50(), {"skip": 98.5}),
    ],
)
def test_a_run_on_a_device_writes_the_files_of_the_host(
    network: Any, options: dict[str, Any], scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every image comes to the device once, in the type of its file."""
    predict(tmp_path / "host", scans, network, **options)
    seen = host_as_device(monkeypatch)
    rows = predict(tmp_path / "device", scans, network, **options)
    assert [row.status for row in rows] == ["done"] * 4
    assert files(tmp_path / "device") == files(tmp_path / "host")
    images = len(options.get("images", "1"))
    assert sorted(map(str, seen.uploads)) == ["torch.int16"] * 4 + ["torch.uint8"] * 4 * (images - 1)
    assert len(seen.feeds) == 1
    assert seen.feeds[0].takes_volumes


def test_with_device_cpu_only_batches_come_to_the_device(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are the same."""
    predict(tmp_path / "host", scans, Plus())
    seen = host_as_device(monkeypatch)
    predict(tmp_path / "device", scans, Plus(), preprocess=Preprocess(device="cpu"))
    assert files(tmp_path / "device") == files(tmp_path / "host")
    assert (seen.uploads, len(seen.feeds)) == ([], 1)


def test_images_that_do_not_fit_the_device_stay_on_the_host(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One of four, found while it is loaded: no subject is lost, and the others are on the device."""
    predict(tmp_path / "host", scans, Plus())
    seen = host_as_device(monkeypatch)
    upload = Staging.upload

    def cramped(staging: Staging, voxels: Tensor) -> Tensor:
        if voxels.numel() > 2500:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return upload(staging, voxels)

    monkeypatch.setattr(Staging, "upload", cramped)
    rows = predict(tmp_path / "device", scans, Plus())
    assert [row.status for row in rows] == ["done"] * 4
    assert files(tmp_path / "device") == files(tmp_path / "host")
    assert len(seen.uploads) == 3
    assert sum("too small for a subject's images" in record.getMessage() for record in caplog.records) == 1


def test_a_plan_without_room_for_images_keeps_all_on_the_host(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is tried."""
    predict(tmp_path / "host", scans, Plus())
    seen = host_as_device(monkeypatch)
    monkeypatch.setattr(output_files, "device_memory", lambda device: 10_000)
    predict(tmp_path / "device", scans, Plus())
    assert files(tmp_path / "device") == files(tmp_path / "host")
    assert seen.uploads == []


class Full(Over50):
    """Runs out of memory as long as images are on the device, after a few passes."""

    def __init__(self, seen: HostAsDevice, after: int) -> None:
        super().__init__()
        self.seen, self.left = seen, after
        self.fitting: list[int] = []
        """Patches of each pass for which there was memory."""

    def forward(self, x: Tensor) -> Tensor:
        if is_planned(x):
            return super().forward(x)
        self.left -= 1
        if self.left < 0 and self.seen.feeds[-1].takes_volumes:
            self.fitting.clear()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.fitting.append(len(x))
        return super().forward(x)


@pytest.mark.parametrize("after", [0, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_device_loses_patches_of_a_batch_then_sums_then_images_but_no_subject(
    after: int, workers: int, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """In this order, each a line of the log; whole batches are tried again whenever something has left the device."""
    caplog.set_level(logging.WARNING)
    predict(tmp_path / "host", scans, Over50())
    seen = host_as_device(monkeypatch)
    network = Full(seen, after)
    rows = predict(tmp_path / "device", scans, network, num_workers=workers)
    assert [row.status for row in rows] == ["done"] * 4
    assert files(tmp_path / "device") == files(tmp_path / "host")
    lines = [record.getMessage() for record in caplog.records if "memory is" in record.getMessage()]
    smaller = ["batches of 2", "batches of 1"]
    wanted = [*smaller, "sums are kept on the host", *smaller, "images are kept on the host"]
    assert network.fitting[0] == max(network.fitting) == 3
    assert [line for line, part in zip(lines, wanted, strict=True) if part not in line] == []


def test_a_network_that_never_fits_fails_its_subjects(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the whole ladder; the run ends."""
    seen = host_as_device(monkeypatch)
    rows = predict(tmp_path / "out", scans, Cramped(most=0))
    assert [row.status for row in rows] == ["failed"] * 4
    assert not seen.feeds[0].takes_volumes


def test_one_volume_is_predicted_on_a_device_as_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """With spacing, a mask, a transform that fails on the device, padding and a cropped output."""
    image = ScalarImage(tensor=torch.from_numpy(noise((17, 9, 12)))[None], affine=AFFINE)
    mask = LabelMap(tensor=torch.from_numpy(noise((17, 9, 12), 3))[None] > 98, affine=AFFINE)
    valid = torch.nn.Conv3d(1, 2, 3).eval()
    cases: list[tuple[Any, dict[str, Any]]] = [
        (Plus(), {"preprocess": Preprocess(spacing=1.4), "padding_mode": "edge", "batch_size": 4}),
        (Over50(), {"skip": mask, "stitch": Stitch(products=["logits"], fill=0)}),
        (valid, {"output": "cropped", "stitch": Stitch(products=["logits"])}),
    ]
    wanted = [predict_volume(network, image, 8, 4, **options) for network, options in cases]
    seen = host_as_device(monkeypatch)
    for (network, options), volumes in zip(cases, wanted, strict=True):
        made = predict_volume(network, image, 8, 4, device="cpu", **options)
        assert made.keys() == volumes.keys()
        for name, volume in volumes.items():
            np.testing.assert_array_equal(made[name], volume)
    assert seen.uploads == [torch.int16] * 3
    made = predict_volume(Plus(), image, 8, 4, preprocess=Preprocess(spacing=1.4, device="cpu"), padding_mode="edge")
    np.testing.assert_array_equal(made["image"], wanted[0]["image"])
    assert len(seen.uploads) == 3


def test_a_timed_plan_measures_with_images_on_the_device(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its subject comes to the device, too, and plan.json says where images are."""
    seen = host_as_device(monkeypatch)
    data = GridDataModule(scans, 8, 4, images={"t1": "{subject}_t1.nii.gz"}, batch_size=3)
    data.detailed = True
    callback = DryRun(OutputOptions(tmp_path / "out", Stitch()), timed=True)
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False)
    trainer.predict(PatchPredictor(Over50()), datamodule=data, return_predictions=False)
    plan = read_json(tmp_path / "out/plan.json")
    assert plan["images_on"] == "device"
    assert plan["memory"]["host"]["images"] == 0
    assert plan["memory"]["device"]["images"] > 0
    assert len(seen.uploads) == 1


def test_kernels_are_tried_before_the_first_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first subject is read: to import Triton takes a second, for which a device would wait."""
    events: list[object] = []
    begin = OpenSubjects.begin_batch
    monkeypatch.setattr(open_subjects, "execution_on", events.append)
    monkeypatch.setattr(OpenSubjects, "begin_batch", lambda self: (events.append("batch"), begin(self)))
    save(tmp_path / "scans/a_t1.nii", noise((9, 8, 8)), AFFINE)
    predict(tmp_path / "out", tmp_path / "scans", Plus(), images={"t1": "{subject}_t1.nii"})
    assert events[:2] == [torch.device("cpu"), "batch"]
