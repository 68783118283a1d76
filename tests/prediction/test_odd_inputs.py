"""Tests odd input files: each costs only its own row, with the reason, and the other subjects are predicted."""

import csv
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from forks import Server, checked
from odd_files import BAD_HEADERS, BAD_VOXELS, save_raw
from synthetic import noise, read, save

from voxquilt.data.preprocess import Preprocess
from voxquilt.errors import InputError
from voxquilt.planning.network_check import ChannelsError, check_network
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.training.datamodule import TrainingDataModule

JOB = (
    "data.inputs=in", "model=state_dict", "model.net._target_=synthetic.Over50", "ckpt_path=null", "data.patch_size=8",
    "preprocess.spacing=1.0", "callbacks.writer.tensorboard=false", "callbacks.writer.report=false",
)  # fmt: skip
SHAPE = (12, 9, 10)
GOOD = ["good", "müller", "[bold]", "new\nline", os.fsdecode(b"latin\xfc"), "of_micron"]


def rows(path: Path) -> dict[str, dict[str, str]]:
    """A manifest's rows by subject, with names as the operating system has them."""
    with open(path, newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    names = [re.sub(r"\\(udc..)", lambda match: chr(int(match[1][1:], 16)), row["subject"]) for row in found]
    assert len(set(names)) == len(names)
    return dict(zip(names, found, strict=True))


def good(folder: Path) -> dict[str, np.ndarray]:
    """Write files that can be predicted; returns their voxels by subject."""
    volumes = {name: noise(SHAPE, n) for n, name in enumerate(GOOD)}
    for name, volume in volumes.items():
        save(folder / "volume.nii.gz", volume, np.diag([1000, 1000, 1000, 1]) if name == "of_micron" else None)
        if name == "of_micron":
            micron = nib.load(folder / "volume.nii.gz")
            micron.header.set_xyzt_units("micron", "sec")
            nib.save(nib.Nifti1Image(volume, micron.affine, micron.header), folder / "volume.nii.gz")
        (folder / "volume.nii.gz").rename(folder / f"{name}.nii.gz")
    return volumes


def bad(folder: Path) -> dict[str, str]:
    """Write files that cannot be predicted; returns the error that each row must have, by subject."""
    wanted: dict[str, str] = {}
    voxels = {f"voxels {name}": (make, "reading its voxels failed") for name, make in BAD_VOXELS.items()}
    for name, (make, message) in {**BAD_HEADERS, **voxels}.items():
        if name in ("missing", "folder", "link to itself", "NRRD", "MGZ"):  # these are no files of a folder's listing
            continue
        place = folder / "making"
        place.mkdir()
        subject = "voxels cut gz" if name == "voxels cut gz" else name.replace("/", " ")
        make(place)
        for path in place.iterdir():
            path.rename(folder / f"{subject}.{path.name.partition('.')[2]}")
        place.rmdir()
        wanted[subject] = message
    (folder / "loop.nii.gz").symlink_to("loop.nii.gz")
    save(folder / "far.nii.gz", noise(SHAPE), np.diag([400, 400, 400, 1]))
    save(folder / "farther.nii.gz", noise(SHAPE), np.diag([1e30, 1e30, 1e30, 1]))
    save(folder / "near.nii.gz", noise(SHAPE), np.diag([1e-6, 1e-6, 1e-6, 1]))
    save(folder / "colours.nii.gz", np.stack([noise(SHAPE)] * 3, -1))
    save(folder / "semi;colon.nii.gz", noise(SHAPE))
    save(folder / "nan.nii.gz", np.full(SHAPE, np.nan, np.float32))
    sparse = save_raw(folder / "sparse.nii", noise((2, 2, 2)), kind=2, dim=[3, 2**32, 4, 4, 1, 1, 1, 1])
    os.truncate(sparse, 2**38)  # which takes no room on disk
    return wanted | {
        "loop": "the link points to itself",
        "far": "it does not fit the host's memory: .* of 400 x 400 x 400 mm, model space 4800 x 3600 x 4000",
        "farther": "model space would have 1.2e",
        "near": "of 1e-06 x 1e-06 x 1e-06 mm, and model space would have 1 x 1 x 1 voxels of 1 x 1 x 1 mm",
        "colours": "it has 3 channels, and the network takes 1",
        "semi;colon": "cannot be an id: manifest.csv separates",
        "nan": "NaN or infinite",
        "sparse": "model space would have 4.2518e.09 x 8 x 12 voxels",
    }


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A working folder; its sparse file is removed afterwards, since other tools would read it in full."""
    (tmp_path / "in").mkdir()
    yield tmp_path
    (tmp_path / "in/sparse.nii").unlink(missing_ok=True)


def check(out: Path, volumes: dict[str, np.ndarray], wanted: dict[str, str], *manifests: str) -> None:
    """Assert that every good file is predicted rightly and every bad one has a row with its reason."""
    found = {name: row for manifest in manifests for name, row in rows(out / manifest).items()}
    assert found.keys() == volumes.keys() | wanted.keys()
    for name, volume in volumes.items():
        assert found[name]["status"] in ("done", "skipped"), found[name]
        np.testing.assert_array_equal(read(out / f"{name}_labels.nii.gz"), volume > 50)
    for name, message in wanted.items():
        assert found[name]["status"] == "failed", found[name]
        assert re.search(message, found[name]["error"]), (name, found[name]["error"])
        assert f"in/{name}." in found[name]["error"], found[name]
    assert {path.name for path in out.glob("*.nii*")} == {f"{name}_labels.nii.gz" for name in volumes}


def test_odd_files_fail_alone_and_the_others_are_predicted(place: Path, forks: Server) -> None:
    """All known kinds in one folder: exit status 1 in less than a minute, and the same when run again."""
    volumes, wanted = good(place / "in"), bad(place / "in")
    assert len(wanted) > 40
    began = time.monotonic()
    job = forks.start(*JOB, cwd=place)
    assert job.wait() == [1], job.text
    assert time.monotonic() - began < 60
    assert "Traceback" not in job.text
    check(place / "outputs", volumes, wanted, "manifest.csv")
    assert json.loads((place / "outputs/run.json").read_text())["failed"] == len(wanted)
    again = forks.start(*JOB, cwd=place)
    assert again.wait() == [1], again.text
    check(place / "outputs", volumes, wanted, "manifest.csv")
    assert rows(place / "outputs/manifest.csv")[GOOD[-2]]["status"] == "skipped"


@pytest.mark.parametrize("distribute", ["subject", "slab"])
def test_odd_files_fail_alone_among_several_processes(distribute: str, place: Path, forks: Server) -> None:
    """Also if processes share every volume."""
    volumes, wanted = good(place / "in"), bad(place / "in")
    job = forks.start(*JOB, f"run.distribute={distribute}", "data.batch_size=auto", cwd=place, ranks=2)
    assert checked(job.wait()) == 1, job.text
    check(place / "outputs", volumes, wanted, "manifest.csv")


def test_odd_files_fail_alone_among_shards(place: Path, forks: Server) -> None:
    """Every subject belongs to exactly one shard."""
    volumes, wanted = good(place / "in"), bad(place / "in")
    for index in range(2):
        job = forks.start(*JOB, "shard.count=2", f"shard.index={index}", cwd=place)
        assert job.wait() == [1], job.text
    check(place / "outputs", volumes, wanted, "manifest_0_of_2.csv", "manifest_1_of_2.csv")


def test_a_dry_run_says_which_files_will_fail(place: Path, forks: Server) -> None:
    """By name and reason, as far as headers tell."""
    volumes, wanted = good(place / "in"), bad(place / "in")
    result = forks.run(*JOB, "run.dry_run=true", cwd=place)
    assert result.returncode == 0, result.stderr
    told = json.loads((place / "outputs/plan.json").read_text())
    problems = {one["subject"]: one["problem"] for one in told["per_subject"] if "problem" in one}
    of_voxels = {name for name in wanted if name.startswith("voxels ")} | {"nan"}
    assert problems.keys() == wanted.keys() - of_voxels
    assert {name: problem for name, problem in problems.items() if not re.search(wanted[name], problem)} == {}
    assert told["fits"]
    assert told["subjects"] == len(volumes) + len(wanted)
    assert "colours" in result.stdout
    assert "it has 3 channels, and the network takes 1" in result.stdout


@pytest.mark.parametrize("network", ["Touchy", "Over50"])
@pytest.mark.parametrize("channels", [2, 30_000])
def test_a_file_with_other_channels_fails_alone_for_every_network(
    network: str, channels: int, tmp_path: Path, forks: Server
) -> None:
    """If shapes do not tell the network's channels, its own error on that file is reported."""
    volume = noise(SHAPE) % 60
    save(tmp_path / "in/a.nii.gz", volume)
    save(tmp_path / "in/b.nii.gz", np.zeros((*SHAPE[:2], 2, channels), np.int16))
    job = forks.start(*JOB, f"model.net._target_=synthetic.{network}", "data.batch_size=512", cwd=tmp_path)
    assert job.wait() == [1], job.text
    found = rows(tmp_path / "outputs/manifest.csv")
    assert [found[name]["status"] for name in "ab"] == ["done", "failed"]
    assert re.search(f"it has {channels} channels|expected input|does not fit the host's memory", found["b"]["error"])
    np.testing.assert_array_equal(read(tmp_path / "outputs/a_labels.nii.gz"), volume > 50)


def test_a_rerun_that_is_left_with_only_bad_files_is_not_refused(tmp_path: Path, forks: Server) -> None:
    """Finished subjects prove the configuration right, so the bad files get rows."""
    save(tmp_path / "in/a.nii.gz", noise(SHAPE))
    assert forks.start(*JOB, cwd=tmp_path).wait() == [0]
    save(tmp_path / "in/b.nii.gz", np.stack([noise(SHAPE)] * 3, -1))
    save(tmp_path / "in/c.nii.gz", noise(SHAPE), np.diag([400, 400, 400, 1]))
    for ranks, removed in ((1, ""), (2, ""), (1, "b"), (1, "c")):
        if removed:
            (tmp_path / f"in/{removed}.nii.gz").rename(tmp_path / f"{removed}.nii.gz")
        job = forks.start(*JOB, cwd=tmp_path, ranks=ranks)
        assert checked(job.wait()) == (0 if removed == "c" else 1), job.text
        found = rows(tmp_path / "outputs/manifest.csv")
        assert found["a"]["status"] == "skipped"
    assert "it has 3 channels, and the network takes 1" in found["b"]["error"]
    assert "of 400 x 400 x 400 mm" in found["c"]["error"]


def test_a_run_is_refused_if_no_subject_fits_the_network(tmp_path: Path, forks: Server) -> None:
    """All with three channels, so the configuration or the data set is at fault. Status 2, nothing started."""
    for name in "ab":
        save(tmp_path / f"in/{name}.nii.gz", np.stack([noise(SHAPE)] * 3, -1))
    result = forks.run(*JOB, cwd=tmp_path)
    assert result.returncode == 2
    assert "the network takes 1 channel; subjects have 3 (image)" in result.stderr
    save(tmp_path / "in/c.nii.gz", np.stack([noise(SHAPE)] * 2, -1))
    result = forks.run(*JOB, cwd=tmp_path)
    assert result.returncode == 2
    assert "the network takes 1 channel; subjects have 3 (image)" in result.stderr
    assert not (tmp_path / "outputs/manifest.csv").exists()


def test_a_run_is_refused_if_no_subject_fits_the_machine(tmp_path: Path, forks: Server) -> None:
    """Unreadable files do not count as subjects that would fit."""
    for n in range(2):
        save(tmp_path / f"in/far{n}.nii.gz", noise(SHAPE), np.diag([400, 400, 400, 1]))
    (tmp_path / "in/empty.nii.gz").touch()
    result = forks.run(*JOB, cwd=tmp_path)
    assert result.returncode == 2
    assert "does not fit the host's memory: it needs " in result.stderr
    assert not (tmp_path / "outputs/manifest.csv").exists()


@pytest.mark.parametrize(("wanted", "given"), [(1, 2), (1, 3), (2, 1), (4, 1)])
def test_the_error_on_channels_carries_the_number_wanted(wanted: int, given: int) -> None:
    """The subjects that will fail are identified by it."""
    with pytest.raises(ChannelsError, match=f"takes {wanted} channel") as error:
        check_network(torch.nn.Conv3d(wanted, 2, 3, padding=1), ["t1"], given, (8, 8, 8), None)
    assert error.value.wanted == wanted


def test_a_subject_that_will_fail_is_never_read(tmp_path: Path) -> None:
    """Its error comes from the header, so it takes no time and no memory."""
    save(tmp_path / "in/far.nii.gz", noise(SHAPE), np.diag([1e9, 1e9, 1e9, 1]))
    data = GridDataModule(str(tmp_path / "in"), 8, preprocess=Preprocess(spacing=1.0))
    data.setup("predict")
    (task,) = data.plan.tasks
    assert data.plan.costs[0].patches == 1
    (tmp_path / "in/far.nii.gz").unlink()
    with pytest.raises(InputError, match=r"far\.nii\.gz: the file has 12 x 9 x 10 voxels of 1e\+09 x 1e\+09 x 1e\+09"):
        data.load(task)


# Names that a stream cannot encode


@pytest.mark.parametrize("log", ["plain", "rich", "json"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_name_that_a_stream_cannot_show_is_escaped(log: str, encoding: str, tmp_path: Path, forks: Server) -> None:
    """On ASCII and Latin-1 streams, in lines, bars, tables and JSON; files keep their names, and the status is 0."""
    names = ["müller", "脳", os.fsdecode(b"latin\xfc")]
    for n, name in enumerate(names):
        save(tmp_path / "volume.nii.gz", noise(SHAPE, n))
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "volume.nii.gz").rename(tmp_path / f"in/{name}.nii.gz")
        save(tmp_path / "volume.nii.gz", (noise(SHAPE, n) > 50).astype(np.uint8))
        (tmp_path / "truth").mkdir(exist_ok=True)
        (tmp_path / "volume.nii.gz").rename(tmp_path / f"truth/{name}.nii.gz")
    (tmp_path / "in/größe.nrrd").touch()  # which is left out, in a line of its own
    words = (*JOB, f"run.log={log}", "data.labels='truth/{subject}.nii.gz'", "callbacks.writer.tensorboard=true",
             'stitch.class_names=[Hintergrund,"größer"]')  # fmt: skip
    result = forks.run(*words, cwd=tmp_path, env={"PYTHONIOENCODING": encoding})
    assert result.returncode == 0, result.stderr
    for text in (result.stdout, result.stderr):
        assert "Traceback" not in text
        assert "Error" not in text
        assert "nothing more is written" not in text
    for n, name in enumerate(names):
        np.testing.assert_array_equal(read(tmp_path / f"outputs/{name}_labels.nii.gz"), noise(SHAPE, n) > 50)
    with open(tmp_path / "outputs/metrics.csv", encoding="utf-8") as file:
        assert [(row["class"], float(row["dice"])) for row in csv.DictReader(file)] == [("größer", 1.0)] * 3
    if log == "json":
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        assert {line["subject"] for line in lines if line["event"] == "subject"} == set(names)
    else:
        assert ("m\\xfcller" if encoding == "ascii" else "m\ufffdller") in result.stdout
        assert "\\u8133" in result.stdout
    for option in ("run.status=true", "run.dry_run=true"):
        result = forks.run(*words, option, cwd=tmp_path, env={"PYTHONIOENCODING": encoding})
        assert result.returncode == 0, result.stderr


def test_the_message_on_a_wrong_configuration_is_escaped_too(tmp_path: Path, forks: Server) -> None:
    """One message and status 2."""
    save(tmp_path / "größer/müller.nii.gz", noise(SHAPE))
    result = forks.run("data.inputs=größer/mülle.nii.gz", "ckpt_path=null", "data.patch_size=8", cwd=tmp_path,
                       env={"PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert result.returncode == 2
    assert "Did you mean gr\\xf6\\xdfer/m\\xfcller.nii.gz?" in result.stderr
    assert "Traceback" not in result.stderr


# Outputs are not inputs


@pytest.mark.parametrize("inputs", ["in/**/*.nii.gz", "in"])
def test_a_run_never_predicts_its_own_outputs(inputs: str, tmp_path: Path, forks: Server) -> None:
    """The same command three times, with its output folder inside the inputs: two subjects each time."""
    volumes = {name: save(tmp_path / f"in/{name}.nii.gz", noise(SHAPE, n)) for n, name in enumerate("ab")}
    words = (*JOB, f"data.inputs={inputs}", "output_dir=in/out", "run.resume=false")
    for ranks in (1, 1, 2):
        job = forks.start(*words, cwd=tmp_path, ranks=ranks)
        assert checked(job.wait()) == 0, job.text
        check(tmp_path / "in/out", volumes, {}, "manifest.csv")
    result = forks.run(*words, "run.status=true", cwd=tmp_path)
    assert "2 of 2 subjects done, 0 failed, 0 missing" in result.stdout
    assert forks.run(*words, "run.dry_run=true", cwd=tmp_path).returncode == 0
    told = json.loads((tmp_path / "in/out/plan.json").read_text())
    assert [one["subject"] for one in told["per_subject"]] == ["a", "b"]
    result = forks.run(*words, "data.inputs=in/out/a_labels.nii.gz", cwd=tmp_path)
    assert result.returncode == 2
    assert "in/out/a_labels.nii.gz lies in output_dir=in/out" in result.stderr


def test_data_modules_leave_out_the_output_folder(tmp_path: Path) -> None:
    """In a user's program too, for predicting and for training."""
    for name in ("in/a.nii.gz", "in/b.nii.gz", "in/out/a_image.nii.gz", "truth/a.nii.gz", "truth/b.nii.gz"):
        save(tmp_path / name, noise(SHAPE))
    pattern, out = str(tmp_path / "in/**/*.nii.gz"), tmp_path / "in/out"
    assert [case.subject for case in GridDataModule(pattern, 8, output_dir=out).cases] == ["a", "b"]
    trained = TrainingDataModule(pattern, str(tmp_path / "truth/{subject}.nii.gz"), 8, folds=2, output_dir=out)
    assert sorted(case.subject for case in (*trained.training_cases, *trained.validation_cases)) == ["a", "b"]


def test_files_in_microns_and_meters_are_handled_in_mm(tmp_path: Path, forks: Server) -> None:
    """Volumes, distances and masks are in mm for every unit; outputs keep their input's unit."""
    x = noise(SHAPE)
    save(tmp_path / "in/mm.nii.gz", x, np.diag([2, 2, 2, 1]))
    shift = np.roll((x > 50).astype(np.uint8), 1, 0)
    for name, unit, scale in (("micron", "micron", 1000), ("meter", "meter", 0.001)):
        image = nib.Nifti1Image(x, np.diag([2 * scale, 2 * scale, 2 * scale, 1]))
        image.header.set_xyzt_units(unit)
        nib.save(image, tmp_path / f"in/{name}.nii.gz")
        save(tmp_path / f"truth/{name}.nii.gz", shift, np.diag([2, 2, 2, 1]))
    truth = nib.Nifti1Image(shift, np.diag([2000, 2000, 2000, 1]))
    truth.header.set_xyzt_units("micron")
    nib.save(truth, tmp_path / "truth/mm.nii.gz")
    words = ("data.skip='truth/{subject}.nii.gz'", "data.labels='truth/{subject}.nii.gz'", "preprocess.spacing=2.0")
    result = forks.run(*JOB, *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {row["volume_ml"] for row in rows(tmp_path / "outputs/manifest.csv").values()} == {
        f"{(x > 50).sum() * 0.008:.3f}"
    }
    with open(tmp_path / "outputs/metrics.csv", encoding="utf-8") as file:
        found = [{k: v for k, v in row.items() if k != "subject"} for row in csv.DictReader(file)]
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    assert float(found[0]["volume_ml"]) == pytest.approx((x > 50).sum() * 0.008, rel=1e-4)
    for name in ("mm", "micron", "meter"):
        made = nib.load(tmp_path / f"outputs/{name}_labels.nii.gz")
        assert made.header["xyzt_units"] == nib.load(tmp_path / f"in/{name}.nii.gz").header["xyzt_units"]
        np.testing.assert_array_equal(made.affine, nib.load(tmp_path / f"in/{name}.nii.gz").affine)
        np.testing.assert_array_equal(np.asarray(made.dataobj), x > 50)
