"""What became of each subject? A row of manifest.csv as soon as it is known, and run.json for the run as a whole."""

import csv
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from voxquilt.atomic import replacing


@dataclass(frozen=True)
class Row:
    """A subject's line.

    Args:
        subject: Its id.
        status: 'done' or 'failed'.
        outputs: Names of the files in the output folder.
        patches: How many were predicted.
        skipped: How many hold no foreground and were not (data.skip).
        seconds: From the start of loading to the last file.
        error: Why it failed.
        volume_ml: Volume of all labels above 0, in millilitres; None without labels.
    """

    subject: str
    status: str
    outputs: tuple[str, ...] = ()
    patches: int = 0
    seconds: float = 0.0
    error: str = ""
    volume_ml: float | None = None
    skipped: int = 0


def of_shard(name: str, shard: tuple[int, int]) -> str:
    """A file's name in a run of several shards, which share a folder.

    >>> of_shard("manifest.csv", (2, 4))
    'manifest_2_of_4.csv'
    """
    index, count = shard
    stem, suffix = name.rsplit(".", 1)
    return name if count == 1 else f"{stem}_{index}_of_{count}.{suffix}"


class Manifest:
    """manifest.csv of one run: a new file, to which each row is written as it comes; any thread may add one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self._lock = threading.Lock()
        self._write("w", [field.name for field in fields(Row)])

    def add(self, row: Row) -> None:
        """Append a row and put it on disk."""
        with self._lock:
            self.rows.append(row)
            values = asdict(row) | {
                "outputs": ";".join(row.outputs),
                "seconds": f"{row.seconds:.3f}",
                "error": " ".join(row.error.split()),
                "volume_ml": "" if row.volume_ml is None else f"{row.volume_ml:.3f}",
            }
            self._write("a", list(values.values()))

    @property
    def failed(self) -> list[Row]:
        """Rows of subjects that failed."""
        return [row for row in self.rows if row.status == "failed"]

    def _write(self, mode: str, values: list[Any]) -> None:
        with open(self.path, mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(values)
            file.flush()
            os.fsync(file.fileno())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n").encode())
