"""Makes output folders as runs leave them, without running anything, and serves them."""

import csv
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from synthetic import save

from voxquilt.report.server import ReportServer
from voxquilt.reporting.manifest import Manifest, Row

CONFIGURATION: dict[str, Any] = {
    "data": {"patch_size": 32, "patch_overlap": 0},
    "stitch": {"class_names": ["background", "ball"], "label_values": None},
    "run": {"log": "plain"},
}


def write_run(
    folder: Path,
    rows: Sequence[Row],
    *,
    statistics: Sequence[Mapping[str, Any]] | None = None,
    metrics: Sequence[Mapping[str, Any]] | None = None,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Write manifest.csv, run.json and, where they are given, statistics.csv and metrics.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    Manifest(folder / "manifest.csv", rows).close()
    content = {"status": "finished", "ended": "2026-01-01T12:00:00", "configuration": CONFIGURATION} | dict(
        record or {}
    )
    (folder / "run.json").write_text(json.dumps(content))
    for name, lines in (("statistics.csv", statistics), ("metrics.csv", metrics)):
        if lines is not None:
            with open(folder / name, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)))
                writer.writeheader()
                writer.writerows(lines)
    return folder


def line(subject: str, name: str, ml: float, *, touches: bool = False, output: str = "labels") -> dict[str, Any]:
    """A row of statistics.csv."""
    voxels = round(ml * 1000)
    cells = {"subject": subject, "output": output, "label": 1, "name": name, "voxels": voxels, "ml": ml}
    return cells | {"components": 1 if ml else 0, "touches_border": int(touches)}


def done(subject: str, ml: float | None = None, **more: Any) -> Row:
    """The row of a subject that is done."""
    return Row(subject, "done", (f"{subject}_labels.nii.gz",), 4, 1.5, volume_ml=ml, kinds=("labels",), **more)


def ball(
    folder: Path, subject: str, radius: float, shape: tuple[int, int, int] = (24, 20, 16), affine: Any = None
) -> Row:
    """An image of a ball and its label file; the row of the subject."""
    places = np.indices(shape).astype(float) - np.array(shape).reshape(3, 1, 1, 1) / 2
    inside = np.sqrt((places**2).sum(0)) < radius
    affine = np.eye(4) if affine is None else affine
    save(folder / "in" / f"{subject}.nii.gz", (50 * inside + 20).astype(np.int16), affine)
    save(folder / "out" / f"{subject}_labels.nii.gz", inside.astype(np.uint8), affine)
    ml = float(inside.sum()) * abs(np.linalg.det(affine[:3, :3])) / 1000
    return done(subject, ml, inputs={"image": str(folder / "in" / f"{subject}.nii.gz")})


@contextmanager
def served(folder: Path) -> Iterator[ReportServer]:
    """A running server of a report."""
    with ReportServer(folder) as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        yield server
        server.stop()
        thread.join()
