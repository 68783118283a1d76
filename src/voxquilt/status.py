"""What has become of a run of several shards? Read from their manifests, before anything heavy is imported."""

import csv
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from voxquilt.cases import Case

DONE, NOT_DONE = 0, 1


def print_status(cases: Iterable[Case], plain: Mapping[str, Any]) -> int:
    """Say which shards and which subjects are missing; 0 if every subject is done, else 1.

    Args:
        cases: Every subject of the run.
        plain: The configuration; of interest are `output_dir` and `shard.count`.
    """
    folder, count = Path(plain["output_dir"]).expanduser(), plain["shard"]["count"]
    files = sorted(folder.glob("manifest*.csv"))
    rows = [row for file in files for row in _rows(file)]
    done = {row["subject"] for row in rows if row["status"] == "done"}
    failed = {row["subject"]: row["error"] for row in rows if row["status"] == "failed" and row["subject"] not in done}
    subjects = [case.subject for case in cases]
    missing = [subject for subject in subjects if subject not in done and subject not in failed]
    if count > 1:
        names = [re.fullmatch(rf"manifest_(\d+)_of_{count}\.csv", file.name) for file in files]
        begun = {int(name[1]) for name in names if name}
        absent = [index for index in range(count) if index not in begun]
        print(f"{len(begun)} of {count} shards have begun" + (f"; not {_some(absent)}" if absent else ""))
    print(f"{len(done & set(subjects))} of {len(subjects)} subjects done, {len(failed)} failed, {len(missing)} missing")
    for subject, error in failed.items():
        print(f"{subject}: failed: {error}")
    if missing:
        print(f"missing: {_some(missing)}")
    return DONE if done >= set(subjects) else NOT_DONE


def _rows(file: Path) -> list[dict[str, str]]:
    """The rows of a manifest, which may be growing: a line that is not whole yet is left out."""
    with open(file, newline="", encoding="utf-8") as lines:
        return [row for row in csv.DictReader(lines) if row.get("error") is not None]


def _some(names: list[Any]) -> str:
    return ", ".join(map(str, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
