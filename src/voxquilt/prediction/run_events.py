"""Logs the numbers of subjects, and pictures of the first of them, to TensorBoard and to any loggers."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import psutil
from lightning.pytorch.loggers import Logger
from PIL import Image

from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.formats.image_file import open_image
from voxquilt.distributed.control_channel import Message
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.output_files import PICTURES, OutputOptions
from voxquilt.prediction.tensorboard import EventFile
from voxquilt.reporting.manifest import Row, of_shard
from voxquilt.reporting.overlay import flat, overlay
from voxquilt.reporting.run_logs import RunLog, loggable, logs_of
from voxquilt.reporting.statistics_table import name_in_logs
from voxquilt.text import reason_of
from voxquilt.vocabulary import VOLUMES

log = logging.getLogger("voxquilt")


class RunEvents:
    """Logs a run, on rank 0.

    Args:
        logs: What is logged to.
        folder: Output folder.
        cases: All subjects; a subject's step is its number among them.
        label_values: See `voxquilt.Stitch`.
        series: Whether 4-D files are series, of which the first volume is drawn.
        files: The run's tables, for logs that keep files.
    """

    def __init__(
        self,
        logs: Sequence[RunLog],
        folder: Path,
        cases: Sequence[SubjectFiles],
        label_values: Sequence[int] | None = None,
        *,
        series: bool = False,
        files: Sequence[Path] = (),
    ) -> None:
        self._logs, self._folder, self._label_values, self._series = logs, folder, label_values, series
        self._files = files
        self._cases = {case.subject: (n, case) for n, case in enumerate(cases)}
        self._pictures = PICTURES if any(run_log.takes_pictures for run_log in logs) else 0
        self.drawn: dict[str, np.ndarray] | None = {} if self._pictures else None
        """Pictures of subjects of this process, drawn while their images were at hand; others are drawn from files."""
        self._has_rows = False

    def row(self, row: Row) -> None:
        """Log a subject that is done or has failed."""
        if row.subject not in self._cases:
            return
        self._has_rows = True
        step, case = self._cases[row.subject]
        numbers = {"subject/failed": float(row.status == "failed"), "subject/seconds": row.seconds}
        if row.status == "done":
            numbers |= {"subject/patches_per_second": row.patches / row.seconds if row.seconds else 0.0}
            numbers |= {f"volume_ml/{name}": volume for name, volume in row.class_ml.items()}
        numbers["memory_mib/rank_0"] = psutil.Process().memory_info().rss / 2**20
        drawn = None if self.drawn is None else self.drawn.pop(row.subject, None)
        picture = self._picture(row, case, drawn) if self._pictures else None
        for run_log in self._logs:
            run_log.numbers(numbers | (_statistics(row) if run_log.takes_statistics else {}), step)
            if picture is not None and run_log.takes_pictures:
                run_log.picture(f"overlay/{row.subject}", picture, step)

    def end(self, outcome: Mapping[str, Any], summaries: Sequence[Message]) -> None:
        """Log how the run ended, unless there was nothing to do.

        Args:
            outcome: The content of run.json.
            summaries: Summaries of its processes.
        """
        if not self._has_rows:
            return
        names = ("patches_per_second", "voxels_per_second", "seconds", "done", "failed")
        numbers = {f"run/{name}": outcome[name] for name in names if name in outcome}
        for summary in summaries:
            if "peak_memory_mib" in summary:
                numbers[f"run/peak_memory_mib/rank_{summary['rank']}"] = summary["peak_memory_mib"]
        for run_log in self._logs:
            run_log.numbers(numbers, 0)
            run_log.end(self._files)

    def _picture(self, row: Row, case: SubjectFiles, drawn: np.ndarray | None) -> np.ndarray | None:
        if not row.label_files:
            return None
        output, name = f"{row.subject}_overlay.png", row.label_files[0]
        self._pictures -= 1
        try:
            if drawn is not None:
                return drawn
            if output in row.outputs:
                return np.asarray(Image.open(self._folder / output))
            file, label_file = open_image(next(iter(case.images.values()))), open_image(self._folder / name)
            labels = flat(label_file.read().numpy()[: 1 if self._series else None], self._label_values)
            return np.asarray(overlay(file.read()[0].numpy(), labels, file.frame.affine))
        except Exception as error:  # a missing picture is no reason for the run to fail
            log.debug("no picture of %s: %s", row.subject, reason_of(error))
            return None


def events_of(
    options: OutputOptions,
    data: GridDataModule,
    loggers: Iterable[Logger],
    configuration: Mapping[str, Any],
    shard: tuple[int, int],
) -> RunEvents:
    """The events of a run, to TensorBoard and to loggers of Lightning's, which get its settings now.

    Args:
        options: What is written, and where.
        data: The subjects.
        loggers: The trainer's.
        configuration: Configuration of the run.
        shard: (index, count), for the names of tables.
    """
    logs = logs_of(loggers)
    for lightning_log in logs:
        lightning_log.settings(loggable(configuration))
    return RunEvents(
        [*[EventFile(options.folder)] * options.tensorboard, *logs],
        options.folder,
        data.plan.cases,
        options.stitch.numbers,
        series=data.grids.time == VOLUMES,
        files=[options.folder / of_shard(name, shard) for name in ("manifest.csv", "statistics.csv", "run.json")],
    )


def _statistics(row: Row) -> dict[str, float]:
    """Numbers of each label, of those in statistics.csv the ones that may be followed from subject to subject.

    Those of a series are means over the volumes that have them.
    """
    several = len(row.label_files) > 1
    found: defaultdict[str, list[float]] = defaultdict(list)
    names: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for cells in row.statistics:
        if cells.get("name"):
            names[cells["output"]][int(cells["label"])] = cells["name"]
    for cells in row.statistics:
        prefix = [cells["output"]] if several else []
        name = name_in_logs(int(cells["label"]), names[cells["output"]])
        for column, cell in cells.items():
            is_followed = column in ("voxels", "components", "touches_border") or re.search(r"(^|_)(mean|sd)$", column)
            if is_followed and cell:  # too many components are not counted
                found["/".join(["statistics", column, *prefix, name])].append(float(cell))
    return {name: fmean(numbers) for name, numbers in found.items()}
