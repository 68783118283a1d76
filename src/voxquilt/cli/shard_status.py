"""Prints which shards and subjects of a run are missing, from their manifests, before anything heavy is imported."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from voxquilt.cli.exit_status import DONE, FAILED
from voxquilt.data.discovery import SubjectFiles
from voxquilt.prediction.resume import finished
from voxquilt.reporting.manifest import read_rows


def print_status(cases: Iterable[SubjectFiles], folder: Path, shards: int) -> int:
    """Print which shards and which subjects are missing; 0 if every subject is done, else 1.

    Args:
        cases: Every subject of the run.
        folder: Folder of its outputs; a subject whose files are gone is not done.
        shards: Number of shards.
    """
    subjects = [case.subject for case in cases]
    done = finished(folder).keys() & set(subjects)
    rows = read_rows(folder.glob("manifest*.csv"))
    failed = {name: row.error for name, row in rows.items() if row.status == "failed" and name in set(subjects) - done}
    missing = [subject for subject in subjects if subject not in done and subject not in failed]
    if shards > 1:
        names = [re.fullmatch(rf"manifest_(\d+)_of_{shards}\.csv", file.name) for file in folder.glob("manifest*.csv")]
        begun = {int(name[1]) for name in names if name}
        absent = [index for index in range(shards) if index not in begun]
        print(f"{len(begun)} of {shards} shards have begun" + (f"; not {_shorten(absent)}" if absent else ""))
    print(f"{len(done)} of {len(subjects)} subjects done, {len(failed)} failed, {len(missing)} missing")
    for subject, error in failed.items():
        print(f"{subject}: failed: {error}")
    if missing:
        print(f"missing: {_shorten(missing)}")
    return DONE if len(done) == len(subjects) else FAILED


def _shorten(names: list[Any]) -> str:
    """The first 20 names, and how many more there are."""
    return ", ".join(map(str, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
