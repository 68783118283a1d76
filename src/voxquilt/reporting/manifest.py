"""Writes and reads manifest.csv, which has one row per subject, written once the subject is done or has failed."""

import contextlib
import csv
import io
import json
import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from voxquilt.errors import OutputError
from voxquilt.filesystem import replacing
from voxquilt.text import escaped
from voxquilt.vocabulary import LABELS, MAP, PICTURE


@dataclass(frozen=True)
class Row:
    """A subject's row.

    Args:
        subject: The id.
        status: 'done', 'failed', or 'skipped' if an earlier run has done it.
        outputs: Names of files in the output folder.
        patches: Patches that were predicted.
        skipped: Patches that were left out since they have no foreground (data.skip).
        finished: Time in UTC.
        fingerprint: The settings' digest, a dash, and the input files' digest, which together determine the outputs.
        seconds: Time for loading, the subject's share of forward passes, stitching and writing, without waiting.
            Subjects are loaded and written in parallel, so that their sum is not the time of the run.
        error: Why the subject failed.
        volume_ml: Volume of all labels above 0 in millilitres; None without labels.
        kinds: The kinds of the outputs, in their order: 'labels', 'map', 'image' or 'picture'; left out, as in
            manifests of earlier versions, they follow from the names.
        inputs: The path of each image by its name, from which pictures and the viewer are made; {} where an earlier
            version wrote the row.
        class_ml: Volume of each label above 0 by its name or number; not in the manifest.
        statistics: Rows of the subject for statistics.csv; not in the manifest.
    """

    subject: str
    status: str
    outputs: tuple[str, ...] = ()
    patches: int = 0
    seconds: float = 0.0
    error: str = ""
    volume_ml: float | None = None
    skipped: int = 0
    finished: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    fingerprint: str = ""
    kinds: tuple[str, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    class_ml: Mapping[str, float] = field(default_factory=dict)
    statistics: Sequence[Mapping[str, str]] = ()

    def __post_init__(self) -> None:
        if len(self.kinds) != len(self.outputs):
            object.__setattr__(self, "kinds", tuple(map(_kind_by_name, self.outputs)))

    @property
    def label_files(self) -> list[str]:
        """Names of the outputs that hold labels."""
        return [name for name, kind in zip(self.outputs, self.kinds, strict=True) if kind == LABELS]


def of_shard(name: str, shard: tuple[int, int]) -> str:
    """The name of a shard's file, since all shards of a run share one folder.

    >>> of_shard("manifest.csv", (2, 4))
    'manifest_2_of_4.csv'
    """
    index, count = shard
    stem, suffix = name.rsplit(".", 1)
    return name if count == 1 else f"{stem}_{index}_of_{count}.{suffix}"


class Manifest:
    """The manifest of one run: a new file, to which any thread may append rows.

    Args:
        path: The file; an existing one is replaced.
        kept: The first rows, of subjects that earlier runs have done.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(self, path: Path, kept: Iterable[Row] = ()) -> None:
        kept = list(kept)
        self.path = path
        self._kept = {row.subject for row in kept}
        self._has_duplicates = False
        self._lock = threading.Lock()
        _write(path, kept)
        self._file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 (it is closed by `close`)

    def add(self, row: Row) -> None:
        """Append a row and flush it to disk; it replaces a row of `kept` with the same subject.

        Raises:
            OutputError: the file cannot be written, such as on a full disk.
        """
        with self._lock:
            try:
                self._file.write(csv_line(_cells(row)))
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                raise OutputError(f"{self.path}: writing failed: {error.strerror}.") from error
            self._has_duplicates |= row.subject in self._kept

    def close(self) -> None:
        """Close the file, and leave one row per subject.

        Raises:
            OutputError: the file cannot be written, such as on a full disk.
        """
        with contextlib.suppress(OSError):  # `add` has raised the error of a row that could not be written
            self._file.close()
        if self._has_duplicates:
            _write(self.path, read_rows([self.path]).values())


_HEADER = [field.name for field in fields(Row) if field.name not in ("class_ml", "statistics")]


def _write(path: Path, rows: Iterable[Row]) -> None:
    with replacing(path) as file:
        file.write("".join(map(csv_line, [_HEADER, *map(_cells, rows)])).encode())


def _cells(row: Row) -> list[Any]:
    values = asdict(row) | {
        "outputs": ";".join(row.outputs),
        "kinds": ";".join(row.kinds),
        "seconds": f"{row.seconds:.3f}",
        "error": " ".join(row.error.split()),
        "inputs": json.dumps(row.inputs, ensure_ascii=False) if row.inputs else "",  # a path may hold any separator
        "volume_ml": "" if row.volume_ml is None else f"{row.volume_ml:.3f}",
    }
    return [values[name] for name in _HEADER]


def csv_line(cells: list[Any]) -> str:
    """A line of a .csv."""
    text = io.StringIO()
    csv.writer(text).writerow(cells)
    return escaped(text.getvalue())


def read_rows(manifests: Iterable[Path]) -> dict[str, Row]:
    """The latest row of each subject in some manifests.

    A manifest may be growing, or its run may have died: incomplete lines are left out, as is a last line without a
    newline, since its fingerprint may be incomplete. Columns that older versions of voxquilt did not write are empty.
    """
    latest: dict[str, Row] = {}
    for path in sorted(path for path in manifests if path.is_file()):
        text = unescaped(path.read_bytes().decode("utf-8", errors="replace"))
        for cells in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")):
            row = _row(cells)
            if row is not None and (row.subject not in latest or latest[row.subject].finished <= row.finished):
                latest[row.subject] = row
    return latest


def unescaped(text: str) -> str:
    """Text with the file names of the operating system."""
    return re.sub(r"\\(udc[89a-f][0-9a-f])", lambda match: chr(int(match[1][1:], 16)), text)


def _row(cells: Mapping[str, str | None]) -> Row | None:
    try:
        values = {name: value for name in _HEADER if (value := cells.get(name, "")) is not None}
        volume = values["volume_ml"]
        outputs, kinds = (tuple(filter(None, values[name].split(";"))) for name in ("outputs", "kinds"))
        return Row(
            values["subject"],
            values["status"],
            outputs,
            int(values["patches"]),
            float(values["seconds"]),
            values["error"],
            float(volume) if volume else None,
            int(values["skipped"] or 0),
            values["finished"],
            values["fingerprint"],
            kinds,
            _inputs(values["inputs"]),
        )
    except (KeyError, ValueError):
        return None


def _inputs(text: str) -> dict[str, str]:
    inputs = json.loads(text or "{}")
    if not isinstance(inputs, dict):
        raise ValueError("inputs are a JSON object of paths by name")
    return {str(name): str(path) for name, path in inputs.items()}


def _kind_by_name(output: str) -> str:
    """The kind of an output whose name is all that is known."""
    if output.endswith(".png"):
        return PICTURE
    return LABELS if re.search(r"_labels(_[a-z]+)?\.nii(\.gz)?$", output) else MAP
