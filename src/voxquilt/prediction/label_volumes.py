"""Says how large the labels of a subject are: for its row of the manifest, and for loggers."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

from voxquilt.geometry.frame import Frame
from voxquilt.reporting.statistics_table import Cells, name_in_logs
from voxquilt.stitching.finished_volume import FinishedVolume
from voxquilt.stitching.label_values import count_labels
from voxquilt.stitching.stitch import Stitch
from voxquilt.vocabulary import LABELS


def label_volumes(
    volumes: Mapping[str, FinishedVolume], stitch: Stitch, frame: Frame, statistics: Sequence[Cells]
) -> tuple[float | None, dict[str, float]]:
    """The ml of all labels, None without labels, and those of each by its name; of a series the means.

    Args:
        volumes: By product; the first of labels counts.
        stitch: Has the labels' names.
        frame: The volumes' geometry.
        statistics: Rows of statistics.csv of these volumes, in which voxels may have been counted.
    """
    series = series_of_labels(volumes)
    if not series:
        return None, {}
    ml = abs(float(np.linalg.det(frame.affine[:3, :3]))) / 1000 / len(series)  # of sheared voxels too
    product = next(name for name, volume in volumes.items() if volume.kind == LABELS)
    before = _counted_before(statistics, product)
    # Several labels per voxel are counted again, since the voxels that have any of them are not the sum. So are all
    # where numbers of a volume could not be made.
    is_known = len(series[0]) == 1 and len(before) == len(series)
    counted = before if is_known else [count_labels(volume) for volume in series]
    counts = sum((Counter(counts) for _, counts in counted), Counter[int]())
    names = stitch.names_of(len(series[0]))
    # Several labels per voxel are channels, counted from 0.
    of_classes = {name_in_logs(n, names): counts[n] * ml for n in sorted({n for _, own in counted for n in own})}
    return sum(voxels for voxels, _ in counted) * ml, of_classes


def series_of_labels(volumes: Mapping[str, FinishedVolume]) -> list[Shaped[np.ndarray, "c i j k"]]:
    """The first product of labels as a list of one, or of the volumes of a series."""
    labels = next((volume.array for volume in volumes.values() if volume.kind == LABELS), None)
    return [] if labels is None else list(np.moveaxis(labels, 1, 0)) if labels.ndim == 5 else [labels]


def _counted_before(statistics: Sequence[Cells], product: str) -> list[tuple[int, dict[int, int]]]:
    """What `count_labels` gives, of each volume that has rows."""
    frames: dict[str, dict[int, int]] = {}
    for cells in statistics:
        if cells["output"] == product:
            frames.setdefault(cells.get("frame", ""), {})[int(cells["label"])] = int(cells["voxels"])
    present = [{label: voxels for label, voxels in counts.items() if voxels} for counts in frames.values()]
    return [(sum(counts.values()), counts) for counts in present]
