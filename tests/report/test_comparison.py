"""Tests the page that shows runs side by side: Dice as others compute it, and what changed most on top."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from run_folders import CONFIGURATION, ball, done, write_run
from synthetic import save
from torchmetrics.functional.classification import multiclass_f1_score

from voxquilt.errors import InputError
from voxquilt.report.agreement import dice_by_class, dice_of_files
from voxquilt.report.command import main
from voxquilt.report.comparison import compare_runs
from voxquilt.report.run_folder import RunFolder, read_run
from voxquilt.reporting.manifest import Row

LABELS = arrays(np.uint8, (1, 3, 4, 2), elements=st.integers(0, 4))


@given(LABELS, LABELS)
def test_dice_is_what_torchmetrics_computes(a: np.ndarray, b: np.ndarray) -> None:
    """Of each class that either volume has, and of no other; order does not matter."""
    found = dice_by_class(a, b)
    assert found.keys() == {*np.unique(a).tolist(), *np.unique(b).tolist()} - {0}
    expected = multiclass_f1_score(
        torch.from_numpy(a.ravel()).long(), torch.from_numpy(b.ravel()).long(), 5, average="none"
    )
    for number, dice in found.items():
        assert dice == pytest.approx(float(expected[number]), abs=1e-6)
    assert dice_by_class(b, a) == found


def test_masks_are_compared_by_channel_and_grids_must_be_the_same(tmp_path: Path) -> None:
    """Channels count from 0, as their names do; another affine or shape is an error that names the files."""
    masks = np.zeros((4, 4, 4, 3), np.uint8)
    masks[:2, ..., 0], masks[..., 1] = 1, 1
    other = masks.copy()
    other[:1, ..., 0] = 0
    for name, volume in (("a", masks), ("b", other)):
        save(tmp_path / f"{name}.nii.gz", volume)
    assert dice_of_files(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz") == pytest.approx({0: 2 / 3, 1: 1.0})
    save(tmp_path / "moved.nii.gz", masks, np.diag([1, 1, 2.0, 1]))
    save(tmp_path / "short.nii.gz", masks[:3])
    for name in ("moved", "short"):
        with pytest.raises(InputError, match=f"a.nii.gz and .*{name}.nii.gz lie on different grids"):
            dice_of_files(tmp_path / "a.nii.gz", tmp_path / f"{name}.nii.gz")


def test_the_labels_of_a_series_count_together_over_its_volumes(tmp_path: Path) -> None:
    """By class, as in a volume, where channels of a file are volumes (data.time=volumes)."""
    record = {"configuration": CONFIGURATION | {"data": {"time": "volumes"}}}
    for run, stop in (("1", 4), ("2", 2)):
        series = np.zeros((4, 4, 4, 3), np.uint8)
        series[:stop, ..., 0], series[..., 1] = 1, 2
        save(tmp_path / run / "s_labels.nii.gz", series)
        write_run(tmp_path / run, [done("s")], record=record)
    (pair,) = compare_runs([read_run(tmp_path / run) for run in "12"])
    assert pair.dice == pytest.approx({1: 2 / 3, 2: 1.0})


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs: one subject the same, two that changed, one that failed, one in each alone."""
    first = [ball(tmp_path / "1", name, 6) for name in ("same", "less", "much", "broken")] + [done("only first")]
    other = [ball(tmp_path / "2", name, radius) for name, radius in (("same", 6), ("less", 5.5), ("much", 3))]
    other += [Row("broken", "failed", error="truncated"), done("only other")]
    changed: dict[str, Any] = CONFIGURATION | {"data": {"patch_size": 48, "patch_overlap": 0}}
    record = {"configuration": changed, "versions": {"torch": "3"}}
    write_run(tmp_path / "1/out", first, record={"versions": {"torch": "2"}})
    return tmp_path / "1/out", write_run(tmp_path / "2/out", other, record=record)


def test_what_changed_most_is_on_top_behind_what_cannot_be_compared(runs: tuple[Path, Path]) -> None:
    """Each with its reason."""
    pairs = compare_runs([read_run(folder) for folder in runs])
    assert [pair.subject for pair in pairs] == ["broken", "only first", "only other", "much", "less", "same"]
    assert [pair.problem for pair in pairs[:3]] == ["failed in out", "not in out", "not in out"]
    assert pairs[-1].dice == {1: 1.0}
    assert 0 < pairs[3].mean < pairs[4].mean < 1


def test_the_page_shows_settings_dice_and_volumes(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """By the command, into the file that was named."""
    main([*map(str, runs), "-o", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text("utf-8")
    assert re.search(r"data\.patch_size.*\n?.*32.*48", text)
    assert "Settings that differ: 1<" in text
    assert "Versions that differ: 1<" in text
    assert re.search(r"<code>torch</code>.*2.*3", text)
    assert re.search(r'class="number">1\.0000<', text)
    assert "ball" in text
    assert len(re.findall("<tr id=", text)) == 6


def test_three_runs_are_each_compared_with_the_first(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """A row for each subject and run."""
    third = write_run(tmp_path / "3/out", [ball(tmp_path / "3", "same", 6)])
    pairs = compare_runs([read_run(folder) for folder in (*runs, third)])
    assert sorted((pair.run, pair.subject) for pair in pairs if not pair.problem) == [
        (1, "less"), (1, "much"), (1, "same"), (2, "same"),
    ]  # fmt: skip


def test_runs_without_a_common_subject_are_not_compared() -> None:
    """It is an error, not an empty page."""
    runs = [RunFolder(Path(name), {name: done(name)}) for name in "ab"]
    with pytest.raises(InputError, match="no subject in common"):
        compare_runs(runs)
