"""Finds subjects on which an earlier run failed that was to write one of their files, such as a stage of a cascade."""

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from voxquilt.data.discovery import SubjectFiles
from voxquilt.reporting.manifest import Row, read_rows


def failures_before(cases: Sequence[SubjectFiles], masks: Collection[str] = ()) -> dict[str, str]:
    """Why subjects cannot be predicted, by id: the run that was to write one of their files failed on them.

    A file that is there nevertheless is of an earlier run, with other settings or of another image, unless it is newer
    than the failure: then somebody has made it since.

    Args:
        cases: The subjects.
        masks: Patterns of further files, with `{subject}`.
    """
    wanted = {case.subject: list(_files_of(case, masks)) for case in cases}
    counts = Counter(folder for files in wanted.values() for folder in {file.parent for file in files})
    # A run writes all of its subjects into one folder. Others, of which there may be one per subject, are not listed.
    shared = [folder for folder, count in counts.items() if count > 1 or len(cases) == 1]
    failed = {folder: _failed_in(folder) for folder in shared}
    return {
        subject: _reason(file, row)
        for subject, files in wanted.items()
        for file in reversed(files)  # the first that failed is what is left
        if (row := failed.get(file.parent, {}).get(subject)) is not None
        and file.name.startswith(f"{subject}_")
        and not _is_input(file, row)
        and not _is_newer(file, row)
    }


def _files_of(case: SubjectFiles, masks: Collection[str]) -> Iterator[Path]:
    yield from case.images.values()
    yield from (Path(mask.replace("{subject}", case.subject)).expanduser() for mask in masks)


def _failed_in(folder: Path) -> dict[str, Row]:
    try:
        rows = read_rows(folder.glob("manifest*.csv"))
    except OSError:  # what cannot be read is reported with the files in there
        return {}
    return {subject: row for subject, row in rows.items() if row.status == "failed"}


def _is_input(file: Path, row: Row) -> bool:
    """Whether the run was to read a file, which lies where it writes others."""
    return os.path.realpath(file) in map(os.path.realpath, row.inputs.values())


def _is_newer(file: Path, row: Row) -> bool:
    try:
        return datetime.fromtimestamp(file.stat().st_mtime, UTC) > datetime.fromisoformat(row.finished)
    except (OSError, ValueError, TypeError):
        return False


def _reason(file: Path, row: Row) -> str:
    there = " The file that is there is older." if file.exists() else ""
    return f"the run in {file.parent}, which was to write {file.name}, failed on it: {row.error}{there}"
