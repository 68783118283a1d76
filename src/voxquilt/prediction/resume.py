"""Determines which subjects of a run are done already: by earlier runs with the same inputs and settings."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from voxquilt.data.discovery import SubjectFiles
from voxquilt.errors import ConfigError
from voxquilt.filesystem import read_json
from voxquilt.prediction.fingerprint import digest, inputs, settings
from voxquilt.reporting.manifest import Row, read_rows
from voxquilt.text import of_subjects


@dataclass(frozen=True)
class Todo:
    """Which subjects are done.

    Args:
        fingerprints: Fingerprints of all subjects, in their order.
        done: Rows of the subjects that were done before, by id.
    """

    fingerprints: list[str]
    done: dict[str, Row] = field(default_factory=dict)


@dataclass(frozen=True)
class Resume:
    """Compares the subjects of a run with those that its output folder has.

    Args:
        folder: The output folder.
        plain: The run's configuration.
        skip_done: Whether to skip subjects that were done with the same fingerprint; False predicts all again.
        overwrite: Whether to redo subjects that were done with another fingerprint, instead of refusing.
        content: Whether to compare input files by their contents.
        claim: Called before anything is read, for example to lock the folder; its errors end the run.
    """

    folder: Path
    plain: Mapping[str, Any]
    skip_done: bool = True
    overwrite: bool = False
    content: bool = False
    claim: Callable[[], object] | None = None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """See `voxquilt.prediction.fingerprint.settings`; reads the weights."""
        return settings(self.plain, content=self.content)

    @cached_property
    def settings_digest(self) -> str:
        """The digest of the settings."""
        return digest(self.settings)

    def todo(self, cases: Sequence[SubjectFiles]) -> Todo:
        """Determine which subjects are done, from the manifests in the folder and the files that exist.

        Raises:
            ConfigError: subjects were done with other settings or inputs, and may not be overwritten.
        """
        if self.claim is not None:
            self.claim()
        data = self.plain.get("data") or {}
        files = inputs(cases, (data.get("skip"), data.get("within")), content=self.content)
        fingerprints = [f"{self.settings_digest}-{file}" for file in files]
        if not self.skip_done:
            return Todo(fingerprints)
        rows = finished(self.folder)
        same: dict[str, Row] = {}
        other: list[tuple[Row, str]] = []
        for case, fingerprint in zip(cases, fingerprints, strict=True):
            row = rows.get(case.subject)
            if row is not None and row.fingerprint == fingerprint:
                same[case.subject] = replace(row, status="skipped")
            elif row is not None:
                other.append((row, fingerprint))
        if other and not self.overwrite:
            raise ConfigError(self._refusal(other))
        return Todo(fingerprints, same)

    def _refusal(self, other: list[tuple[Row, str]]) -> str:
        lines: dict[str, list[str]] = {}
        for row, fingerprint in other:
            for change in self._changes(row.fingerprint, fingerprint):
                lines.setdefault(change, []).append(row.subject)
        lines_of_changes = "".join(
            f"\n  {change} ({of_subjects(len(names))}: {', '.join(names[:3])}{', ...' * (len(names) > 3)})"
            for change, names in list(lines.items())[:20]
        )
        return (
            f"{self.folder} has outputs of {of_subjects(len(other))} that were made otherwise:{lines_of_changes}\n"
            f"  Set run.overwrite=true to make these again, or choose another output_dir. Nothing was started."
        )

    def _changes(self, was: str, now: str) -> list[str]:
        if not was:
            return ["by a run that left no fingerprint"]
        changes = ["its input files changed"] if was.partition("-")[2] != now.partition("-")[2] else []
        if was.partition("-")[0] == self.settings_digest:
            return changes
        before = self._earlier_settings.get(was.partition("-")[0])
        if before is None:
            return [*changes, "with settings that are no longer on record"]
        keys = [key for key in {**before, **self.settings} if before.get(key) != self.settings.get(key)]
        if "run.content_hash" in keys:
            changes = []  # then the digests of files cannot be compared
        settings_changes = [_describe_change(key, before.get(key), self.settings.get(key)) for key in keys]
        return [*changes, *dict.fromkeys(settings_changes)]  # several weights count as one change

    @cached_property
    def _earlier_settings(self) -> dict[str, dict[str, Any]]:
        """Settings of earlier runs by their digest."""
        return known_settings(self.folder)


def _describe_change(key: str, before: Any, now: Any) -> str:
    if key.startswith("weights."):
        return "ckpt_path has other weights"
    return f"{key} was {json.dumps(before)} and is {json.dumps(now)}"


def finished(folder: Path, manifests: Iterable[Path] | None = None) -> dict[str, Row]:
    """Rows of subjects that are done and whose files are all there, by id.

    Args:
        folder: Output folder of a run.
        manifests: The manifests to read; None for all in the folder.
    """
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        existing = {entry.name for entry in entries}
    rows = read_rows(folder.glob("manifest*.csv") if manifests is None else manifests)
    return {
        subject: row
        for subject, row in rows.items()
        if row.status in ("done", "skipped") and row.outputs and existing.issuperset(row.outputs)
    }


def known_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """Settings by their digest, from the records of runs in a folder."""
    known: dict[str, dict[str, Any]] = {}
    for path in folder.glob("run*.json"):
        settings_of_run = read_json(path).get("settings")
        known |= settings_of_run if isinstance(settings_of_run, dict) else {}
    return known
