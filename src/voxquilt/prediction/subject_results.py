"""Writes a subject once every model has predicted it."""

from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from time import perf_counter

import torch

from voxquilt.data.subject_task import SubjectTask, SubjectWork
from voxquilt.prediction.label_volumes import label_volumes
from voxquilt.prediction.output_files import OutputFiles
from voxquilt.prediction.series_results import SeriesResults
from voxquilt.reporting.manifest import Row
from voxquilt.reporting.statistics_table import Cells
from voxquilt.stitching.combination import MeanProbabilities, OrderedLabels
from voxquilt.stitching.finished_volume import FinishedVolume
from voxquilt.stitching.subject_stitcher import SubjectStitcher


class SubjectResults:
    """Keeps what the models have made of each subject until the last of them is done.

    Args:
        files: Writes volumes.
        models: Number of models.
    """

    def __init__(self, files: OutputFiles, models: int) -> None:
        self._files, self._models = files, models
        self._begun: dict[str, tuple[OrderedLabels | MeanProbabilities, Row]] = {}
        self._series: dict[str, SeriesResults] = {}
        self._failed: set[str] = set()

    def take(self, work: SubjectWork, stitcher: SubjectStitcher) -> Row | None:
        """Take what a model has made of a subject, or of a volume of a series; the subject's row once it is written.

        Raises:
            Exception: the volumes cannot be made, combined or written.
        """
        began, task = perf_counter(), work.task
        made = stitcher.finished()
        if task.case.subject in self._failed:
            return None
        volumes, counts = self._combined(work, made)
        counts = replace(
            counts,
            patches=counts.patches + len(work.grid) - len(work.skipped),
            skipped=counts.skipped + len(work.skipped),
            seconds=counts.seconds + work.seconds,
        )
        if volumes is None:
            counts = replace(counts, seconds=counts.seconds + perf_counter() - began)
            self._begun[task.case.subject] = self._begun[task.case.subject][0], counts
            return None
        if task.volumes == 1:
            row = self._write(work, volumes)
        else:
            series = self._series.setdefault(
                task.case.subject, SeriesResults(task.volumes, self._files.options.scratch)
            )
            statistics = self._files.statistics(work, volumes)
            series.add(work, volumes, replace(counts, seconds=counts.seconds + perf_counter() - began), statistics)
            if not series.is_complete:
                return None
            began, counts, work = perf_counter(), series.row, series.work or work
            volumes, statistics = series.finish()
            del self._series[task.case.subject]
            row = self._write(work, volumes, statistics)
        seconds = counts.seconds + perf_counter() - began
        return replace(row, patches=counts.patches, skipped=counts.skipped, seconds=seconds)

    def _write(
        self, work: SubjectWork, volumes: dict[str, FinishedVolume], statistics: list[Cells] | None = None
    ) -> Row:
        """The row of a subject once its files are written. The row's numbers are computed meanwhile, those for
        statistics.csv unless they are given."""
        files = self._files

        @torch.inference_mode()
        def numbers() -> tuple[tuple[float | None, dict[str, float]], list[Cells]]:
            rows = files.statistics(work, volumes) if statistics is None else statistics
            return label_volumes(volumes, files.options.stitch, work.space.native, rows), rows

        with ThreadPoolExecutor(1, thread_name_prefix="voxquilt-statistics") as pool:
            computed = pool.submit(numbers)
            if not all(image.is_in_memory for image in work.images.values()):
                wait([computed])  # so that the same image is not read twice at a time
            row = files.write(work, volumes)
            (total, of_classes), rows = computed.result()
        return replace(row, volume_ml=total, class_ml=of_classes, statistics=tuple(rows))

    def _combined(
        self, work: SubjectWork, made: dict[str, FinishedVolume]
    ) -> tuple[dict[str, FinishedVolume] | None, Row]:
        """The volumes of all models, None before the last of them, and the counts of those before this one."""
        combination, subject = self._files.options.combination, work.task.case.subject
        if combination is None:
            return made, Row(subject, "done")
        if work.task.model == 0:
            self._begun[subject] = combination.begin(), Row(subject, "done")
        combined, counts = self._begun.pop(subject)
        combined.add(work.task.model, {name: volume.array for name, volume in made.items()})
        if work.task.model + 1 == self._models:
            return combined.finish(), counts
        self._begun[subject] = combined, counts
        return None, counts

    def fail(self, task: SubjectTask) -> bool:
        """Drop a subject; whether it had not failed before, so that it has to be reported."""
        subject = task.case.subject
        is_new = subject not in self._failed
        if self._models * task.volumes > 1:
            self._failed.add(subject)
            self._begun.pop(subject, None)
            self._series.pop(subject, None)
        return is_new

    def is_dropped(self, task: SubjectTask) -> bool:
        """Whether a model need not predict a subject, since an earlier one, or one of its volumes, has failed."""
        # Of a subject that several processes share, each of them waits for messages of the others.
        return task.case.subject in self._failed and not task.team
