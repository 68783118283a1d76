"""Tests statistics.csv of real runs: its numbers are those of the files, however many processes, shards and runs."""

import csv
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from class_networks import Bands, Masks, Two
from forks import Server, checked
from lightning.pytorch import Callback, Trainer
from monai.transforms import MapLabelValue
from scipy import ndimage
from synthetic import Over50, noise, read, save
from torch import nn

from voxquilt.models.predictor import PatchPredictor
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.output_files import OutputFiles
from voxquilt.prediction.writer_callback import VolumeWriter
from voxquilt.reporting import statistics_table
from voxquilt.reporting.manifest import read_rows
from voxquilt.stitching.stitch import Stitch

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]
AFFINE = np.array([[0, 0, -1.3, 4], [-0.8, 0, 0, 9], [0, 2, 0, -7], [0, 0, 0, 1.0]])
NAMES = ("a", "b c", "d")
SHAPES = ((12, 9, 8), (10, 16, 9), (9, 8, 17))


JOB = (
    "data.inputs=in", "data.patch_size=8", "data.patch_overlap=4", "ckpt_path=null", "model=state_dict",
    "output_dir=out", "trainer=cpu", "callbacks.writer.tensorboard=false",
)  # fmt: skip
NET = "model.net._target_=class_networks.{}"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for n, (name, shape) in enumerate(zip(NAMES, SHAPES, strict=True)):
        save(tmp_path / f"in/{name}.nii.gz", noise(shape, n), AFFINE)
    return tmp_path


def table(folder: Path, name: str = "statistics.csv") -> dict[tuple[str, str, str], dict[str, str]]:
    with open(folder / name, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {(row["subject"], row["output"], row["label"]): row for row in rows}
    assert len(found) == len(rows), "a label has two rows"
    return found


def run(forks: Server, place: Path, *options: str, net: str = "Bands", ranks: int = 1, status: int = 0) -> str:
    job = forks.start(*JOB, NET.format(net), *options, cwd=place, ranks=ranks)
    assert checked(job.wait(60)) == status, job.text
    assert "Traceback" not in job.text
    return job.text


def check(row: Mapping[str, str], mask: np.ndarray, image: np.ndarray, prefix: str = "") -> None:
    """A row's numbers are those of the files, by SciPy and NumPy."""
    if not mask.any():
        filled = {name for name, cell in row.items() if cell} - {"subject", "output", "label", "name", "frame"}
        assert filled == {"voxels", "ml"}
        assert float(row["voxels"]) == float(row["ml"]) == 0
        return
    assert int(row["voxels"]) == mask.sum()
    assert float(row["ml"]) == pytest.approx(mask.sum() * 1.3 * 0.8 * 2 / 1000, abs=1e-6)
    world = AFFINE[:3, :3] @ ndimage.center_of_mass(mask) + AFFINE[:3, 3]
    assert [float(row[f"centroid_{axis}_mm"]) for axis in "ras"] == pytest.approx(world.tolist(), abs=1e-4)
    (box,) = ndimage.find_objects(mask.astype(int))
    ends = [[int(row[f"box_{axis}{end}"]) for end in (0, 1)] for axis in "ijk"]
    assert ends == [[along.start, along.stop] for along in box]
    values = image[mask]
    wanted = {"mean": values.mean(), "sd": values.std(), **{f"p{n}": np.percentile(values, n) for n in (5, 50, 95)}}
    assert {name: float(row[f"{prefix}{name}"]) for name in wanted} == pytest.approx(wanted, rel=1e-6)
    assert int(row["components"]) == ndimage.label(mask, np.ones((3, 3, 3)))[1]
    border = any(0 in along or n - 1 in along for along, n in zip(np.nonzero(mask), mask.shape, strict=True))
    assert row["touches_border"] == str(int(border))


def test_numbers_are_those_of_the_files(place: Path, forks: Server) -> None:
    """Of every class, also one that no voxel has; the background has no row; volumes add up to the manifest's."""
    run(forks, place, "stitch.class_names=[ground,grey,white,nothing]")
    found = table(place / "out")
    wanted = [(subject, "labels", label) for subject in NAMES for label in "123"]
    assert list(found) == wanted, "in the order of subjects"
    for (subject, _, label), row in found.items():
        labels, image = (read(place / name) for name in (f"out/{subject}_labels.nii.gz", f"in/{subject}.nii.gz"))
        check(row, labels == int(label), image)
        assert row["name"] == ["grey", "white", "nothing"][int(label) - 1]
    for subject, row in read_rows([place / "out/manifest.csv"]).items():
        total = sum(float(found[subject, "labels", label]["ml"]) for label in "123")
        assert row.volume_ml == pytest.approx(total, abs=6e-4)


def test_a_device_computes_the_same_table(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device of the network, here the host, on which torch takes NumPy's place."""
    monkeypatch.delattr(statistics_table, "_note")  # so that the host does not take over
    texts = []
    for device in (None, torch.device("cpu")):
        asked = []
        monkeypatch.setattr(statistics_table, "is_worthwhile", lambda *call, d=device, a=asked: a.append(call) or d)
        writer = VolumeWriter(place / f"{device}", log="plain")
        trainer = Trainer(accelerator="cpu", devices=1, logger=False, callbacks=[writer], enable_progress_bar=False)
        trainer.predict(PatchPredictor(Bands()), GridDataModule(place / "in", 8, 4), return_predictions=False)
        assert {where for where, _ in asked} == {torch.device("cpu")}
        assert sorted(voxels for _, voxels in asked) == sorted(np.prod(shape) for shape in SHAPES)
        texts.append((place / f"{device}/statistics.csv").read_text("utf-8"))
    assert texts[0] == texts[1]


RELABEL = MapLabelValue(orig_labels=[1], target_labels=[9])


@pytest.mark.parametrize(
    ("net", "stitch", "labels"),
    [
        (Bands(), Stitch(label_values=[0, 7, 1002, 3]), {"labels": (3, 7, 1002)}),
        (Bands(), Stitch(class_names=["a", "b", "c", "d"], classes=["c", "d"]), {"labels": (2, 3)}),
        (Masks(), Stitch(activation="sigmoid", class_names=["bright", "none"]), {"labels": (0, 1)}),
        (Masks(), Stitch(activation="sigmoid", regions=[5, 2]), {"labels": (2, 5)}),
        (Two(), Stitch(compare=["crop"]), {
            "bands_labels": (1, 2, 3), "bands_labels_crop": (1, 2, 3),
            "bright_labels": (1,), "bright_labels_crop": (1,),
        }),
        (Bands(), Stitch(postprocess=[RELABEL]), {"labels": (1, 2, 3, 9)}),
        (Bands(), Stitch(products=["probabilities"]), {}),
    ],
)  # fmt: skip
def test_every_way_to_labels_has_its_rows(
    place: Path, net: nn.Module, stitch: Stitch, labels: Mapping[str, tuple[int, ...]]
) -> None:
    """Sparse numbers, chosen classes, masks, regions, several outputs, other numbers after post-processing."""
    writer = VolumeWriter(place / "out", stitch, log="plain")
    data = GridDataModule(place / "in", patch_size=8, patch_overlap=4)
    trainer = Trainer(
        accelerator="cpu", callbacks=[writer], logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.predict(PatchPredictor(net), data, return_predictions=False)
    if not labels:
        assert not (place / "out/statistics.csv").exists()
        return
    found = table(place / "out")
    assert [*found] == [(name, output, str(n)) for name in NAMES for output, numbers in labels.items() for n in numbers]
    seen = set()
    for (subject, output, label), row in found.items():
        array, image = (read(place / name) for name in (f"out/{subject}_{output}.nii.gz", f"in/{subject}.nii.gz"))
        mask = array[..., int(label)] > 0 if array.ndim == 4 else array == int(label)
        check(row, mask, image)
        seen.add(row["voxels"] != "0")
    assert seen == {False, True}


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        (("trainer.strategy=ddp", "run.distribute=slab"), 2),
        (("trainer.strategy=ddp",), 2),
        (("callbacks.writer.in_memory=0",), 1),
    ],
)  # fmt: skip
def test_processes_and_slabs_write_the_file_that_one_process_writes(
    place: Path, forks: Server, options: tuple[str, ...], ranks: int
) -> None:
    """As do volumes and images that are not kept in memory."""
    run(forks, place)
    wanted = (place / "out/statistics.csv").read_bytes()
    run(forks, place, *options, "output_dir=other", ranks=ranks)
    assert (place / "other/statistics.csv").read_bytes() == wanted


def test_shards_write_the_file_that_one_process_writes(place: Path, forks: Server) -> None:
    """Whichever ends last, and also once a subject was made again by a run without shards."""
    run(forks, place)
    wanted = (place / "out/statistics.csv").read_bytes()
    jobs = [
        forks.start(*JOB, NET.format("Bands"), "output_dir=other", "shard.count=2", f"shard.index={n}", cwd=place)
        for n in (0, 1)
    ]
    assert [job.wait(60) for job in jobs] == [[0], [0]]
    assert (place / "other/statistics.csv").read_bytes() == wanted
    (place / "other/d_labels.nii.gz").unlink()
    save(place / "in/d.nii.gz", noise(SHAPES[2], 9), AFFINE)
    run(forks, place, "output_dir=other")
    assert not list((place / "other").glob("statistics_*"))
    changed = table(place / "other")
    assert {key for key, row in table(place / "out").items() if changed[key] != row} <= {
        ("d", "labels", n) for n in "123"
    }
    labels = read(place / "other/d_labels.nii.gz")
    check(changed["d", "labels", "1"], labels == 1, read(place / "in/d.nii.gz"))


def test_several_images_and_channels_have_columns_of_their_own(place: Path, forks: Server) -> None:
    """Named by image and number of the channel; a failed subject has no row, and its neighbours theirs."""
    for n, name in enumerate(NAMES):
        save(place / f"two/{name}.nii.gz", np.stack([noise(SHAPES[n], n + 5), noise(SHAPES[n], n + 7)], -1), AFFINE)
    (place / "two/a.nii.gz").write_bytes(b"nothing")
    images = "data.images={t1: 'in/{subject}.nii.gz', t2: 'two/{subject}.nii.gz'}"
    run(forks, place, images, "data.inputs=null", net="FirstOfThree", status=1)
    found = table(place / "out")
    assert {subject for subject, *_ in found} == {"b c", "d"}
    for (subject, _, label), row in found.items():
        mask = read(place / f"out/{subject}_labels.nii.gz") == int(label)
        check(row, mask, read(place / f"in/{subject}.nii.gz"), "t1_")
        for channel in (0, 1):
            check(row, mask, read(place / f"two/{subject}.nii.gz")[..., channel], f"t2_{channel}_")


def test_rows_follow_the_manifest_over_several_runs(place: Path, forks: Server) -> None:
    """Kept for subjects that are done, replaced for those made again, made from files where a run wrote none."""
    names = "stitch.class_names=[ground,grey,white,nothing]"
    run(forks, place, names, "callbacks.writer.statistics=false")
    assert not (place / "out/statistics.csv").exists()
    text = run(forks, place, names)
    assert "statistics.csv: 3 subjects of earlier runs are read again for it" in text
    filled = (place / "out/statistics.csv").read_bytes()
    run(forks, place, names, "output_dir=fresh")
    assert (place / "fresh/statistics.csv").read_bytes() == filled
    stamp = (place / "out/b c_labels.nii.gz").stat().st_mtime_ns
    assert "read again" not in run(forks, place, names)
    assert (place / "out/statistics.csv").read_bytes() == filled
    assert (place / "out/b c_labels.nii.gz").stat().st_mtime_ns == stamp
    # Another input: its rows change, those of the others stay; a file that ends in the middle of a line is no harm.
    save(place / "in/b c.nii.gz", noise(SHAPES[1], 9), AFFINE)
    with open(place / "out/statistics.csv", "a") as file:
        file.write("d,labels,3")
    run(forks, place, names, "run.overwrite=true")
    before, after = table(place / "fresh"), table(place / "out")
    assert {key for key, row in before.items() if after[key] != row} == {("b c", "labels", "1"), ("b c", "labels", "2")}
    # A subject that a run without statistics makes again has no row, rather than an old one.
    save(place / "in/b c.nii.gz", noise(SHAPES[1], 10), AFFINE)
    run(forks, place, names, "run.overwrite=true", "callbacks.writer.statistics=false")
    assert {subject for subject, *_ in table(place / "out")} == {"a", "d"}
    # Nor has one that fails.
    (place / "in/d.nii.gz").write_bytes(b"nothing")
    run(forks, place, names, "run.overwrite=true", status=1)
    assert {subject for subject, *_ in table(place / "out")} == {"a", "b c"}


def test_several_models_have_the_rows_of_what_is_written(place: Path, forks: Server) -> None:
    """An ensemble by the average of its networks; the intensities are read once."""
    for name in ("one", "two"):
        torch.save(Over50().state_dict(), place / f"{name}.pt")
    run(forks, place, "ckpt_path=[one.pt,two.pt]", "model.net._target_=synthetic.Over50")
    for (subject, _, label), row in table(place / "out").items():
        mask = nib.load(place / f"out/{subject}_labels.nii.gz").get_fdata() == int(label)
        check(row, mask, read(place / f"in/{subject}.nii.gz"))


class Vanishing(Callback):
    """Moves the inputs away once the first patches have been cut, before images are read for the second time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_predict_batch_start(self, *_: object) -> None:
        if self.folder.exists():
            self.folder.rename(self.folder.with_name("away"))


def test_a_subject_is_done_without_numbers_and_pictures_of_an_input_that_has_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of images that are too large to be kept: what was predicted is written, and a warning says what is missing."""
    volume = save(tmp_path / "in/a.nii.gz", noise((12, 9, 8)))
    writer = VolumeWriter(tmp_path / "out", in_memory=0, report=True)
    callbacks = [Vanishing(tmp_path / "in"), writer]
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=callbacks, enable_progress_bar=False)
    data = GridDataModule(tmp_path / "in", 8, 4)
    trainer.predict(PatchPredictor(Over50()), datamodule=data, return_predictions=False)
    assert [row.status for row in writer.rows] == ["done"]
    np.testing.assert_array_equal(read(tmp_path / "out/a_labels.nii.gz"), volume > 50)
    assert not (tmp_path / "out/statistics.csv").exists()
    assert (tmp_path / "out/report/thumbnails/overlay/a.jpg").is_file()  # the outlines, on black
    assert "a has no rows of statistics.csv, which the next run adds" in caplog.text
    assert "a: its thumbnail for the report has no background" in caplog.text


@pytest.mark.parametrize("in_memory", [2**30, 0])
def test_numbers_are_computed_while_files_are_written(
    in_memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the image is in memory; else before, so that it is not read twice at a time."""
    save(tmp_path / "in/a.nii.gz", noise((12, 9, 8)))
    writes, is_computed = threading.Event(), threading.Event()
    write, statistics = OutputFiles.write, OutputFiles.statistics

    def writing(*arguments: Any) -> Any:
        writes.set()
        assert in_memory or is_computed.is_set()
        return write(*arguments)

    def computing(*arguments: Any) -> Any:
        assert writes.wait(20) if in_memory else not writes.is_set()
        rows = statistics(*arguments)
        is_computed.set()
        return rows

    monkeypatch.setattr(OutputFiles, "write", writing)
    monkeypatch.setattr(OutputFiles, "statistics", computing)
    writer = VolumeWriter(tmp_path / "out", in_memory=in_memory)
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[writer], enable_progress_bar=False)
    data = GridDataModule(tmp_path / "in", 8, 4)
    trainer.predict(PatchPredictor(Over50()), datamodule=data, return_predictions=False)
    assert [row.status for row in writer.rows] == ["done"]
    assert len(table(tmp_path / "out")) == 1
