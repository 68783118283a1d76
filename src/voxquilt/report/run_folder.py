"""Reads what runs have left in an output folder: manifests, records, statistics and metrics."""

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from voxquilt.errors import InputError
from voxquilt.filesystem import read_json
from voxquilt.reporting.manifest import Row, read_rows, unescaped


@dataclass(frozen=True)
class ClassVolume:
    """A row of statistics.csv, as far as the report needs it.

    Args:
        name: The class.
        ml: Its volume; 0 where the subject does not have it.
        touches_border: Whether it reaches the first or last voxel of an axis; None where that is not known.
    """

    name: str
    ml: float
    touches_border: bool | None


@dataclass(frozen=True)
class RunFolder:
    """The records in an output folder, which may be those of several shards or of runs one after the other.

    Args:
        path: The folder.
        rows: The latest row of each subject.
        volumes: The classes of each subject's first labels, by subject; None without statistics.csv.
        metrics: By subject, the mean over classes of each metric; empty without metrics.csv.
        class_metrics: By class, the values of each metric in all subjects.
        not_compared: By subject, why it was not compared with true labels.
        records: The contents of run.json, the latest last; one for each shard.
    """

    path: Path
    rows: dict[str, Row]
    volumes: dict[str, list[ClassVolume]] | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    class_metrics: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    not_compared: dict[str, str] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def record(self) -> dict[str, Any]:
        """The latest record; empty without one."""
        return self.records[-1] if self.records else {}

    @property
    def configuration(self) -> dict[str, Any]:
        """The configuration of the latest run."""
        return self.record.get("configuration", {})

    @cached_property
    def class_names(self) -> list[str]:
        """The classes, in the order of statistics.csv."""
        return list(dict.fromkeys(c.name for classes in (self.volumes or {}).values() for c in classes))


METRICS = {"dice": "Dice", "surface_dice": "surface Dice", "hd95_mm": "HD95 [mm]"}
"""Columns of metrics.csv that the report shows, with their headings."""


# Of run.json, what the pages need.
_TEXTS = ("status", "reason", "began", "ended", "host")
_NUMBERS = ("processes", "missing", "seconds", "patches_per_second", "voxels_per_second")
_MAPPINGS = ("configuration", "versions")


def read_run(folder: Path) -> RunFolder:
    """Read the records in an output folder.

    Raises:
        InputError: it has no manifest.
    """
    manifests = sorted(filter(Path.is_file, folder.glob("manifest*.csv")))
    if not manifests:
        raise InputError(f"{folder} has no manifest.csv: it is not the output_dir of a run of predict.py.")
    rows = read_rows(manifests)
    statistics = _by_age(folder.glob("statistics*.csv"))
    records = [record for path in _by_age(folder.glob("run*.json")) if (record := _sound(read_json(path)))]
    means, classes, not_compared = _read_metrics(_by_age(folder.glob("metrics*.csv")), rows)
    volumes = _read_volumes(statistics, rows) if statistics else None
    return RunFolder(folder, rows, volumes, means, classes, not_compared, records)


def _sound(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the pages need of a run.json, without entries that another program, or a hand, wrote as something else."""
    found: dict[str, Any] = {}
    for names, kind in ((_TEXTS, str), (_NUMBERS, int | float), (_MAPPINGS, dict)):
        found |= {name: value for name in names if isinstance(value := record.get(name), kind)}
    return {name: value for name, value in found.items() if name not in _NUMBERS or abs(value) < 1e18}  # not NaN either


def _by_age(paths: Iterable[Path]) -> list[Path]:
    """Paths of files, the oldest first, so that later ones replace what they say."""
    return sorted(filter(Path.is_file, paths), key=lambda path: (path.stat().st_mtime_ns, path.name))


def _read_volumes(paths: Iterable[Path], rows: Mapping[str, Row]) -> dict[str, list[ClassVolume]]:
    """The classes of each subject's first output of labels, from the latest file that has the subject."""
    volumes: dict[str, list[ClassVolume]] = {}
    for path in paths:
        of_file: dict[str, list[ClassVolume]] = {}
        outputs: dict[str, str] = {}
        for cells in _read_csv(path):
            subject, ml = cells.get("subject", ""), _number(cells.get("ml"))
            output = outputs.setdefault(subject, cells.get("output", ""))
            if subject in rows and ml is not None and cells.get("output", "") == output:
                touches = cells.get("touches_border") or ""
                name = cells.get("name") or cells.get("label") or "?"
                of_file.setdefault(subject, []).append(ClassVolume(name, ml, touches == "1" if touches else None))
        volumes |= {subject: _of_series(entries) for subject, entries in of_file.items()}
    return volumes


def _of_series(entries: Iterable[ClassVolume]) -> list[ClassVolume]:
    """One entry per class: of a series of volumes the mean, as the manifest has it."""
    by_class: dict[str, list[ClassVolume]] = {}
    for entry in entries:
        by_class.setdefault(entry.name, []).append(entry)
    return [
        found[0]
        if len(found) == 1
        else ClassVolume(name, sum(entry.ml for entry in found) / len(found), any(e.touches_border for e in found))
        for name, found in by_class.items()
    ]


def _read_metrics(
    paths: Iterable[Path], rows: Mapping[str, Row]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, list[float]]], dict[str, str]]:
    """Means by subject, values by class, and why subjects were not compared; of the first labels of each subject."""
    latest: dict[str, list[dict[str, str]]] = {}
    for path in paths:
        of_file: dict[str, list[dict[str, str]]] = {}
        for cells in _read_csv(path):
            of_file.setdefault(cells.get("subject", ""), []).append(cells)
        latest |= of_file
    means: dict[str, dict[str, float]] = {}
    by_class: dict[str, dict[str, list[float]]] = {}
    not_compared: dict[str, str] = {}
    for subject, lines in latest.items():
        if subject not in rows:
            continue
        if error := next((cells["error"] for cells in lines if cells.get("error")), ""):
            not_compared[subject] = error
            continue
        first = lines[0].get("product")
        found: dict[str, list[float]] = {metric: [] for metric in METRICS}
        for cells in [cells for cells in lines if cells.get("product") == first]:
            for metric in METRICS:
                value = _number(cells.get(metric))
                if value is not None:
                    found[metric].append(value)
                    by_class.setdefault(cells.get("class", ""), {}).setdefault(metric, []).append(value)
        means[subject] = {metric: sum(values) / len(values) for metric, values in found.items() if values}
    return means, by_class, not_compared


def _read_csv(path: Path) -> Iterator[dict[str, str]]:
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for cells in csv.DictReader(map(unescaped, file)):
            yield {name: value for name, value in cells.items() if isinstance(name, str) and isinstance(value, str)}


def _number(text: str | None) -> float | None:
    """A number, which may be infinite; None for an empty cell or anything else."""
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return None if math.isnan(value) else value
