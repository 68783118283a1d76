"""Tests the report of real runs: pictures of every subject whatever the run, and a report that fails no run."""

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from forks import Server, checked
from PIL import Image
from run_folders import ball, done, write_run
from synthetic import noise, save

from voxquilt.report.command import main
from voxquilt.report.page import write_report
from voxquilt.report.run_folder import read_run
from voxquilt.reporting.manifest import read_rows
from voxquilt.reporting.thumbnails import SIDE, SIZE, maps_of, path_of, try_thumbnails, write_thumbnails

pytestmark = pytest.mark.timeout(120)
NETWORK = (
    "ckpt_path=null", "model=state_dict", "model.net._target_=synthetic.Over50", "data.patch_size=8", "trainer=cpu",
    "callbacks.writer.tensorboard=false", "run.log=plain", "output_dir=out",
)  # fmt: skip
NAMES = ["a", "b c", "ü#?%41&<b>", "x\udcff"]
AFFINE = np.array([[0, 0, -1.3, 4], [-0.8, 0, 0, 9], [0, 2, 0, -7], [0, 0, 0, 1.0]])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Subjects with odd names."""
    for n, name in enumerate(NAMES):
        save(tmp_path / "in" / f"{name}.nii.gz", noise((14, 12, 20), n), AFFINE)
    return tmp_path


def thumbnails(place: Path, kind: str = "overlay") -> set[str]:
    folder = path_of(place / "out", kind, "x").parent
    return {path.stem for path in folder.iterdir()} if folder.is_dir() else set()


def pixels(place: Path, kind: str, subject: str) -> np.ndarray:
    """(height, width, 3) of a thumbnail."""
    with Image.open(path_of(place, kind, subject)) as picture:
        return np.asarray(picture).astype(int)


def test_every_subject_has_pictures_and_a_row(place: Path, forks: Server) -> None:
    """Also of maps; the manifest has the path of each input, so that the command can be started anywhere."""
    result = forks.run("data.inputs=in", "stitch.products=[labels,disagreement,entropy]", *NETWORK, cwd=place)
    assert result.returncode == 0, result.stdout + result.stderr
    for kind in ("overlay", "disagreement", "entropy"):
        assert thumbnails(place, kind) == {*NAMES}
        assert pixels(place / "out", kind, "a").shape == (*SIZE[::-1], 3)
    rows = read_rows([place / "out/manifest.csv"])
    assert {name: dict(row.inputs) for name, row in rows.items()} == {
        name: {"image": str(place / "in" / f"{name}.nii.gz")} for name in NAMES
    }
    text = (place / "out/report.html").read_text("utf-8")
    assert text.count("<img ") == 3 * len(NAMES)
    assert json.loads((place / "out/run.json").read_text())["exit_status"] == 0


@pytest.mark.parametrize("more", [("run.distribute=slab",), ()], ids=["slabs", "subjects"])
def test_several_processes_leave_the_pictures_of_one(place: Path, forks: Server, more: tuple[str, ...]) -> None:
    """Whoever has a subject draws it; rank 0 writes the page."""
    assert forks.run("data.inputs=in", *NETWORK, cwd=place).returncode == 0
    alone = {name: path_of(place / "out", "overlay", name).read_bytes() for name in NAMES}
    (place / "out").rename(place / "alone")
    job = forks.start("data.inputs=in", *NETWORK, "trainer.strategy=ddp", *more, cwd=place, ranks=2)
    assert checked(job.wait()) == 0, job.text
    assert {name: path_of(place / "out", "overlay", name).read_bytes() for name in NAMES} == alone
    assert job.text.count("report: ") == 1
    assert (place / "out/report.html").read_text("utf-8").count("<img ") == len(NAMES)


def test_shards_and_later_runs_add_to_one_report(place: Path, forks: Server) -> None:
    """The last of them has all subjects; those that were done before keep their pictures."""
    for index in range(2):
        shard = ("shard.count=2", f"shard.index={index}")
        assert forks.run("data.inputs=in", *shard, *NETWORK, cwd=place).returncode == 0
    assert (place / "out/report.html").read_text("utf-8").count("<img ") == len(NAMES)
    picture = path_of(place / "out", "overlay", "a")
    before = picture.stat().st_mtime_ns
    assert forks.run("data.inputs=in", *NETWORK, cwd=place).returncode == 0
    assert picture.stat().st_mtime_ns == before


def test_without_a_report_there_is_none(place: Path, forks: Server) -> None:
    """And the command makes it, with its pictures, afterwards; another setting makes nothing again."""
    assert forks.run("data.inputs=in", *NETWORK, "callbacks.writer.report=false", cwd=place).returncode == 0
    assert not [path for path in (place / "out").iterdir() if path.name.startswith("report")]
    main([str(place / "out")])
    afterwards = {name: path_of(place / "out", "overlay", name).read_bytes() for name in NAMES}
    again = forks.run("data.inputs=in", *NETWORK, cwd=place)
    assert f"{len(NAMES)} of them before" in again.stdout
    assert "of them done before" in (place / "out/report.html").read_text("utf-8")
    (place / "out").rename(place / "first")
    assert forks.run("data.inputs=in", *NETWORK, cwd=place).returncode == 0
    assert {name: path_of(place / "out", "overlay", name).read_bytes() for name in NAMES} == afterwards


@pytest.mark.skipif(os.name == "nt", reason="folders are made read-only by their modes")
def test_a_report_that_fails_is_a_warning_and_fails_no_run(place: Path, forks: Server) -> None:
    """Neither the page nor pictures: here, folders and files are in their way."""
    (place / "out/report.html").mkdir(parents=True)
    (place / "out/report").write_text("a file")
    result = forks.run("data.inputs=in", *NETWORK, cwd=place)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("no report was written") == 1
    assert "no thumbnail" in result.stdout
    assert len(list((place / "out").glob("*_labels.nii.gz"))) == len(NAMES)


def test_a_subject_that_fails_now_shows_no_old_picture(place: Path, forks: Server) -> None:
    """Of the run before."""
    assert forks.run("data.inputs=in", *NETWORK, cwd=place).returncode == 0
    whole = (place / "in/a.nii.gz").read_bytes()
    (place / "in/a.nii.gz").write_bytes(whole[:-60])
    assert forks.run("data.inputs=in", "run.overwrite=true", *NETWORK, cwd=place).returncode == 1
    text = (place / "out/report.html").read_text("utf-8")
    assert text.count("<img ") == len(NAMES) - 1
    assert "overlay/a.jpg" not in text


# Thumbnails


def test_left_is_left_and_outlines_are_where_the_labels_are(tmp_path: Path) -> None:
    """Whatever the orientation of the file: the brighter half is the patient's left, the label is at its top."""
    ras = np.zeros((30, 40, 50), np.float32)
    ras[:15] = 100  # R is ascending: the first half is left
    ras[15:] = 20
    labels = np.zeros(ras.shape, np.uint8)
    labels[5:25, 10:30, 30:45] = 1
    pictures = []
    for codes in ("RAS", "LPS", "PIR", "SAL"):
        image, mask = (
            nib.Nifti1Image(volume, np.eye(4)).as_reoriented(
                nib.orientations.ornt_transform(
                    nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
                )
            )
            for volume in (ras, labels)
        )
        assert image.affine is not None
        write_thumbnails(
            tmp_path, codes, np.asarray(image.dataobj), np.asarray(mask.dataobj)[None], {}, image.affine, None
        )
        pictures.append(pixels(tmp_path, "overlay", codes))
    first = pictures[0]
    assert first.shape == (SIDE, 3 * SIDE, 3)
    for picture in pictures[1:]:
        assert np.abs(picture - first).max() < 40  # JPEG, and rounding of the centre
    coronal = first[:, SIDE : 2 * SIDE]
    assert coronal[SIDE // 2, SIDE // 2 - 25].mean() > coronal[SIDE // 2, SIDE // 2 + 25].mean() + 50
    orange = (np.abs(coronal - (230, 159, 0)).sum(-1) < 90).any(1)
    assert np.flatnonzero(orange).max() < SIDE * 0.45


def test_products_of_one_channel_have_thumbnails_by_kind() -> None:
    """Of the first output that has them; probabilities have none."""
    one, two = np.zeros((1, 2, 2, 2)), np.zeros((2, 2, 2, 2))
    volumes = {"seg_labels": one, "seg_entropy": one, "flat_entropy": one + 1, "probabilities": two, "image": one}
    kinds = {
        "seg_labels": "labels",
        "seg_entropy": "map",
        "flat_entropy": "map",
        "probabilities": "map",
        "image": "image",
    }
    assert maps_of(volumes, kinds).keys() == {"entropy", "image"}
    assert maps_of(volumes, kinds)["entropy"].max() == 0


def test_volumes_of_any_kind_have_a_thumbnail(tmp_path: Path) -> None:
    """Flat, constant, empty, not finite, of many channels; nothing warns."""
    flat, many = np.zeros((1, 40, 30)), np.zeros((70, 6, 6, 6), np.uint8)
    many[69, 2:4] = 1
    cases = [
        (flat, None, {}),
        (np.full((5, 6, 7), np.nan), np.zeros((1, 5, 6, 7), np.uint8), {"entropy": np.full((5, 6, 7), np.inf)}),
        (None, many, {}),
        (np.full((6, 6, 6), 7, np.uint8), np.ones((1, 6, 6, 6), np.uint8), {"image": np.zeros((6, 6, 6))}),
    ]
    for n, (image, labels, maps) in enumerate(cases):
        write_thumbnails(tmp_path, str(n), image, labels, maps, np.eye(4))
        assert pixels(tmp_path, "overlay", str(n)).shape == (*SIZE[::-1], 3)


def test_a_small_label_in_a_large_volume_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the search for the centre leaves voxels out at first."""
    monkeypatch.setattr("voxquilt.reporting.thumbnails._SEARCHED", 1000)
    labels = np.zeros((1, 61, 61, 61), np.uint8)
    labels[0, 7:10, 41:44, 53:56] = 1
    for n, place in enumerate(
        [(slice(7, 10), slice(41, 44), slice(53, 56)), (slice(7, 8), slice(41, 42), slice(53, 54))]
    ):
        labels = np.zeros((1, 61, 61, 61), np.uint8)
        labels[0][place] = 1
        write_thumbnails(tmp_path, str(n), np.zeros((61, 61, 61)), labels, {}, np.eye(4))
        picture = pixels(tmp_path, "overlay", str(n))
        for panel in np.split(picture, 3, axis=1):
            assert (panel.max(-1) > 60).any()


def test_a_failing_picture_removes_the_one_of_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It would seem to show what is in the files now."""
    good = np.zeros((4, 4, 4))
    try_thumbnails(tmp_path, "a", good, None, {}, np.eye(4))
    assert path_of(tmp_path, "overlay", "a").is_file()
    try_thumbnails(tmp_path, "a", good, None, {}, np.zeros((4, 4)))
    assert not path_of(tmp_path, "overlay", "a").exists()
    assert "a: no thumbnail for the report" in caplog.text


# The command


def test_the_command_draws_what_is_missing_and_says_what_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of subjects whose input is gone, without it."""
    rows = [ball(tmp_path, "a", 5), ball(tmp_path, "b", 6), ball(tmp_path, "c", 6)]
    write_run(tmp_path / "out", rows)
    (tmp_path / "in/b.nii.gz").unlink()
    (tmp_path / "out/c_labels.nii.gz").write_bytes(b"damaged")
    main([str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert "drew the pictures of 1 subject\n" in printed.out
    assert "no picture of b" in printed.err
    assert "c_labels.nii.gz" in printed.err
    assert path_of(tmp_path / "out", "overlay", "a").is_file()
    main([str(tmp_path / "out")])
    assert read_run(tmp_path / "out").rows.keys() == {"a", "b", "c"}


@pytest.mark.parametrize(("arguments", "message"), [
    (["nowhere"], "there is no folder nowhere"),
    (["."], "has no manifest.csv"),
    (["out", "--serve", "--embed"], "--embed goes with a report on disk"),
    (["out", "-o", "x.html"], "--output goes with several folders"),
    (["out", "out"], "a folder is given twice"),
    (["out", "other", "--serve"], "--serve goes with one folder"),
    (["out", "other"], "have no subject in common"),
    (["out", "same", "-o", "no/x.html"], "there is no folder no"),
])  # fmt: skip
def test_a_wrong_command_line_is_one_message(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And exit status 2; nothing is written."""
    for name, subject in (("out", "a"), ("same", "a"), ("other", "b")):
        write_run(tmp_path / name, [done(subject)])
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_report_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be written leaves the one before."""
    path = write_report(write_run(tmp_path, [done("a")]))
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(Exception, match="No space left"):
        write_report(tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
