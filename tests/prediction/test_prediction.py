"""Tests predict runs: they equal the plain loop, lose and mix up no subject, and bound their memory."""

import csv
import gzip
import json
import logging
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import nibabel as nib
import numpy as np
import pytest
import torch
from synthetic import FirstMinusSecond, Over50, Plus, Touchy, is_planned, noise, read, save, unpacked
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d
from torch.utils.data import DataLoader

from voxquilt.data.batch import PatchBatch
from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.formats.nifti import write
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.subject import ScalarImage, Subject
from voxquilt.data.subject_task import LoadedSubject
from voxquilt.errors import ConfigError, RunError
from voxquilt.models.predictor import PatchPredictor
from voxquilt.predict import predict_volume
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.writer_callback import VolumeWriter
from voxquilt.stitching.accumulator import Accumulator
from voxquilt.stitching.stitch import Stitch
from voxquilt.stitching.subject_stitcher import SubjectStitcher

pytestmark = [
    pytest.mark.timeout(60),  # a deadlock must not look like a slow test
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # of Lightning with a new torch
]
SHAPES = {"large": (19, 11, 14), "small": (3, 9, 2), "exact": (8, 8, 8), "flat": (23, 1, 8), "long": (9, 8, 31)}
AFFINES = [
    np.diag([1.0, 1, 1, 1]),
    np.array([[0, 0, -1.3, 4], [-0.8, 0, 0, 9], [0, 2, 0, -7], [0, 0, 0, 1.0]]),  # permuted, flipped, three spacings
    np.array([[0.9, 0.3, 0, 1], [-0.3, 0.9, 0, 2], [0, 0, -1, 3], [0, 0, 0, 1.0]]),  # oblique
]


class Ramp(nn.Module):
    """Scores that depend on the position in the patch, so that blends differ; equal to the bit in any batch."""

    def forward(self, x: Tensor) -> Tensor:
        i, j, k = (torch.arange(n, dtype=x.dtype) for n in x.shape[2:])
        ramp = i[:, None, None] - 2 * j[:, None] + 3 * k
        return torch.cat([x + ramp, 60 - x + 0 * ramp, 2 * x - ramp], 1)


class Several(nn.Module):
    """Named outputs with different channels and sizes."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"seg": torch.cat([50 - x, x - 50], 1), "half": avg_pool3d(x, 2), "flat": avg_pool3d(x, (1, 1, 4))}


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return pl.Trainer(**quiet, enable_model_summary=False, accelerator="cpu", callbacks=list(callbacks), **options)


def predict(
    folder: Path,
    inputs: object,
    module: nn.Module,
    *,
    patch: int | tuple[int, int, int] = 8,
    overlap: int = 4,
    stitch: Stitch | None = None,
    on_error: str = "skip",
    options: Mapping[str, Any] | None = None,
    **data: Any,
) -> list[dict[str, str]]:
    """Predict into a folder through Lightning; returns the rows of the manifest."""
    module = module if isinstance(module, pl.LightningModule) else PatchPredictor(module)
    writer = VolumeWriter(folder, stitch, on_error=on_error)
    loaded = GridDataModule(inputs, patch, overlap, **data)
    trainer(writer, **(options or {})).predict(module, datamodule=loaded, return_predictions=False)
    return manifest(folder)


def manifest(folder: Path) -> list[dict[str, str]]:
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def statuses(rows: list[dict[str, str]]) -> dict[str, str]:
    return {row["subject"]: row["status"] for row in sorted(rows, key=lambda row: row["subject"])}


def errors(rows: list[dict[str, str]]) -> dict[str, str]:
    return {row["subject"]: row["error"] for row in rows if row["status"] == "failed"}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Subjects of different shapes, orientations and spacings."""
    folder = tmp_path_factory.mktemp("cohort")
    for n, (name, shape) in enumerate(SHAPES.items()):
        save(folder / f"{name}.nii.gz", noise(shape, n), AFFINES[n % 3])
    return folder


# Equality with the plain loop


def plain(folder: Path, cohort: Path, network: nn.Module, stitch: Stitch, **options: Any) -> None:
    """The results of predict_volume, one subject after another."""
    folder.mkdir()
    for path in cohort.iterdir():
        subject = Subject(image=ScalarImage(path))
        volumes = predict_volume(network.eval(), subject, stitch=stitch, output="resampled", **options)
        for product, volume in volumes.items():
            header = subject.images["image"].file.header
            target = folder / f"{path.name[:-7]}_{product}.nii.gz"
            write(target, volume, subject.frame, header=header)
            target.write_bytes(gzip.compress(unpacked(target)))  # how a file is packed is no part of the promise


def files(folder: Path) -> dict[str, bytes]:
    """Unpacked contents of the files."""
    return {path.name: unpacked(path) for path in folder.glob("*.nii.gz")}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["crop", "average", "hann", "gaussian"])
@pytest.mark.parametrize("spacing", [None, 1.7])
@pytest.mark.parametrize("orientation", ["RAS", "PIL", None])
def test_a_run_writes_the_bytes_that_the_plain_loop_writes(
    mode: str, spacing: float | None, orientation: str | None, cohort: Path, tmp_path: Path
) -> None:
    """For every batch size: batches span subjects, and some volumes are smaller than a patch."""
    stitch = Stitch(mode, ["labels", "probabilities"])
    preprocess = Preprocess(orientation, spacing)
    options = {"patch_size": 8, "patch_overlap": 4, "preprocess": preprocess}
    plain(tmp_path / "plain", cohort, Ramp(), stitch, **options)
    expected = files(tmp_path / "plain")
    assert len(expected) == 2 * len(SHAPES)
    for batch_size in (1, 3, 5):
        folder = tmp_path / str(batch_size)
        rows = predict(folder, cohort, Ramp(), stitch=stitch, preprocess=preprocess, batch_size=batch_size)
        assert set(statuses(rows).values()) == {"done"}
        found = files(folder)
        # Voxels first, since their failure shows what differs; the bytes add headers and the signs of zeros.
        for name in expected:
            np.testing.assert_array_equal(read(folder / name), read(tmp_path / "plain" / name), err_msg=name)
        assert found == expected


@pytest.mark.parametrize("workers", [0, 1, 2, 7])
def test_the_number_of_loading_threads_does_not_change_the_files(workers: int, cohort: Path, tmp_path: Path) -> None:
    """Also with more threads than subjects, padding, and a grid that is made divisible."""
    options = {"padding_mode": "reflect", "divisible_by": (4, 1, 6), "batch_size": 4}
    plain(tmp_path / "plain", cohort, Ramp(), Stitch(), patch_size=(8, 7, 6), patch_overlap=4, **options)
    predict(tmp_path / "run", cohort, Ramp(), patch=(8, 7, 6), num_workers=workers, **options)
    assert files(tmp_path / "run") == files(tmp_path / "plain")


def test_outputs_of_different_sizes_equal_the_plain_loop(cohort: Path, tmp_path: Path) -> None:
    """Each output has its own aggregator, also if a batch holds patches of three subjects."""
    stitch = Stitch("gaussian", {"seg": ["labels"], "half": ["image"], "flat": ["image"]})
    plain(tmp_path / "plain", cohort, Several(), stitch, patch_size=8, patch_overlap=4, divisible_by=4)
    module = PatchPredictor(Several(), output="resampled")
    predict(tmp_path / "run", cohort, module, stitch=stitch, batch_size=5, divisible_by=4)
    assert files(tmp_path / "run") == files(tmp_path / "plain")
    assert sorted(files(tmp_path / "run"))[:3] == ["exact_flat_image.nii.gz", "exact_half_image.nii.gz",
                                                   "exact_seg_labels.nii.gz"]  # fmt: skip


def test_products_of_an_unknown_output_are_an_error(cohort: Path, tmp_path: Path) -> None:
    """A misspelt name in stitch.products does not fall back to the defaults."""
    stitch = Stitch(products={"sge": ["probabilities"]})
    rows = predict(tmp_path, cohort / "exact.nii.gz", PatchPredictor(Several(), output="resampled"), stitch=stitch)
    assert "stitch.products names ['sge']; the network's outputs are ['seg', 'half', 'flat']" in errors(rows)["exact"]


# Right values


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "16-true", "bf16-mixed"])
def test_labels_are_exact_in_every_precision(precision: Any, cohort: Path, tmp_path: Path) -> None:
    """Locations and affines are not cast with the batch, so half precision rounds none of them."""
    rows = predict(tmp_path, cohort, Over50(), options={"precision": precision}, batch_size=3)
    assert set(statuses(rows).values()) == {"done"}
    for name in SHAPES:
        source = nib.load(cohort / f"{name}.nii.gz")
        written = nib.load(tmp_path / f"{name}_labels.nii.gz")
        np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(source.dataobj) > 50)
        np.testing.assert_array_equal(written.affine, source.affine)
        assert written.get_data_dtype() == np.uint8


@pytest.mark.parametrize("batch_size", [1, 4, 7, 50])
def test_subjects_that_share_a_batch_are_not_mixed_up(batch_size: int, tmp_path: Path) -> None:
    """Each subject holds a constant and comes back as that constant."""
    for n in range(12):
        save(tmp_path / f"in/s{n:02}.nii", np.full((5 + n, 4 + n % 3, 9 - n % 4), n + 1, np.float32))
    rows = predict(tmp_path / "out", tmp_path / "in", Plus(100), batch_size=batch_size, num_workers=2)
    assert [row["subject"] for row in sorted(rows, key=lambda row: row["subject"])] == [f"s{n:02}" for n in range(12)]
    for n in range(12):
        image = read(tmp_path / f"out/s{n:02}_image.nii.gz")
        assert image.shape == (5 + n, 4 + n % 3, 9 - n % 4)
        assert np.abs(image - (n + 101)).max() < 1e-4


def test_images_become_channels_in_the_configured_order(tmp_path: Path) -> None:
    """For any file types: a uint8 and a float32 image in either order, by patterns and by a table."""
    a = save(tmp_path / "in/s1_a.nii", noise((9, 8, 10), 1).astype(np.uint8)).astype(np.float32)
    b = save(tmp_path / "in/s1_b.nii", noise((9, 8, 10), 2).astype(np.float32) / 4)
    (tmp_path / "in/table.csv").write_text("subject,b,a\ns1,s1_b.nii,s1_a.nii\n")
    stitch = Stitch("crop")
    for inputs, images, expected in (
        (tmp_path / "in", {"a": "{subject}_a.nii", "b": "{subject}_b.nii"}, a - b),
        (tmp_path / "in", {"b": "{subject}_b.nii", "a": "{subject}_a.nii"}, b - a),
        (tmp_path / "in/table.csv", None, b - a),
    ):
        predict(tmp_path / "out", inputs, FirstMinusSecond(), images=images, stitch=stitch)
        np.testing.assert_array_equal(read(tmp_path / "out/s1_image.nii.gz"), expected)


def test_the_volumes_of_a_4d_file_are_channels(tmp_path: Path) -> None:
    """Last in the file, before the next image's in the batch; their number may differ between subjects."""
    four = save(tmp_path / "a.nii", noise((9, 8, 10, 2), 1).astype(np.float32))
    save(tmp_path / "b.nii", noise((9, 8, 10), 2))
    save(tmp_path / "c.nii", four[..., ::-1].copy())
    rows = predict(tmp_path / "out", tmp_path, FirstMinusSecond(), stitch=Stitch("crop"), batch_size=5)
    assert statuses(rows) == {"a": "done", "b": "failed", "c": "done"}
    np.testing.assert_array_equal(read(tmp_path / "out/a_image.nii.gz"), four[..., 0] - four[..., 1])
    np.testing.assert_array_equal(read(tmp_path / "out/c_image.nii.gz"), four[..., 1] - four[..., 0])


def test_intensity_transforms_run_before_the_network(tmp_path: Path) -> None:
    """In turn for every image, or by the image's name."""
    a = save(tmp_path / "s_a.nii", noise((9, 8, 10), 1).astype(np.float32))
    b = save(tmp_path / "s_b.nii", noise((9, 8, 10), 2).astype(np.float32))
    images = {"a": "{subject}_a.nii", "b": "{subject}_b.nii"}
    every = [lambda x: x * 2, lambda x: x + 1]
    for intensity, expected in ((every, a * 2 - b * 2), ({"b": every}, a - (b * 2 + 1))):
        preprocess = Preprocess(intensity=intensity)
        predict(
            tmp_path / "out", tmp_path, FirstMinusSecond(), images=images, stitch=Stitch("crop"), preprocess=preprocess
        )
        np.testing.assert_array_equal(read(tmp_path / "out/s_image.nii.gz"), expected)


def test_a_lower_resolution_output_is_restored_in_place(tmp_path: Path) -> None:
    """Half of the voxels of a ramp, restored from a padded grid: the ramp, except next to the padding."""
    ramp = np.broadcast_to(np.arange(21, dtype=np.float32)[:, None, None] * 10, (21, 8, 12)).copy()
    save(tmp_path / "in/r.nii", ramp)
    stitch = Stitch("crop", {"half": ["image"], "flat": ["image"]})
    module = PatchPredictor(Several(), output="resampled")
    rows = predict(tmp_path, tmp_path / "in", module, stitch=stitch, divisible_by=4)  # 24: one before, two after
    assert statuses(rows) == {"r": "done"}
    np.testing.assert_allclose(read(tmp_path / "r_half_image.nii.gz")[2:-3], ramp[2:-3], rtol=1e-6)
    np.testing.assert_allclose(read(tmp_path / "r_flat_image.nii.gz"), ramp, rtol=1e-6)


def test_a_grid_that_the_output_factor_does_not_divide_fails_the_subject(tmp_path: Path) -> None:
    """Its row gives the reason; otherwise it would be shifted by half a voxel."""
    save(tmp_path / "in/r.nii", noise((21, 8, 12)))
    (row,) = predict(tmp_path, tmp_path / "in", PatchPredictor(Several(), output="resampled"))
    assert "not a multiple of downsampling_factor" in row["error"]


# Products


def test_every_product_is_a_function_of_the_scores(tmp_path: Path) -> None:
    """Logits are the scores, probabilities their soft-max (channels last), labels their arg-max."""
    x = save(tmp_path / "in/a.nii", noise((9, 8, 10)).astype(np.float32) / 10 + 45)
    names = ["labels", "probabilities", "logits"]
    rows = predict(tmp_path / "out", tmp_path / "in", Over50(), stitch=Stitch("crop", names))
    assert rows[0]["outputs"] == ";".join(f"a_{name}.nii.gz" for name in names)
    logits = np.stack([50 - x, x - 50], -1)
    np.testing.assert_array_equal(read(tmp_path / "out/a_labels.nii.gz"), x > 50)
    np.testing.assert_allclose(read(tmp_path / "out/a_logits.nii.gz"), logits, atol=1e-5)
    expected = torch.from_numpy(logits).softmax(-1).numpy()
    np.testing.assert_allclose(read(tmp_path / "out/a_probabilities.nii.gz"), expected, atol=1e-6)
    assert read(tmp_path / "out/a_probabilities.nii.gz").dtype == np.float32


def test_one_channel_is_an_image_unless_a_threshold_is_set(tmp_path: Path) -> None:
    """The default product is `image`, and labels with stitch.threshold."""
    x = save(tmp_path / "in/a.nii", noise((9, 8, 10)))
    predict(tmp_path / "image", tmp_path / "in", Plus(1), stitch=Stitch("crop"))
    assert list(files(tmp_path / "image")) == ["a_image.nii.gz"]
    np.testing.assert_array_equal(read(tmp_path / "image/a_image.nii.gz"), x.astype(np.float32) + 1)
    predict(tmp_path / "labels", tmp_path / "in", Plus(1), stitch=Stitch("crop", threshold=70))
    assert list(files(tmp_path / "labels")) == ["a_labels.nii.gz"]
    np.testing.assert_array_equal(read(tmp_path / "labels/a_labels.nii.gz"), x + 1 > 70)
    rows = predict(tmp_path / "asked", tmp_path / "in", Plus(1), stitch=Stitch(products=["labels"]))
    assert "need stitch.threshold" in errors(rows)["a"]


class Classes(nn.Module):
    """Gives labels and not scores."""

    def forward(self, x: Tensor) -> Tensor:
        return (x > 50).long()


@pytest.mark.parametrize("mode", ["gaussian", "crop"])
def test_labels_that_would_be_averaged_are_pointed_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    """A mean of labels is no label, unless each voxel is taken from one patch."""
    save(tmp_path / "in/a.nii", noise((9, 8, 10)))
    caplog.set_level(logging.INFO, "voxquilt")
    predict(tmp_path / "out", tmp_path / "in", Classes(), stitch=Stitch(mode))
    assert ("holds integers (int64), which are averaged" in caplog.text) == (mode == "gaussian")


def test_an_output_that_a_product_cannot_be_made_of_is_named(tmp_path: Path) -> None:
    """Among several outputs."""
    save(tmp_path / "in/a.nii", noise((8, 8, 12)))
    rows = predict(tmp_path / "out", tmp_path / "in", Several(), stitch=Stitch(products=["labels"]))
    assert "output 'half': labels of a network with one output channel" in errors(rows)["a"]


def test_sigmoid_gives_one_label_map_per_channel(tmp_path: Path) -> None:
    """In a 4-D file, channels last, each thresholded separately."""
    x = save(tmp_path / "in/a.nii", noise((9, 8, 10)).astype(np.float32) / 10 + 45)
    for threshold, limit in ((None, 0.5), (0.9, 0.9)):
        stitch = Stitch("crop", activation="sigmoid", threshold=threshold)
        predict(tmp_path / "out", tmp_path / "in", Over50(), stitch=stitch)
        labels = read(tmp_path / "out/a_labels.nii.gz")
        assert labels.shape == (9, 8, 10, 2)
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(
            labels, torch.from_numpy(np.stack([50 - x, x - 50], -1)).sigmoid().numpy() > limit
        )


def test_labels_have_one_type_for_all_subjects(tmp_path: Path) -> None:
    """300 classes need uint16, even for a subject with class 0 alone."""
    save(tmp_path / "in/high.nii", np.full((4, 4, 4), 299, np.float32))
    save(tmp_path / "in/zero.nii", np.zeros((4, 4, 4), np.float32))

    class Many(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -(x - torch.arange(300.0).reshape(1, 300, 1, 1, 1)).abs()

    predict(tmp_path / "out", tmp_path / "in", Many(), patch=4, overlap=0)
    for name, value in (("high", 299), ("zero", 0)):
        labels = read(tmp_path / f"out/{name}_labels.nii.gz")
        assert labels.dtype == np.uint16
        assert (labels == value).all()


def test_class_names_are_written_into_label_files_only(tmp_path: Path) -> None:
    """As JSON in a header extension."""
    save(tmp_path / "in/a.nii", noise((4, 4, 4)))
    stitch = Stitch(products=["labels", "logits"], class_names=["Hintergrund", "Gehirn ß"])
    predict(tmp_path / "out", tmp_path / "in", Over50(), stitch=stitch)
    (extension,) = nib.load(tmp_path / "out/a_labels.nii.gz").header.extensions
    text = extension.get_content()
    text = text.decode() if isinstance(text, bytes) else text
    assert json.loads(text) == {"labels": {"0": "Hintergrund", "1": "Gehirn ß"}}
    assert not nib.load(tmp_path / "out/a_logits.nii.gz").header.extensions


def test_labels_are_postprocessed_in_native_space(tmp_path: Path) -> None:
    """Callables get (1, I, J, K) on the file's axes; one that changes the shape fails the subject."""
    save(tmp_path / "in/a.nii", noise((4, 5, 6)), AFFINES[1])
    seen: list[tuple[int, ...]] = []

    def first_plane(labels: Tensor) -> Tensor:
        seen.append(tuple(labels.shape))
        labels = torch.ones_like(labels)
        labels[:, 0] = 0
        return labels

    predict(tmp_path / "out", tmp_path / "in", Over50(), stitch=Stitch(postprocess=[first_plane]))
    labels = read(tmp_path / "out/a_labels.nii.gz")
    assert seen == [(1, 4, 5, 6)]
    assert (labels[0] == 0).all()
    assert (labels[1:] == 1).all()
    rows = predict(tmp_path / "bad", tmp_path / "in", Over50(), stitch=Stitch(postprocess=[lambda x: x[:, 1:]]))
    assert "turned (1, 4, 5, 6) into (1, 3, 5, 6)" in errors(rows)["a"]
    assert not files(tmp_path / "bad")


def test_the_manifest_has_patches_seconds_files_and_volumes(tmp_path: Path) -> None:
    """The labels' volume is in ml by the file's own spacing."""
    x = save(tmp_path / "in/a.nii", noise((12, 8, 8)), np.diag([1, 2, 3, 1.0]))
    (row,) = predict(tmp_path / "out", tmp_path / "in", Over50())
    assert (row["subject"], row["status"], row["outputs"], row["error"]) == ("a", "done", "a_labels.nii.gz", "")
    assert int(row["patches"]) == 2
    assert 0 < float(row["seconds"]) < 10
    assert float(row["volume_ml"]) == pytest.approx((x > 50).sum() * 6 / 1000, abs=1e-3)


# Bounded memory


class Alive:
    """Counts the objects of a kind that are alive at the same time."""

    def __init__(self) -> None:
        self.now = self.most = self.all = 0
        self._lock = threading.RLock()  # the collector may run a finalizer while the lock is held

    def watch(self, thing: object) -> None:
        with self._lock:
            self.now, self.all = self.now + 1, self.all + 1
            self.most = max(self.most, self.now)
        weakref.finalize(thing, self._gone)

    def _gone(self) -> None:
        with self._lock:
            self.now -= 1


class Watched(GridDataModule):
    """A data module that counts subjects in memory."""

    alive: Alive

    def load(self, case: SubjectFiles) -> LoadedSubject:
        loaded = super().load(case)
        self.alive.watch(loaded.source.volumes[0])
        return loaded


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Twenty subjects of one patch of 8."""
    for n in range(20):
        save(tmp_path / f"many/s{n:02}.nii", np.full((3, 4, 5), n, np.float32))
    return tmp_path / "many"


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_at_most_one_subject_more_than_there_are_threads_is_in_memory(
    workers: int, batch_size: int, tmp_path: Path
) -> None:
    """Volumes loaded ahead, and the one being cut; 12 subjects of 8 patches, with a slow network."""
    for n in range(12):
        save(tmp_path / f"in/s{n:02}.nii", np.full((12, 12, 12), n, np.float32))

    class Slow(Plus):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.002)  # loading is faster, so that every place ahead is taken
            return super().forward(x)

    data = Watched(tmp_path / "in", 8, 4, num_workers=workers, batch_size=batch_size)
    data.alive = Alive()
    trainer(VolumeWriter(tmp_path / "out")).predict(PatchPredictor(Slow()), datamodule=data, return_predictions=False)
    assert data.alive.all == 12
    assert data.alive.most <= workers + 1
    assert data.alive.now == 0


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_a_batch_may_span_many_tiny_subjects(batch_size: int, many: Path, tmp_path: Path) -> None:
    """Eight subjects end in one batch, four times as many as the writer's queue holds, without deadlock."""
    rows = predict(tmp_path / "out", many, Plus(0), batch_size=batch_size, num_workers=2)
    assert statuses(rows) == {f"s{n:02}": "done" for n in range(20)}
    for n in range(20):
        assert (read(tmp_path / f"out/s{n:02}_image.nii.gz") == n).all()


def test_a_slow_disk_makes_the_network_wait(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most two finished subjects are queued, besides the one being handed over and the one begun."""
    alive = Alive()
    volumes, start = SubjectStitcher.volumes, SubjectStitcher.__init__

    def watched_start(quilt: SubjectStitcher, *args: Any, **options: Any) -> None:
        start(quilt, *args, **options)
        alive.watch(quilt)

    def slow_volumes(quilt: SubjectStitcher) -> dict[str, np.ndarray]:
        time.sleep(0.02)
        return volumes(quilt)

    monkeypatch.setattr(SubjectStitcher, "__init__", watched_start)
    monkeypatch.setattr(SubjectStitcher, "volumes", slow_volumes)
    rows = predict(tmp_path / "out", many, Plus(0), batch_size=3)
    assert set(statuses(rows).values()) == {"done"}
    assert alive.all == 20
    assert alive.most <= 4
    assert alive.now == 0


class Slow(nn.Module):
    """Over50 that takes 0.5 s per batch."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.0 if is_planned(x) else 0.5)
        return torch.cat([50 - x, x - 50], 1)


def test_seconds_of_a_subject_exclude_waiting_for_others(tmp_path: Path) -> None:
    """Four are read at once and predicted in turn; their seconds add up to about those of the run.

    With the waiting they would add up to 3 s more. Four subjects, since reading and writing beside the loop count too,
    and take long on a machine that does other work.
    """
    for n in range(4):
        save(tmp_path / f"in/{n}.nii", noise((8, 8, 8)))
    began = time.perf_counter()
    rows = predict(tmp_path / "out", tmp_path / "in", Slow(), overlap=0, num_workers=4)
    run = time.perf_counter() - began
    seconds = [float(row["seconds"]) for row in rows]
    assert len(seconds) == 4
    assert min(seconds) >= 0.5
    assert sum(seconds) <= run + 0.5  # reading and writing beside the loop
    shared = predict(tmp_path / "shared", tmp_path / "in", Slow(), overlap=0, batch_size=2)
    assert sum(float(row["seconds"]) for row in shared) >= 1  # two batches, of two subjects each
    assert all(float(row["seconds"]) >= 0.25 for row in shared)


def test_predictions_are_not_kept_in_memory(tmp_path: Path) -> None:
    """Only a few outputs of the network are alive at any time."""
    save(tmp_path / "in/a.nii", noise((40, 12, 12)))
    alive = Alive()

    class Counting(Plus):
        def forward(self, x: Tensor) -> Tensor:
            output = super().forward(x)
            alive.watch(output)
            return output

    (row,) = predict(tmp_path / "out", tmp_path / "in", Counting())
    assert row["patches"] == "36"
    assert alive.all == 36 + 1  # once it is asked for its outputs without voxels
    assert alive.most <= 2


# Subjects that fail


@pytest.fixture
def touchy(tmp_path: Path) -> Path:
    """Seven subjects of one to eight patches; `raises`, `nan` and `shape` hold the voxel at which Touchy fails."""
    for n, name in enumerate(["a", "nan", "b", "raises", "c", "shape", "z"]):
        x = noise((8 + 4 * (n % 2), 8, 12), n) % 60
        x[-1, -1, -1] = {"nan": 88, "raises": 77, "shape": 66}.get(name, 0)
        save(tmp_path / f"touchy/{name}.nii", x)
    return tmp_path / "touchy"


def test_a_subject_on_which_the_network_fails_fails_alone(touchy: Path, tmp_path: Path) -> None:
    """An error, NaN, and a wrong shape: three rows that say so and no files; the other subjects are right."""
    rows = predict(tmp_path / "out", touchy, Touchy(), num_workers=2)
    assert errors(rows).keys() == {"nan", "raises", "shape"}
    assert "ValueError: there is a 77" in errors(rows)["raises"]
    assert "NaN or infinite" in errors(rows)["nan"]
    assert "does not match the shape" in errors(rows)["shape"] or "has shape" in errors(rows)["shape"]
    assert sorted(files(tmp_path / "out")) == [f"{name}_labels.nii.gz" for name in "abcz"]
    for name in "abcz":
        np.testing.assert_array_equal(read(tmp_path / f"out/{name}_labels.nii.gz"), read(touchy / f"{name}.nii") > 50)
    assert not list((tmp_path / "out").glob(".*"))


class InPlace(Touchy):
    """Touchy, but the patches are 10 more before it fails."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.add_(10)) if is_planned(x) else super().forward(x.add_(10).sub(10))


def test_a_batch_is_predicted_again_as_it_was(tmp_path: Path) -> None:
    """By a network that has changed it before one of its subjects failed: the other's labels are right."""
    for name, last in (("a", 0), ("b", 77)):
        x = noise((8, 8, 8)) % 60
        x[-1, -1, -1] = last
        save(tmp_path / f"in/{name}.nii", x)
    rows = predict(tmp_path / "out", tmp_path / "in", InPlace(), batch_size=2)
    assert errors(rows).keys() == {"b"}
    np.testing.assert_array_equal(read(tmp_path / "out/a_labels.nii.gz"), read(tmp_path / "in/a.nii") > 50)


@pytest.mark.parametrize("batch_size", [3, 5])
def test_an_exception_fails_all_subjects_of_its_batch(batch_size: int, touchy: Path, tmp_path: Path) -> None:
    """It does not tell which patch caused it; NaN can be attributed to one subject."""
    rows = predict(tmp_path / "out", touchy, Touchy(), batch_size=batch_size)
    failed = errors(rows)
    assert {"nan", "raises", "shape"} <= failed.keys()
    assert "NaN" in failed["nan"]
    assert all("77" in reason or "shape" in reason for name, reason in failed.items() if name != "nan")
    assert failed.keys() < {"nan", "raises", "shape", "a", "b", "c", "z"}, "only neighbours may be lost"
    assert {row["subject"] for row in rows} == {"a", "b", "c", "nan", "raises", "shape", "z"}
    for name in {"a", "b", "c", "z"} - failed.keys():
        np.testing.assert_array_equal(read(tmp_path / f"out/{name}_labels.nii.gz"), read(touchy / f"{name}.nii") > 50)


def test_remaining_patches_of_a_failed_subject_are_not_predicted(tmp_path: Path) -> None:
    """Of 36, only those cut before the first came back wrong."""
    save(tmp_path / "in/a.nii", noise((40, 12, 12)))
    calls: list[int] = []

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not is_planned(x):
                calls.append(len(x))
            raise ValueError("always")

    rows = predict(tmp_path / "out", tmp_path / "in", Failing())
    assert errors(rows) == {"a": "ValueError: always"}
    assert len(calls) <= 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [KeyError("odd"), StopIteration("odd"), MemoryError("odd")])
def test_an_error_in_a_transform_fails_only_its_subject(workers: int, error: Exception, tmp_path: Path) -> None:
    """Any exception, in the main or a loading thread, with its type and text."""
    for name in ("a", "b", "c"):
        save(tmp_path / f"in/{name}.nii", np.full((8, 8, 8), ord(name), np.float32))

    def transform(x: Tensor) -> Tensor:
        if (x == ord("b")).all():
            raise error
        return x

    preprocess = Preprocess(intensity=[transform])
    rows = predict(tmp_path / "out", tmp_path / "in", Plus(0), preprocess=preprocess, num_workers=workers)
    assert statuses(rows) == {"a": "done", "b": "failed", "c": "done"}
    assert type(error).__name__ in errors(rows)["b"]
    assert "odd" in errors(rows)["b"]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_file_that_cannot_be_read_fails_only_its_subject(workers: int, tmp_path: Path) -> None:
    """Truncated, not NIfTI, empty, NaN: also first, last and side by side; a missing image is named."""
    good = noise((20, 20, 20))
    for name in ("b", "f"):
        save(tmp_path / f"in/{name}.nii.gz", good)
    whole = (tmp_path / "in/b.nii.gz").read_bytes()
    (tmp_path / "in/a.nii.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in/c.nii.gz").write_bytes(b"")
    (tmp_path / "in/d.nii").write_bytes(b"not an image")
    save(tmp_path / "in/e.nii", np.full((9, 9, 9), np.nan, np.float32))
    damaged = bytearray(gzip.compress(nib.Nifti1Image(noise((20, 20, 20)), np.eye(4)).to_bytes()))
    damaged[len(damaged) // 2] ^= 0xFF
    (tmp_path / "in/g.nii.gz").write_bytes(damaged)
    (tmp_path / "in/t.csv").write_text("image\n" + "".join(f"{n}\n" for n in (
        "a.nii.gz", "b.nii.gz", "c.nii.gz", "d.nii", "e.nii", "f.nii.gz", "g.nii.gz", "gone.nii")))  # fmt: skip
    rows = predict(tmp_path / "out", tmp_path / "in/t.csv", Over50(), num_workers=workers, batch_size=3)
    assert len(rows) == 8
    failed = errors(rows)
    assert failed.keys() == {"a", "c", "d", "e", "g", "gone"}
    assert all(f"{name}.nii" in reason for name, reason in failed.items())
    assert "truncated" in failed["a"]
    assert "the file is empty" in failed["c"]
    assert "set data.nonfinite=zero" in failed["e"]
    assert "there is no such file" in failed["gone"]
    for name in "bf":
        np.testing.assert_array_equal(read(tmp_path / f"out/{name}_labels.nii.gz"), good > 50)


def test_a_run_in_which_every_subject_fails_ends_with_their_rows(tmp_path: Path) -> None:
    """Without a single batch."""
    for n in range(5):
        (tmp_path / f"{n}.nii").write_bytes(b"")
    rows = predict(tmp_path / "out", tmp_path, Over50(), num_workers=2)
    assert statuses(rows) == {str(n): "failed" for n in range(5)}


def test_on_error_raise_stops_at_the_first_failure(touchy: Path, tmp_path: Path) -> None:
    """The message names subject and reason; finished subjects stay, in files and manifest."""
    with pytest.raises(RunError, match=r"raises: ValueError: there is a 77 \(run\.on_error=raise stops here"):
        predict(
            tmp_path, [touchy / f"{n}.nii" for n in ("a", "raises", "z")], Touchy(), on_error="raise", num_workers=0
        )
    assert statuses(manifest(tmp_path)) == {"a": "done", "raises": "failed"}
    with pytest.raises(ConfigError, match="on_error must be one of skip, raise"):
        VolumeWriter(tmp_path, on_error="ignore")


@pytest.mark.parametrize("bad", ["first", "last"])
def test_on_error_raise_also_stops_at_unreadable_files_and_write_errors(bad: str, tmp_path: Path) -> None:
    """Also if the last subject is the one that fails."""
    save(tmp_path / "in/m.nii", noise((4, 4, 4)))
    (tmp_path / f"in/{'a' if bad == 'first' else 'z'}.nii").write_bytes(b"")
    with pytest.raises(RunError, match="the file is empty"):
        predict(tmp_path / "out", tmp_path / "in", Over50(), on_error="raise")
    with pytest.raises(RunError, match=r"stitch\.threshold"):
        predict(tmp_path / "out", tmp_path / "in/m.nii", Over50(), stitch=Stitch(threshold=1), on_error="raise")


def test_a_run_that_ends_early_reports_unfinished_subjects_as_failed(tmp_path: Path) -> None:
    """With limit_predict_batches: the open subject and those not reached, which have no file."""
    for name in ("a", "b", "c"):
        save(tmp_path / f"in/{name}.nii", noise((12, 8, 8)))  # two patches
    for limit, done in ((1, set()), (2, {"a"}), (3, {"a"}), (4, {"a", "b"})):
        rows = predict(tmp_path / str(limit), tmp_path / "in", Over50(), options={"limit_predict_batches": limit})
        assert statuses(rows) == {n: "done" if n in done else "failed" for n in "abc"}
        assert files(tmp_path / str(limit)).keys() == {f"{n}_labels.nii.gz" for n in done}
        assert all("the run ended before" in reason for reason in errors(rows).values())


def test_outputs_never_overwrite_inputs(tmp_path: Path) -> None:
    """A subject whose output would have an input's name fails, and the input keeps its bytes; also by a link."""
    x = save(tmp_path / "a.nii.gz", noise((4, 4, 4)))
    save(tmp_path / "out/a_labels.nii.gz", x + 1)
    before = (tmp_path / "out/a_labels.nii.gz").read_bytes()
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "out/a_labels.nii.gz")
    for second in (tmp_path / "out/a_labels.nii.gz", tmp_path / "link.nii.gz"):
        rows = predict(tmp_path / "out", [tmp_path / "a.nii.gz", second], Over50())
        assert "out/a_labels.nii.gz is an input of this run" in errors(rows)["a"]
        assert (tmp_path / "out/a_labels.nii.gz").read_bytes() == before


def test_two_subjects_never_share_a_file(tmp_path: Path) -> None:
    """Output b_seg of subject a and output seg of subject a_b have one name: the second subject fails."""
    save(tmp_path / "in/a.nii", noise((4, 4, 4), 1))
    save(tmp_path / "in/a_b.nii", noise((4, 4, 4), 2))

    class Both(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"b_seg": x, "seg": x + 1}

    rows = predict(tmp_path / "out", tmp_path / "in", Both())
    assert statuses(rows) == {"a": "done", "a_b": "failed"}
    assert "a_b_seg_image.nii.gz is another subject's file" in errors(rows)["a_b"]
    np.testing.assert_allclose(read(tmp_path / "out/a_b_seg_image.nii.gz"), noise((4, 4, 4), 1), rtol=1e-5)


def test_an_output_folder_that_vanishes_fails_subjects_not_the_process(tmp_path: Path) -> None:
    """The row has the writer's error with the file's name."""
    save(tmp_path / "in/a.nii", noise((4, 4, 4)))
    (tmp_path / "out/a_labels.nii.gz").mkdir(parents=True)  # a folder where the file should go
    rows = predict(tmp_path / "out", tmp_path / "in", Over50())
    assert "a_labels.nii.gz: writing failed" in errors(rows)["a"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.endswith(".tmp")]


# User-defined modules


class Own(pl.LightningModule):
    """A user's module with a predict_step of its own."""

    def __init__(self, step: Any) -> None:
        super().__init__()
        self.step = step

    def predict_step(self, batch: PatchBatch, batch_idx: int) -> Any:
        return self.step(batch.data)


def test_a_user_defined_predict_step_works_with_the_writer(cohort: Path, tmp_path: Path) -> None:
    """It returns a tensor or tensors by name, and gets the batch with its data."""
    predict(tmp_path / "tensor", cohort, Own(lambda x: torch.cat([50 - x, x - 50], 1)), batch_size=4)
    predict(tmp_path / "named", cohort, Own(lambda x: {"seg": torch.cat([50 - x, x - 50], 1)}), batch_size=4)
    for name in SHAPES:
        x = read(cohort / f"{name}.nii.gz")
        np.testing.assert_array_equal(read(tmp_path / f"tensor/{name}_labels.nii.gz"), x > 50)
        np.testing.assert_array_equal(read(tmp_path / f"named/{name}_seg_labels.nii.gz"), x > 50)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda x: None, "predict_step gave NoneType"),
        (lambda x: (x, x), "predict_step gave tuple"),
        (lambda x: {"seg": 3}, "predict_step gave int"),
        (lambda x: x[:1], "for a batch of 3 patches"),
        (lambda x: torch.cat([x, x]), "has shape (6, 1, 8, 8, 8) for a batch of 3 patches"),
        (lambda x: x[0, 0, 0, 0, 0], "has shape () for a batch"),
        (lambda x: x.argmax(1), "has shape (3, 8, 8, 8)"),
        (lambda x: x[..., :3], "has shape (3, 1, 8, 8, 3) for patches of (8, 8, 8)"),
    ],
)
def test_an_invalid_result_of_a_predict_step_is_an_error(step: Any, message: str, tmp_path: Path) -> None:
    """A slice of a wrong batch is never taken for a patch."""
    save(tmp_path / "a.nii", noise((16, 8, 8)))
    rows = predict(tmp_path / "out", tmp_path, Own(step), batch_size=3)
    assert message in errors(rows)["a"]


def test_stop_iteration_is_not_a_silent_end_of_the_run(tmp_path: Path) -> None:
    """In a network it is an ordinary error; in a user's predict_step it ends Lightning's loop and is reported."""
    for name in ("a", "b", "c"):
        save(tmp_path / f"in/{name}.nii", np.full((8, 8, 8), ord(name), np.float32))

    def stops(x: Tensor) -> Tensor:
        if (x == ord("b")).any():
            raise StopIteration
        return x

    class Stopping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return stops(x)

    rows = predict(tmp_path / "network", tmp_path / "in", Stopping())
    assert statuses(rows) == {"a": "done", "b": "failed", "c": "done"}
    assert "StopIteration" in errors(rows)["b"]
    rows = predict(tmp_path / "own", tmp_path / "in", Own(stops))
    assert statuses(rows) == {"a": "done", "b": "failed", "c": "failed"}


def test_an_error_in_a_user_defined_predict_step_ends_the_run(tmp_path: Path) -> None:
    """It is raised, finished subjects stay, and no thread is left."""
    for name in ("a", "b", "c"):
        save(tmp_path / f"in/{name}.nii", np.full((8, 8, 8), ord(name), np.float32))

    def fails(x: Tensor) -> Tensor:
        if (x == ord("b")).any():
            raise RuntimeError("no memory")
        return x

    with pytest.raises(RuntimeError, match="no memory"):
        predict(tmp_path / "out", tmp_path / "in", Own(fails))
    assert statuses(manifest(tmp_path / "out")) == {"a": "done"}
    assert not [thread for thread in threading.enumerate() if "voxquilt-writer" in thread.name]


def test_the_writer_needs_the_data_module(tmp_path: Path) -> None:
    """Without a GridDataModule there is nothing to stitch, and the message says so."""
    with pytest.raises(ConfigError, match="VolumeWriter needs a GridDataModule at predict; the trainer has NoneType"):
        trainer(VolumeWriter(tmp_path)).predict(Own(lambda x: x), dataloaders=DataLoader([torch.zeros(1)]))


def test_a_module_without_predict_step_is_an_error_that_says_what_to_do(cohort: Path, tmp_path: Path) -> None:
    """Lightning's default would pass the batch to its forward in the middle of the run. Wrapped, it predicts."""

    class Forward(pl.LightningModule):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([50 - x, x - 50], 1)

    with pytest.raises(ConfigError, match=r"Forward has no predict_step.* use PatchPredictor\(Forward\(\.\.\.\)\)"):
        predict(tmp_path / "bare", cohort, Forward())
    assert not (tmp_path / "bare").exists()
    rows = predict(tmp_path / "wrapped", cohort, PatchPredictor(Forward()))
    assert set(statuses(rows).values()) == {"done"}


def test_a_writer_and_a_data_module_may_be_used_again(cohort: Path, tmp_path: Path) -> None:
    """A second run starts a new manifest and writes the same files."""
    writer, data = VolumeWriter(tmp_path), GridDataModule(cohort, 8, 4)
    module = PatchPredictor(Over50())
    for _ in range(2):
        trainer(writer).predict(module, datamodule=data, return_predictions=False)
        assert [row.status for row in writer.rows] == ["done"] * len(SHAPES)
        assert len(manifest(tmp_path)) == len(SHAPES)


@pytest.mark.parametrize(("times", "wanted"), [(1, ["done", "done"]), (2, ["failed", "done"])])
def test_sums_that_overflow_the_device_start_again_on_the_host(
    times: int, wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first time nothing is lost; a second time fails the subject."""
    volumes = {name: save(tmp_path / f"in/{name}.nii", noise((9, 9, 9))) for name in ("a", "b")}
    left, make = [times], Accumulator.__init__

    def full(*arguments: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        make(*arguments, **options)

    monkeypatch.setattr(Accumulator, "__init__", full)
    rows = predict(tmp_path / "out", tmp_path / "in", Over50())
    assert list(statuses(rows).values()) == wanted
    for name, status in statuses(rows).items():
        if status == "done":
            np.testing.assert_array_equal(read(tmp_path / f"out/{name}_labels.nii.gz"), volumes[name] > 50)
        else:
            assert "out of memory" in errors(rows)[name]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = {*threading.enumerate()}  # other files' tests, too, may have run in this process
    yield
    assert not [thread for thread in {*threading.enumerate()} - before if thread.name.startswith("voxquilt")]
