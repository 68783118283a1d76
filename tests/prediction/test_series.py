"""Tests data.time=volumes: a series gives what each of its volumes gives by itself, in one file per product."""

import csv
import json
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from forks import Server, checked
from synthetic import noise, read, save

from voxquilt.data.image import ScalarImage
from voxquilt.data.series import SeriesReads, count_volumes
from voxquilt.data.subject import Subject
from voxquilt.data.subject_files import SubjectFiles
from voxquilt.data.subject_task import SubjectTask
from voxquilt.errors import InputError

pytestmark = pytest.mark.timeout(120)
AFFINE = np.array([[0, 0, -1.3, 4], [-0.8, 0, 0, 9], [0, 2, 0, -7], [0, 0, 0, 1.0]])
SHAPES = {"a": (12, 9, 8), "b c": (10, 14, 9), "short": (9, 8, 12)}
COUNTS = {"a": 5, "b c": 3, "short": 1}
PRODUCTS = "stitch.products=[labels,probabilities,disagreement]"
JOB = (
    "data.patch_size=8", "data.patch_overlap=4", "ckpt_path=null", "model=state_dict", "trainer=cpu",
    "callbacks.writer.tensorboard=false", "model.net._target_=class_networks.Uneven", PRODUCTS,
    "preprocess.spacing=1.1",
    "preprocess.intensity=[{_target_: monai.transforms.ScaleIntensity, minv: 0, maxv: 100}]",
    "stitch.class_names=[ground,grey,white,nothing]",
)  # fmt: skip


def run(forks: Server, place: Path, *options: str, ranks: int = 1, status: int = 0) -> str:
    job = forks.start(*JOB, *options, cwd=place, ranks=ranks)
    assert checked(job.wait(60)) == status, job.text
    assert "Traceback" not in job.text
    return job.text


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, forks: Server) -> Path:
    """Series and what each of their volumes gives by itself, in `alone`."""
    folder = tmp_path_factory.mktemp("series")
    for n, (name, shape) in enumerate(SHAPES.items()):
        volumes = [noise(shape, 10 * n + t) for t in range(COUNTS[name])]
        for t, volume in enumerate(volumes):
            save(folder / f"alone_in/{name}_{t}.nii.gz", volume, AFFINE)
        data = np.stack(volumes, -1) if len(volumes) > 1 else volumes[0]
        image = nib.Nifti1Image(data, AFFINE)
        image.header.set_xyzt_units("mm", "sec")
        if data.ndim == 4:
            image.header["pixdim"][4], image.header["toffset"] = 2.5, 0.75
        (folder / "in").mkdir(exist_ok=True)
        nib.save(image, folder / f"in/{name}.nii.gz")
    run(forks, folder, "data.inputs=alone_in", "output_dir=alone")
    return folder


def check(place: Path, out: Path, *, names: tuple[str, ...] = tuple(SHAPES), rounding: float = 0) -> None:
    """Files, manifest and statistics are those of the volumes by themselves."""
    manifest = {row["subject"]: row for row in rows(out / "manifest.csv")}
    alone = {row["subject"]: row for row in rows(place / "alone/manifest.csv")}
    for name in names:
        count = COUNTS[name]
        for made in ("labels", "disagreement", "probabilities"):
            image = nib.load(out / f"{name}_{made}.nii.gz")
            wanted = [read(place / f"alone/{name}_{t}_{made}.nii.gz") for t in range(count)]
            assert len({volume.tobytes() for volume in wanted}) == count, "a test of nothing"
            found = np.asarray(image.dataobj)
            if count > 1:
                assert image.shape == (*SHAPES[name], count, *wanted[0].shape[3:])
                found = np.moveaxis(found, 3, 0)
                assert image.header["pixdim"][4] == 2.5
                assert image.header["toffset"] == 0.75
            else:
                found = found[None]
            np.testing.assert_allclose(found, np.stack(wanted), rtol=0, atol=rounding if found.dtype.kind == "f" else 0)
            assert image.header.get_xyzt_units() == ("mm", "sec")
            np.testing.assert_array_equal(image.affine, nib.load(place / f"in/{name}.nii.gz").affine)
        own = [alone[f"{name}_{t}"] for t in range(count)]
        assert int(manifest[name]["patches"]) == sum(int(row["patches"]) for row in own)
        mean = np.mean([float(row["volume_ml"]) for row in own])
        assert float(manifest[name]["volume_ml"]) == pytest.approx(mean, abs=2e-3)
    wanted_rows = {
        (subject.rpartition("_")[0], subject.rpartition("_")[2], row["label"]): row
        for row in rows(place / "alone/statistics.csv")
        for subject in [row["subject"]]
    }
    found_rows = {(row["subject"], row["frame"] or "0", row["label"]): row for row in rows(out / "statistics.csv")}
    assert {key for key in wanted_rows if key[0] in names} == found_rows.keys()
    for key, row in found_rows.items():
        assert {**row, "subject": "", "frame": ""} == {**wanted_rows[key], "subject": "", "frame": ""}


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ((), 1),
        (("data.batch_size=3", "data.num_workers=3", "callbacks.writer.in_memory=0"), 1),
        (("trainer.strategy=ddp", "run.distribute=slab"), 2),
    ],
)  # fmt: skip
def test_a_series_of_five_equals_five_runs(
    place: Path, forks: Server, tmp_path: Path, options: tuple[str, ...], ranks: int
) -> None:
    """To the bit in one process, in each product; a 3-D file beside is a volume as ever."""
    job = ("data.inputs=in", "data.time=volumes", f"output_dir={tmp_path}", "logger=csv")
    run(forks, place, *job, *options, ranks=ranks)
    check(place, tmp_path, rounding=1e-6 if ranks > 1 else 0)
    record = json.loads((tmp_path / "run.json").read_text())
    assert sum(rank["patches"] for rank in record["ranks"]) == record["patches"]
    logged = {int(row["step"]): row for row in rows(tmp_path / "csv/version_0/metrics.csv") if row["subject/seconds"]}
    for n, name in enumerate(SHAPES):  # a logger gets the mean of a number over the volumes of a series
        own = [row for row in rows(tmp_path / "statistics.csv") if row["subject"] == name]
        for label, column in product(("grey", "white"), ("voxels", "mean", "components")):
            values = [float(row[column]) for row in own if row["name"] == label and row[column]]
            assert float(logged[n][f"statistics/{column}/{label}"]) == pytest.approx(np.mean(values), rel=1e-5)


def test_a_series_is_one_subject(place: Path, forks: Server, tmp_path: Path) -> None:
    """It is resumed, made again and planned as a whole, and fails as a whole; others are done."""
    job = ("data.inputs=mixed", "data.time=volumes", f"output_dir={tmp_path}")
    data = np.asarray(nib.load(place / "in/a.nii.gz").dataobj).astype(np.float32)
    data[3, 3, 3, 2] = np.nan
    save(place / "mixed/a.nii.gz", data, AFFINE)
    for name in ("b c", "short"):
        (place / f"mixed/{name}.nii.gz").write_bytes((place / f"in/{name}.nii.gz").read_bytes())
    text = run(forks, place, *job, status=1)
    assert text.count("a: failed") == 1
    found = {row["subject"]: row for row in rows(tmp_path / "manifest.csv")}
    assert "NaN" in found["a"]["error"]
    assert not list(tmp_path.glob("a_*"))
    check(place, tmp_path, names=("b c", "short"))
    (place / "mixed/a.nii.gz").write_bytes((place / "in/a.nii.gz").read_bytes())
    stamp = (tmp_path / "b c_labels.nii.gz").stat().st_mtime_ns
    assert "2 of them before" in run(forks, place, *job)
    assert (tmp_path / "b c_labels.nii.gz").stat().st_mtime_ns == stamp
    check(place, tmp_path)
    (tmp_path / "statistics.csv").unlink()
    run(forks, place, *job)  # filled from the files
    check(place, tmp_path)


def test_a_file_per_class_of_a_series_is_4_d(place: Path, forks: Server, tmp_path: Path) -> None:
    """For readers that know no fifth axis; with a small type the slope is that of volumes."""
    options = ("data.inputs=in", "data.time=volumes", f"output_dir={tmp_path}", "stitch.files=per_class")
    run(forks, place, *options, "stitch.dtype=uint8")
    image = nib.load(tmp_path / "a_probabilities_white.nii.gz")
    assert image.shape == (*SHAPES["a"], 5)
    wanted = np.stack([read(place / f"alone/a_{t}_probabilities.nii.gz")[..., 2] for t in range(5)], -1)
    assert np.abs(image.get_fdata() - wanted).max() <= 1 / 510 + 1e-6


def test_true_labels_of_series_are_refused(place: Path, forks: Server, tmp_path: Path) -> None:
    """Rather than taken for masks of several labels."""
    options = ("data.inputs=in", "data.time=volumes", f"output_dir={tmp_path}", "data.labels='in/{subject}.nii.gz'")
    assert "data.time=volumes predicts series" in run(forks, place, *options, status=2)


def test_images_of_a_subject_have_as_many_volumes_as_each_other(place: Path) -> None:
    """One with a single volume belongs to each of the others'."""
    images = {name: ScalarImage(place / f"in/{name}.nii.gz") for name in SHAPES}
    assert count_volumes(Subject({"x": images["a"], "y": images["short"]})) == 5
    with pytest.raises(InputError, match="'x' has 5, 'y' has 3"):
        count_volumes(Subject({"x": images["a"], "y": images["b c"]}))


def test_a_series_is_read_once_and_let_go(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its last volume, in whichever order they come; one that failed is dropped by those that follow."""
    opened: list[str] = []

    def subject(name: str) -> Subject:
        opened.append(name)
        return Subject(t1=ScalarImage(place / f"in/{name}.nii.gz"))

    reads = SeriesReads(models=2)
    task = SubjectTask(SubjectFiles("a", {}), volumes=5)
    wanted = np.asarray(nib.load(place / "in/a.nii.gz").dataobj)
    for one in sorted(task.by_models(2), key=lambda task: -task.volume):
        volume = reads.take(one, lambda: subject("a"))
        np.testing.assert_array_equal(volume["t1"].stored()[0], wanted[..., one.volume])
        np.testing.assert_array_equal(volume["t1"].data[0], wanted[..., one.volume])
        assert volume["t1"].shape == (1, *SHAPES["a"])
    assert opened == ["a"]
    assert not reads._kept
    for name in ("b c", "a", "b c again", "short again"):
        reads.take(SubjectTask(SubjectFiles(name, {}), volumes=3), lambda name=name: subject(name.split(" again")[0]))
    assert len(reads._kept) == 2


def test_without_the_setting_volumes_are_channels(place: Path, forks: Server, tmp_path: Path) -> None:
    """As ever: a network of one channel cannot take five."""
    text = run(forks, place, "data.inputs=in/a.nii.gz", f"output_dir={tmp_path}", status=1)
    assert "a: failed" in text
