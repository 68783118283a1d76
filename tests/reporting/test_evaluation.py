"""Tests the evaluation of a run: metrics.csv has every subject and class, by the written files, and every error."""

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from forks import Server, checked
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from PIL import Image
from synthetic import noise, read, save

from voxquilt.data.discovery import SubjectFiles
from voxquilt.example_files import fetch
from voxquilt.reporting.evaluation import Evaluation, Score
from voxquilt.reporting.manifest import Row
from voxquilt.reporting.metrics import Agreement, agreements
from voxquilt.reporting.plots import write_boxes

NETWORK = ("model=state_dict", "model.net._target_=synthetic.Over50", "ckpt_path=null", "trainer=cpu")
JOB = ("data.patch_size=8", "data.patch_overlap=4", *NETWORK)
LABELS = "data.labels=truth/{subject}.nii"
OBLIQUE = np.array([[0.5, 0.1, 0, 3], [-0.1, 0.5, 0.2, -4], [0, 0.3, 1.5, 5], [0, 0, 0, 1]])


def metrics(folder: Path, name: str = "metrics.csv") -> list[dict[str, str]]:
    with open(folder / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def place(folder: Path, *subjects: str, affine: np.ndarray | None = None) -> None:
    """Scans, and reference labels that are right except for some voxels."""
    for seed, name in enumerate(subjects):
        scan = save(folder / f"in/{name}.nii", noise((12, 10, 9), seed), affine)
        truth = (scan > 50).astype(np.uint8)
        truth[: seed + 1, :2] = 0
        save(folder / f"truth/{name}.nii", truth, affine)


def test_a_run_with_reference_labels_writes_metrics(tmp_path: Path, forks: Server) -> None:
    """A row per subject and class computed from both files, a picture and a table; voxels are oblique."""
    place(tmp_path, "a", "b", affine=OBLIQUE)
    names = "stitch.class_names=[background,bright]"
    job = forks.start("data.inputs=in", LABELS, names, "run.surface_tolerance=0.3", *JOB, cwd=tmp_path)
    assert checked(job.wait()) == 0, job.text
    rows = metrics(tmp_path / "outputs")
    assert [(row["subject"], row["class"], row["error"]) for row in rows] == [("a", "bright", ""), ("b", "bright", "")]
    for row in rows:
        made, truth = (
            read(tmp_path / f"outputs/{row['subject']}_labels.nii.gz"),
            read(tmp_path / f"truth/{row['subject']}.nii"),
        )
        wanted = agreements(made, truth, OBLIQUE, 0.3)[1]
        assert 0.5 < wanted.dice < 1
        assert 0 < wanted.surface_dice < 1
        for key in (
            "dice",
            "surface_dice",
            "hd95_mm",
            "volume_ml",
            "true_volume_ml",
            "volume_error_ml",
            "relative_volume_error",
        ):
            assert float(row[key]) == pytest.approx(getattr(wanted, key), rel=1e-5), key
        assert float(row["volume_ml"]) == pytest.approx(made.sum() * abs(np.linalg.det(OBLIQUE)) / 1000, rel=1e-5)
    with Image.open(tmp_path / "outputs/metrics.png") as picture:
        assert min(picture.size) > 300
        assert len(set(picture.convert("L").tobytes())) > 10
    assert "2 of 2 subjects compared with their labels" in job.text
    assert "bright" in job.text
    assert "±" in job.text


def test_subjects_done_before_are_evaluated_too(tmp_path: Path, forks: Server) -> None:
    """The second run predicts nothing, since data.labels is not in the fingerprint; failed subjects are reported."""
    place(tmp_path, "a", "b")
    (tmp_path / "in/c.nii").write_bytes(b"no image")
    save(tmp_path / "truth/c.nii", np.zeros((3, 3, 3), np.uint8))
    first = forks.start("data.inputs=in", *JOB, cwd=tmp_path)
    assert checked(first.wait()) == 1, first.text
    assert not (tmp_path / "outputs/metrics.csv").exists()
    before = (tmp_path / "outputs/a_labels.nii.gz").stat().st_mtime_ns
    again = forks.start("data.inputs=in", LABELS, *JOB, cwd=tmp_path)
    assert checked(again.wait()) == 1, again.text
    assert (tmp_path / "outputs/a_labels.nii.gz").stat().st_mtime_ns == before
    rows = metrics(tmp_path / "outputs")
    assert [(row["subject"], row["class"], row["error"]) for row in rows] == [
        ("a", "1", ""), ("b", "1", ""), ("c", "", "it was not predicted"),
    ]  # fmt: skip
    assert all(0.5 < float(row["dice"]) < 1 for row in rows[:2])
    assert rows[2]["dice"] == rows[2]["volume_ml"] == ""


def test_each_subject_is_evaluated_once_by_processes_and_shards(tmp_path: Path, forks: Server) -> None:
    """By the process that keeps the manifest; each shard writes a file of its own."""
    place(tmp_path, "a", "b", "c")
    both = forks.start("data.inputs=in", LABELS, "output_dir=two", *JOB, cwd=tmp_path, ranks=2)
    assert checked(both.wait()) == 0, both.text
    assert [row["subject"] for row in metrics(tmp_path / "two")] == ["a", "b", "c"]
    assert both.text.count("3 of 3 subjects compared") == 1
    for index in (0, 1):
        shard = ("shard.count=2", f"shard.index={index}", "output_dir=shards")
        assert checked(forks.start("data.inputs=in", LABELS, *shard, *JOB, cwd=tmp_path).wait()) == 0
    parts = [metrics(tmp_path / "shards", f"metrics_{index}_of_2.csv") for index in (0, 1)]
    assert sorted(row["subject"] for part in parts for row in part) == ["a", "b", "c"]
    assert sorted(map(str, parts[0] + parts[1])) == sorted(map(str, metrics(tmp_path / "two")))


def test_a_column_of_the_table_may_name_the_labels(tmp_path: Path, forks: Server) -> None:
    """It is not an image, with or without an evaluation."""
    place(tmp_path, "a", "b")
    (tmp_path / "table.csv").write_text("subject,t1,label\nx,in/a.nii,truth/a.nii\ny,in/b.nii,truth/b.nii\n")
    job = forks.start("data.inputs=table.csv", *JOB, cwd=tmp_path)
    assert checked(job.wait()) == 0, job.text
    assert [row["subject"] for row in metrics(tmp_path / "outputs")] == ["x", "y"]


def test_an_invalid_reference_label_is_a_row_and_status_1(tmp_path: Path, forks: Server) -> None:
    """Another grid or affine, values that are not labels, an unknown class; other subjects are evaluated."""
    place(tmp_path, "a", "affine", "class", "gone", "grid", "half")
    save(tmp_path / "truth/affine.nii", np.zeros((12, 10, 9), np.uint8), np.diag([1, 1, 2, 1]))
    save(tmp_path / "truth/class.nii", np.full((12, 10, 9), 7, np.uint8))
    (tmp_path / "truth/gone.nii").unlink()
    save(tmp_path / "truth/grid.nii", np.zeros((12, 10, 8), np.uint8))
    save(tmp_path / "truth/half.nii", np.full((12, 10, 9), 0.5, np.float32))
    job = forks.start("data.inputs=in", LABELS, "stitch.class_names=[none,bright]", *JOB, cwd=tmp_path)
    assert checked(job.wait()) == 1, job.text
    rows = {row["subject"]: row for row in metrics(tmp_path / "outputs")}
    assert rows["a"]["error"] == ""
    assert 0.5 < float(rows["a"]["dice"]) < 1
    assert "(12, 10, 8)" in rows["grid"]["error"]
    assert "(12, 10, 9)" in rows["grid"]["error"]
    assert "lie on different grids" in rows["affine"]["error"]
    assert "has class 7; there are 2, 0 to 1 (stitch.class_names)" in rows["class"]["error"]
    assert "half.nii holds 0.5, which is not a label" in rows["half"]["error"]
    assert rows["gone"]["error"] == "there is no label file truth/gone.nii"
    assert "half: not compared" in job.text
    assert "1 of 6 subjects compared" in job.text


def test_a_missing_reference_label_is_reported_but_not_a_failure(tmp_path: Path, forks: Server) -> None:
    """Cohorts are often labelled in part. If no label exists at all, nothing is started."""
    place(tmp_path, "a", "b")
    (tmp_path / "truth/b.nii").unlink()
    job = forks.start("data.inputs=in", LABELS, *JOB, cwd=tmp_path)
    assert checked(job.wait()) == 0, job.text
    assert [row["error"] for row in metrics(tmp_path / "outputs")] == ["", "there is no label file truth/b.nii"]
    none = forks.start("data.inputs=in", "data.labels=nowhere/{subject}.nii", "output_dir=none", *JOB, cwd=tmp_path)
    assert checked(none.wait()) == 2
    assert "voxquilt: data.labels=nowhere/{subject}.nii: no subject has such a file (relative to" in none.text
    assert not (tmp_path / "none").exists()


def test_a_run_whose_metrics_cannot_be_written_keeps_its_outputs(tmp_path: Path, forks: Server) -> None:
    """Status 1, not 2: the labels were written."""
    place(tmp_path, "a")
    (tmp_path / "outputs/metrics.csv").mkdir(parents=True)
    job = forks.start("data.inputs=in", LABELS, *JOB, cwd=tmp_path)
    assert checked(job.wait()) == 1, job.text
    assert "metrics.csv: writing failed" in job.text
    assert "1 of 1 subjects compared" in job.text
    assert (tmp_path / "outputs/a_labels.nii.gz").exists()


# Without a run


def evaluated(folder: Path, subjects: dict[str, tuple[np.ndarray, np.ndarray]], **options: object) -> list[Score]:
    """Evaluate predictions, as they would be written, against reference labels."""
    cases, rows = [], []
    for name, (made, truth) in subjects.items():
        save(folder / f"{name}_labels.nii", made)
        save(folder / f"truth/{name}.nii", truth)
        cases.append(SubjectFiles(name, {"image": folder / "none.nii"}))
        rows.append(Row(name, "done", (f"{name}_overlay.png", f"{name}_labels.nii")))
    settings = {"labels": str(folder / "truth/{subject}.nii"), "class_names": None, "tolerance": 1.0} | options
    return Evaluation(folder, cases, **settings).scores(rows)  # type: ignore[arg-type]


def cube(*classes: int) -> np.ndarray:
    """A cube with one plane per class."""
    volume = np.zeros((6, 4, 4), np.uint8)
    for n, value in enumerate(classes):
        volume[n] = value
    return volume


def table(scores: list[Score]) -> dict[tuple[str, str], float]:
    return {(s.subject, s.name): s.agreement.dice for s in scores if s.agreement}


def test_metrics_have_every_class_that_any_subject_has(tmp_path: Path) -> None:
    """A class that a subject lacks on both sides is empty there; one that only one side has gets 0."""
    scores = evaluated(tmp_path, {"a": (cube(1, 2), cube(1)), "b": (cube(4), cube(4, 4))})
    nan = pytest.approx(float("nan"), nan_ok=True)
    assert table(scores) == {
        ("a", "1"): 1, ("a", "2"): 0, ("a", "4"): nan, ("b", "1"): nan, ("b", "2"): nan, ("b", "4"): 2 / 3,
    }  # fmt: skip
    named = evaluated(tmp_path, {"a": (cube(1), cube(1))}, class_names=["none", "one", "two"])
    assert table(named) == {("a", "one"): 1, ("a", "two"): nan}


def test_several_labels_per_voxel_are_compared_by_channel(tmp_path: Path) -> None:
    """In a 4-D file or one file per channel; another number of channels is an error."""
    made = np.stack([cube(1, 1), cube(0, 1), cube()], -1)
    truth = np.stack([cube(1), cube(0, 255), cube()], -1)
    nan = pytest.approx(float("nan"), nan_ok=True)
    wanted = {("a", "edge"): 2 / 3, ("a", "core"): 1, ("a", "2"): nan}
    assert table(evaluated(tmp_path, {"a": (made, truth)}, class_names=["edge", "core"])) == wanted
    for n, name in enumerate("xyz"):
        save(tmp_path / f"parts/{name}_a.nii", truth[..., n])
    patterns = {name: str(tmp_path / f"parts/{name}_{{subject}}.nii") for name in "xyz"}
    assert list(table(evaluated(tmp_path, {"a": (made, truth)}, labels=patterns)).values()) == list(wanted.values())
    (score,) = evaluated(tmp_path, {"a": (made, cube(1))})
    assert score.error == "its label has 1 channels, and its prediction 3."
    assert score.failed


def test_whole_numbers_in_float_files_are_labels(tmp_path: Path) -> None:
    """Negative ones are not."""
    assert table(evaluated(tmp_path, {"a": (cube(3), cube(3).astype(np.float64))})) == {("a", "3"): 1}
    (score,) = evaluated(tmp_path, {"a": (cube(3), cube(3).astype(np.int16) - 1)})
    assert "holds -1, which is not a label" in score.error


def test_a_run_that_wrote_no_labels_is_an_error_that_lists_its_files(tmp_path: Path) -> None:
    """Such as after stitch.products=[probabilities]."""
    save(tmp_path / "truth/a.nii", cube(1))
    evaluation = Evaluation(tmp_path, [SubjectFiles("a", {})], str(tmp_path / "truth/{subject}.nii"), None, 1.0)
    (score,) = evaluation.scores([Row("a", "done", ("a_probabilities.nii",))])
    assert "no labels were written for it, only a_probabilities.nii; set stitch.products=[labels]" in score.error
    assert score.failed


@pytest.mark.parametrize("classes", [0, 1, 100])
def test_the_plot_accepts_any_number_of_classes(tmp_path: Path, classes: int) -> None:
    """None, one, a hundred; infinite distances and empty cells are left out."""
    inf, nan = float("inf"), float("nan")
    found = [Agreement(0.5, 0.4, 3, 1, 2), Agreement(0, 0, inf, 0, 1), Agreement(nan, nan, nan, 0, 0)]
    scores = [Score(f"s{n}", f"class {c}", one) for c in range(classes) for n, one in enumerate(found)]
    write_boxes(tmp_path / "metrics.png", [*scores, Score("x", "", None, "no label")])
    with Image.open(tmp_path / "metrics.png") as picture:
        assert picture.size[0] == 100 * min(6 + 0.25 * classes, 40)


def test_an_evaluation_without_written_labels_is_refused(tmp_path: Path, forks: Server) -> None:
    """Before the run."""
    place(tmp_path, "a")
    job = forks.start("data.inputs=in", LABELS, "stitch.products=[entropy]", *JOB, cwd=tmp_path)
    assert checked(job.wait()) == 2
    assert "is compared with labels; add them to stitch.products=['entropy']" in job.text
    assert not (tmp_path / "outputs").exists()


@pytest.mark.filterwarnings("ignore:monai.metrics:FutureWarning")
def test_the_brain_of_colin27_is_segmented_as_well_as_published(tmp_path: Path, forks: Server) -> None:
    """The example network at 2 mm against the brain mask that comes with the image, on the image's 1 mm grid."""
    (tmp_path / "table.csv").write_text(f"subject,t1,label\ncolin,{fetch('colin27_t1')},{fetch('colin27_brain')}\n")
    grid = ("preprocess.spacing=2", "data.patch_size=96", "data.patch_overlap=48", "trainer=cpu", "output_dir=out")
    labels = f"data.labels={tmp_path}/{{subject}}_brain.nii.gz"
    brain = np.asarray(read(fetch("colin27_brain")) > 0).astype(np.uint8)
    save(tmp_path / "colin_brain.nii.gz", brain, nib.load(fetch("colin27_brain")).affine)
    job = forks.start("experiment=brain_extraction", "data.inputs=table.csv", labels, *grid, cwd=tmp_path)
    assert checked(job.wait(300)) == 0, job.text
    (row,) = metrics(tmp_path / "out")
    assert row["class"] == "brain"
    assert 0.935 <= float(row["dice"]) <= 0.96
    assert 0.2 < float(row["surface_dice"]) < 0.3, "the network counts the fluid around the brain, mostly 2 mm of it"
    both = [torch.tensor(volume > 0)[None, None] for volume in (read(tmp_path / "out/colin_labels.nii.gz"), brain)]
    far = compute_hausdorff_distance(*both, include_background=True, percentile=95, spacing=1.0).item()
    assert float(row["hd95_mm"]) == pytest.approx(far, abs=1e-4)
    near = compute_surface_dice(*both, [1.0], include_background=True, spacing=1.0).item()
    assert float(row["surface_dice"]) == pytest.approx(near, abs=1e-5)
    assert 1000 < float(row["true_volume_ml"]) < float(row["volume_ml"]) < 2500


def test_labels_of_each_blend_are_evaluated_separately(tmp_path: Path, forks: Server) -> None:
    """Of stitch.compare too; of several outputs, the first's. Rows, table and picture tell them apart."""
    case = SubjectFiles("a", {"image": tmp_path / "none.nii"})
    for name, made in {"seg_labels": cube(1), "seg_labels_crop": cube(1, 1), "other_labels": cube(0, 1)}.items():
        save(tmp_path / f"a_{name}.nii", made)
    save(tmp_path / "truth/a.nii", cube(1))
    outputs = ("a_seg_labels.nii", "a_seg_labels_crop.nii", "a_other_labels.nii")
    evaluation = Evaluation(tmp_path, [case], str(tmp_path / "truth/{subject}.nii"), None, 1.0)
    scores = evaluation.scores([Row("a", "done", outputs)])
    assert [(score.product, score.agreement.dice) for score in scores if score.agreement] == [
        ("seg_labels", 1), ("seg_labels_crop", pytest.approx(2 / 3)),
    ]  # fmt: skip
    place(tmp_path / "job", "b")
    job = forks.start("data.inputs=in", LABELS, "stitch.compare=[crop,hann]", *JOB, cwd=tmp_path / "job")
    assert checked(job.wait()) == 0, job.text
    rows = metrics(tmp_path / "job/outputs")
    assert [(row["class"], row["product"]) for row in rows] == [
        ("1", "labels"), ("1", "labels_crop"), ("1", "labels_hann"),
    ]  # fmt: skip
    assert "labels_crop" in job.text
