"""Writes and reads statistics.csv, which has a row per subject, output and label, with what the label's voxels are."""

import contextlib
import csv
import io
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped

from voxquilt.errors import OutputError
from voxquilt.filesystem import replacing
from voxquilt.geometry.frame import Frame
from voxquilt.reporting.device_statistics import is_worthwhile
from voxquilt.reporting.label_intensities import PERCENTILES, Intensities
from voxquilt.reporting.label_statistics import LabelStatistics, label_statistics
from voxquilt.reporting.manifest import csv_line, unescaped
from voxquilt.text import reason_of

log = logging.getLogger("voxquilt")

Cells = Mapping[str, str]
"""A row of the table: texts by the names of columns."""

_AXES = ("i", "j", "k")
_WHERE = (
    *(f"centroid_{axis}_mm" for axis in "ras"),
    *(f"box_{axis}0" for axis in _AXES),
    *(f"box_{axis}1" for axis in _AXES),
)
_FIRST = ("subject", "output", "label", "name", "voxels", "ml", *_WHERE)
_LAST = ("components", "touches_border", "frame")


def statistics_rows(
    subject: str,
    output: str,
    labels: Shaped[np.ndarray, "c i j k"],
    frame: Frame,
    images: Mapping[str, Shaped[np.ndarray, "d i j k"]],
    names: Mapping[int, str],
    known: Sequence[int] = (),
    device: torch.device | None = None,
) -> list[Cells]:
    """The rows of one label file.

    Args:
        subject: Id of the subject.
        output: Name of the product, such as 'labels' or 'seg_labels'.
        labels: As the file holds them: one label per voxel, or a mask per channel, whose label is its number.
        frame: Their geometry.
        images: The images as they are stored. Columns of intensities begin with the image's name where there are
            several images, and with the channel's number where the image has several.
        names: Names by label.
        known: Labels that are listed even if no voxel has them.
        device: Where the network is: a GPU computes the numbers of large volumes, if it has memory for it.
    """
    channels = {
        "_".join([*[name] * (len(images) > 1), *[str(n)] * (len(image) > 1)]): channel
        for name, image in images.items()
        for n, channel in enumerate(image)
    }
    if len(labels) == 1:
        found = _statistics(labels[0], frame, channels, known, device)
    else:
        found = {
            n: next(iter(_statistics((mask > 0).view(np.uint8), frame, channels, [1], device).values()))
            for n, mask in enumerate(labels)
        }
    return [
        {"subject": subject, "output": output, "label": str(n), "name": names.get(n, ""), **_cells(values)}
        for n, values in found.items()
    ]


def name_in_logs(label: int, names: Mapping[int, str]) -> str:
    """The name of a label, or its number; both where another label is called the same."""
    name = names.get(label, str(label))
    is_shared = any(other != label and its == name for other, its in names.items())
    return f"{name} {label}" if is_shared else name


def _statistics(
    labels: np.ndarray,
    frame: Frame,
    images: Mapping[str, np.ndarray],
    known: Sequence[int],
    device: torch.device | None,
) -> dict[int, LabelStatistics]:
    if device is not None:
        try:
            if is_worthwhile(device, labels.size):
                return label_statistics(labels, frame, images, known, device)
        except Exception as error:  # memory that the network needed meanwhile, or a type that torch does not know
            _note(f"numbers of labels are computed on the host, not on {device}: {reason_of(error)}")
    return label_statistics(labels, frame, images, known)


@cache
def _note(message: str) -> None:
    """Log it once for all subjects."""
    log.debug(message)


def _cells(values: LabelStatistics) -> dict[str, str]:
    if values.centroid is None or values.box is None:
        return {"voxels": "0", "ml": "0"}
    where = [*(f"{round(mm, 4) + 0.0:.4f}" for mm in values.centroid), *map(str, values.box)]
    cells = {"voxels": str(values.voxels), "ml": f"{values.ml:.6f}", **dict(zip(_WHERE, where, strict=True))}
    for name, intensities in (values.intensities or {}).items():
        cells |= _intensity_cells(f"{name}_" if name else "", intensities)
    components = "" if values.components is None else str(values.components)
    return cells | {"components": components, "touches_border": str(int(values.touches_border))}


def _intensity_cells(prefix: str, values: Intensities) -> dict[str, str]:
    percentiles = {f"p{n}": value for n, value in zip(PERCENTILES, values.percentiles, strict=True)}
    numbers = {"mean": values.mean, "sd": values.sd, **percentiles}
    return {f"{prefix}{name}": f"{value:.7g}" for name, value in numbers.items()}


class StatisticsTable:
    """The table of one run, to which subjects are added as they are done. It appears with the first of them.

    Args:
        path: The file.
        kept: Rows of subjects that earlier runs have done.
    """

    def __init__(self, path: Path, kept: Iterable[Cells] = ()) -> None:
        self.path = path
        rows = list(kept)
        self._columns = _columns(rows)
        if rows or path.exists():
            _write(path, rows)

    def add(self, rows: Sequence[Cells]) -> None:
        """Append the rows of a subject, and flush them to disk.

        Raises:
            OutputError: the file cannot be written, such as on a full disk.
        """
        if not rows:
            return
        columns = _columns(rows, self._columns)
        if columns != self._columns or not self.path.exists():  # the first subject, or one with another image
            self._columns = columns
            _write(self.path, read_statistics(self.path), columns)
        try:
            with open(self.path, "a", encoding="utf-8", newline="") as file:
                file.write("".join(csv_line([row.get(name, "") for name in columns]) for row in rows))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path}: writing failed: {error.strerror}.") from error

    def close(self) -> None:
        """Leave the rows in the order of the subjects' ids, whatever order they were done in.

        Raises:
            OutputError: the file cannot be written.
        """
        if self.path.exists():
            write_statistics(self.path, read_statistics(self.path))


def read_statistics(path: Path) -> Iterator[Cells]:
    """The rows of a table; a last line without a newline, of a run that died, is left out. Nothing without a file."""
    text = ""
    with contextlib.suppress(OSError):
        text = unescaped(path.read_bytes().decode("utf-8", errors="replace"))
    for row in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")):
        if None not in row.values() and {"subject", "output", "label"} <= row.keys():
            yield {str(name): str(cell) for name, cell in row.items() if cell}


def write_statistics(path: Path, rows: Iterable[Cells]) -> None:
    """Write a table completely or not at all, in the order of the subjects' ids.

    Raises:
        OutputError: the file cannot be written.
    """
    _write(path, sorted(rows, key=lambda row: row["subject"]))


def _write(path: Path, rows: Iterable[Cells], columns: Collection[str] | None = None) -> None:
    rows = list(rows)
    names = _columns(rows) if columns is None else columns
    with replacing(path) as file:
        lines = [list(names), *([row.get(name, "") for name in names] for row in rows)]
        file.write("".join(map(csv_line, lines)).encode())


def _columns(rows: Iterable[Cells], before: Sequence[str] = ()) -> list[str]:
    """All columns of rows, intensities in the order in which they appear."""
    seen = dict.fromkeys(before)
    for row in rows:
        seen |= dict.fromkeys(row)
    middle = [name for name in seen if name not in (*_FIRST, *_LAST)]
    return [*_FIRST, *middle, *_LAST[:2], *(["frame"] if "frame" in seen else [])]
