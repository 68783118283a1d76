"""Writes the records of a run: the manifest, row by row, and run.json."""

import logging
import os
import platform
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from voxquilt.distributed.control_channel import Message, Stop
from voxquilt.filesystem import read_json, write_json
from voxquilt.prediction.resume import finished, known_settings
from voxquilt.prediction.run_plan import RunPlan
from voxquilt.prediction.run_statistics import RunStatistics
from voxquilt.reporting.manifest import Manifest, Row, of_shard, read_rows

log = logging.getLogger("voxquilt")

_PACKAGES = ("voxquilt", "torch", "lightning", "hydra-core", "nibabel", "monai", "numpy")

_AGAIN = "is to be made again, and was not yet."


class RunRecord:
    """Writes the manifest and run.json of a run, on rank 0.

    Args:
        folder: Output folder, made if it is missing.
        plan: The plan of the run.
        shard: (index, count), for the files' names.
        configuration: Configuration of the run.
        statistics: Whether statistics.csv is written.

    Raises:
        OutputError: they cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        plan: RunPlan,
        shard: tuple[int, int],
        configuration: Mapping[str, Any],
        *,
        statistics: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = list(plan.done)
        """Rows of this run's subjects."""
        self.outcome: dict[str, Any] = {}
        """The content that `close` wrote to run.json."""
        self._plan = plan
        self._began = perf_counter()
        self._path = folder / of_shard("run.json", shard)
        path = folder / of_shard("manifest.csv", shard)
        ours = {*plan.subjects, *(row.subject for row in plan.done)}
        # Rows of other subjects are kept, so that a run of one subject does not drop the others.
        complete, others = finished(folder, [path]), read_rows([path])
        others = [
            row for name, row in others.items() if name not in ours and (row.status == "failed" or name in complete)
        ]
        # If this run ends before it has made a subject again, no row of another manifest may count it as done: the
        # latest row decides.
        done = finished(folder, {*folder.glob("manifest*.csv")} - {path}).keys()
        again = [Row(subject, "failed", error=_AGAIN) for subject in plan.subjects if subject in done]
        # The files that subjects had are kept too.
        earlier = read_rows(folder.glob("manifest*.csv"))
        before = {name: list(row.outputs) for name, row in earlier.items()} | read_json(self._path).get("replaces", {})
        self._before: dict[str, list[str]] = {name: before[name] for name in plan.subjects if before.get(name)}
        self._content: dict[str, Any] = {
            "status": "running",
            "exit_status": None,
            "reason": "",
            "began": _now(),
            "configuration": dict(configuration),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
            "settings": known_settings(folder) | dict(plan.settings),
            "processes": plan.group.size,
            "host": socket.gethostname(),
            "subjects": len(ours),
            "replaces": self._before,
        }
        write_json(self._path, self._content)
        self.statistics = RunStatistics(folder, plan, shard, enabled=statistics)
        """Numbers of the labels of each subject."""
        self._manifest = Manifest(path, [*others, *again, *self.rows])

    def add(self, row: Row) -> None:
        """Add the row of a subject that is done or has failed.

        Raises:
            OutputError: the manifest cannot be written.
        """
        if row.status == "done":
            self.statistics.add(row)  # before the subject counts as done
        self._manifest.add(row)
        self.rows.append(replace(row, statistics=()))
        if row.status == "done":
            self._remove_stale({*self._before.get(row.subject, ())} - {*row.outputs})
        if row.status == "failed":
            log.error("%s: failed: %s", row.subject, row.error)
        else:
            log.info("%s: done: %d patches, %.1f s: %s", row.subject, row.patches, row.seconds, ", ".join(row.outputs))

    def _remove_stale(self, names: Iterable[str]) -> None:
        """Remove files of a subject's earlier run, which would seem to belong to those made now."""
        for path in [self._path.parent / name for name in names if name == Path(name).name]:
            # Not Path.resolve, for which a link to itself is an error.
            inputs = {os.path.realpath(image) for case in self._plan.cases for image in case.images.values()}
            if os.path.realpath(path) not in inputs:
                path.unlink(missing_ok=True)

    def close(self, summaries: Sequence[Message], stop: Stop | None) -> int:
        """Write how the run ended.

        Args:
            summaries: Summaries of the processes that ended normally.
            stop: Why the run ended early, if it did.

        Returns:
            The exit status.
        """
        if stop is None:
            # For example after trainer.limit_predict_batches: without a row, subjects would not seem to be of this run.
            known = {row.subject for row in self.rows}
            for subject in [subject for subject in self._plan.subjects if subject not in known]:
                self.add(Row(subject, "failed", error="the run ended before all of its patches had come."))
        self._manifest.close()
        self.statistics.close()
        rows = self.rows
        done = {row.subject for row in rows if row.status == "done"}
        failed = sum(row.status == "failed" for row in rows)
        status = stop.status if stop else int(failed > 0)
        seconds = max((summary.get("seconds", 0.0) for summary in summaries), default=0.0)
        patches, voxels = (sum(summary.get(key, 0) for summary in summaries) for key in ("patches", "voxels"))
        self.outcome = self._content | {
            "status": "stopped" if stop else "finished",
            "exit_status": status,
            "reason": stop.reason if stop else "",
            "ended": _now(),
            "done": sum(row.status == "done" for row in rows),
            "skipped": sum(row.status == "skipped" for row in rows),
            "failed": failed,
            "missing": self._content["subjects"] - len(rows),
            "patches": sum(row.patches for row in rows if row.status == "done"),
            "patches_skipped": sum(row.skipped for row in rows if row.status == "done"),
            "seconds": round(perf_counter() - self._began, 3),
            "patches_per_second": _rate(patches, seconds),
            "voxels_per_second": _rate(voxels, seconds),
            "ranks": list(summaries),
            "replaces": {name: self._before[name] for name in self._before if name not in done},
        }
        write_json(self._path, self.outcome)
        return status


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if seconds else 0.0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
