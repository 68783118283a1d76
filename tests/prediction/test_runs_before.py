"""Tests that a subject says which run before failed on it, where that run was to write one of its files."""

import os
import time
from pathlib import Path

import pytest

from voxquilt.data.subject_files import SubjectFiles
from voxquilt.prediction.runs_before import failures_before
from voxquilt.reporting.manifest import Manifest, Row

FAILED = Row("a", "failed", error="because")


def case(folder: Path, subject: str, name: str = "{}_labels.nii.gz") -> SubjectFiles:
    return SubjectFiles(subject, {"t1": Path("in") / f"{subject}.nii", "previous": folder / name.format(subject)})


def _touch(file: Path, seconds: float) -> None:
    """Write a file as if so many seconds from now."""
    file.touch()
    os.utime(file, (time.time() + seconds,) * 2)


def write(folder: Path, *rows: Row) -> Path:
    folder.mkdir(parents=True)
    Manifest(folder / "manifest.csv", rows).close()
    return folder


def test_the_reason_names_the_run_and_the_file(tmp_path: Path) -> None:
    """Of images and of masks; subjects that are done, or of which nothing is known, are left alone."""
    folder = write(tmp_path / "first", FAILED, Row("b", "done", ("b_labels.nii.gz",)))
    found = failures_before([case(folder, name) for name in "abc"])
    assert found == {"a": f"the run in {folder}, which was to write a_labels.nii.gz, failed on it: because"}
    cases = [case(tmp_path, name) for name in "abc"]
    assert failures_before(cases) == {}
    assert list(failures_before(cases, [f"{folder}/{{subject}}_labels.nii.gz"])) == ["a"]
    assert list(failures_before([case(folder, "a")])) == ["a"]


def test_a_file_of_before_the_failure_is_not_taken_and_a_later_one_is(tmp_path: Path) -> None:
    """The first is of another run; the second was made by somebody since."""
    (tmp_path / "first").mkdir()
    old = tmp_path / "first/a_labels.nii.gz"
    _touch(old, -10)
    Manifest(tmp_path / "first/manifest.csv", [Row("a", "failed", error="because")]).close()
    cases = [case(old.parent, name) for name in "ab"]
    assert failures_before(cases)["a"].endswith("failed on it: because The file that is there is older.")
    _touch(old, 10)
    assert failures_before(cases) == {}


@pytest.mark.parametrize("content", ["", "subject,status\na,failed\n", "\0\xff", "a;b;c\n1;2;3\n"])
def test_other_tables_of_that_name_say_nothing(tmp_path: Path, content: str) -> None:
    """Whoever wrote them."""
    (tmp_path / "manifest.csv").write_text(content, encoding="latin-1")
    assert failures_before([case(tmp_path, name) for name in "ab"]) == {}


def test_files_that_a_run_does_not_write_say_nothing_of_it(tmp_path: Path) -> None:
    """An image that lies in an output folder, and folders of one subject each."""
    folder = write(tmp_path / "first", FAILED)
    assert failures_before([case(folder, name, "{}.nii.gz") for name in "ab"]) == {}
    cases = [case(write(tmp_path / name, Row(name, "failed", error="x")), name) for name in "ab"]
    assert failures_before(cases) == {}


def test_a_run_that_writes_beside_its_images_may_be_tried_again(tmp_path: Path) -> None:
    """Its images are named as its files might be."""
    image = tmp_path / "a_0000.nii.gz"
    _touch(image, -10)
    Manifest(tmp_path / "manifest.csv", [Row("a", "failed", error="because", inputs={"t1": str(image)})]).close()
    cases = [SubjectFiles(name, {"t1": tmp_path / f"{name}_0000.nii.gz"}) for name in "ab"]
    assert failures_before(cases) == {}
    assert list(failures_before([case(tmp_path, name) for name in "ab"])) == ["a"]
