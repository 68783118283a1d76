"""Tests the volumes of labels: those that statistics.csv has counted are those of the voxels."""

from typing import Any

import numpy as np
import pytest

from voxquilt.geometry.frame import Frame
from voxquilt.prediction import label_volumes as module
from voxquilt.prediction.label_volumes import label_volumes
from voxquilt.reporting.statistics_table import Cells, statistics_rows
from voxquilt.stitching.finished_volume import FinishedVolume
from voxquilt.stitching.stitch import Stitch

FRAME = Frame((6, 5, 4), np.diag([1.5, 2, 1, 1]))
STITCH = Stitch(class_names=["ground", "grey", "white", "nothing"])


def volumes_of(*shape: int, seed: int = 0) -> dict[str, FinishedVolume]:
    """An entropy, labels, and other labels that do not count."""
    random = np.random.default_rng(seed)
    first, other = (random.choice([0, 1, 2, 9], (*shape, 6, 5, 4)).astype(np.uint8) for _ in range(2))
    entropy = FinishedVolume(np.ones((1, 6, 5, 4), np.float32), "map")
    return {"entropy": entropy, "labels": FinishedVolume(first, "labels", 4), "more": FinishedVolume(other, "labels")}


def rows_of(volumes: dict[str, FinishedVolume]) -> list[Cells]:
    """Rows as a run has them, those of a series with their frame."""
    rows: list[Cells] = []
    for name in ("labels", "more"):
        array = volumes[name].array
        for n in range(array.shape[1]) if array.ndim == 5 else [None]:
            one = array if n is None else array[:, n]
            frame = {} if n is None else {"frame": str(n)}
            rows += [{**row, **frame} for row in statistics_rows("a", name, one, FRAME, {}, {}, [1, 2, 3])]
    return rows


@pytest.mark.parametrize("shape", [(1,), (1, 3)])
def test_voxels_are_not_counted_again(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels without voxels are left out, those without names are there, other products are not counted."""
    volumes = volumes_of(*shape)
    wanted = label_volumes(volumes, STITCH, FRAME, [])
    total, of_classes = wanted
    assert list(of_classes) == ["grey", "white", "9"]
    labels = volumes["labels"].array
    assert total == pytest.approx(np.count_nonzero(labels) * 0.003 / (labels.size / 120))
    rows = rows_of(volumes)
    monkeypatch.delattr(module, "count_labels")
    assert label_volumes(volumes, STITCH, FRAME, rows) == wanted


@pytest.mark.parametrize("channels", [1, 3])
def test_labels_of_one_name_are_told_apart(channels: int) -> None:
    """No volume takes the place of another's; nor does that of a label without a name."""
    volumes, names = volumes_of(channels), ["ground", "9", "grey", "grey"]
    labels = volumes["labels"].array
    labels[0, 0, 0] = [3, 3, 9, 9]
    for class_names in (names, names[:3]):
        total, of_classes = label_volumes(volumes, Stitch(class_names=class_names), FRAME, [])
        of_labels = [labels == n for n in (1, 2, 3, 9)] if channels == 1 else labels > 0
        assert list(of_classes.values()) == pytest.approx([np.count_nonzero(mask) * 0.003 for mask in of_labels])
        if channels == 1:
            assert total == pytest.approx(sum(of_classes.values()))
            assert list(of_classes) == ["9", *(["grey 2", "grey 3"] if len(class_names) == 4 else ["grey", "3"]), "9 9"]


def without(rows: list[Cells], **cells: Any) -> list[Cells]:
    return [row for row in rows if any(row.get(name) != cell for name, cell in cells.items())]


def test_voxels_without_rows_are_counted() -> None:
    """Of volumes whose statistics failed, and where voxels have several labels, whose total is no sum."""
    series = volumes_of(1, 3)
    wanted = label_volumes(series, STITCH, FRAME, [])
    rows = rows_of(series)
    assert label_volumes(series, STITCH, FRAME, without(rows, output="labels", frame="1")) == wanted
    assert label_volumes(series, STITCH, FRAME, without(rows, output="labels")) == wanted
    masks = volumes_of(3)
    total, of_classes = label_volumes(masks, STITCH, FRAME, rows_of(masks))
    assert total == pytest.approx(np.count_nonzero(masks["labels"].array.any(0)) * 0.003)
    assert (total, of_classes) == label_volumes(masks, STITCH, FRAME, [])
    assert total < sum(of_classes.values())
    assert label_volumes({"entropy": masks["entropy"]}, STITCH, FRAME, []) == (None, {})
    nothing = {"labels": FinishedVolume(np.zeros((1, 6, 5, 4), np.uint8), "labels")}
    assert label_volumes(nothing, STITCH, FRAME, []) == (0, {})
