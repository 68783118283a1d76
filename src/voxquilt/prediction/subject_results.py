"""Writes a subject once every model has predicted it."""

from dataclasses import replace
from time import perf_counter

from voxquilt.data.subject_task import SubjectTask, SubjectWork
from voxquilt.prediction.output_files import OutputFiles
from voxquilt.reporting.manifest import Row
from voxquilt.stitching.combination import MeanProbabilities, OrderedLabels
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
        self._failed: set[str] = set()

    def take(self, work: SubjectWork, stitcher: SubjectStitcher) -> Row | None:
        """Take what a model has made of a subject; the subject's row once it is written.

        Raises:
            Exception: the volumes cannot be made, combined or written.
        """
        began, subject = perf_counter(), work.task.case.subject
        volumes = stitcher.finished()
        combination = self._files.options.combination
        if combination is None:
            row = self._files.write(work, volumes)
            return replace(row, seconds=work.seconds + perf_counter() - began)
        if subject in self._failed:
            return None
        if work.task.model == 0:
            self._begun[subject] = combination.begin(), Row(subject, "done")
        combined, sofar = self._begun.pop(subject)
        combined.add(work.task.model, {name: volume.array for name, volume in volumes.items()})
        sofar = replace(
            sofar,
            patches=sofar.patches + len(work.grid) - len(work.skipped),
            skipped=sofar.skipped + len(work.skipped),
            seconds=sofar.seconds + work.seconds + perf_counter() - began,
        )
        if work.task.model + 1 < self._models:
            self._begun[subject] = combined, sofar
            return None
        row = self._files.write(work, combined.finish())
        seconds = sofar.seconds + perf_counter() - began
        return replace(row, patches=sofar.patches, skipped=sofar.skipped, seconds=seconds)

    def fail(self, task: SubjectTask) -> bool:
        """Drop a subject; whether it had not failed before, so that it has to be reported."""
        subject = task.case.subject
        is_new = subject not in self._failed
        if self._models > 1:
            self._failed.add(subject)
            self._begun.pop(subject, None)
        return is_new

    def is_dropped(self, task: SubjectTask) -> bool:
        """Whether a model need not predict a subject, since an earlier one failed on it."""
        # Of a subject that several processes share, each of them waits for messages of the others.
        return task.case.subject in self._failed and not task.team
