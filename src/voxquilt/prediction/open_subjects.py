"""Feeds the outputs of batches to the stitchers of a process's subjects, and hands over complete subjects."""

import logging
from collections import Counter
from dataclasses import replace
from queue import SimpleQueue
from time import perf_counter
from typing import Any

import torch

from voxquilt.data.batch import PatchBatch, SubjectRows
from voxquilt.data.prefetch import LoadFailure
from voxquilt.data.subject_task import SubjectTask, SubjectWork
from voxquilt.distributed.slab_exchange import ElsewhereError
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.output_files import OutputFiles
from voxquilt.prediction.shared_subjects import SharedSubjects
from voxquilt.prediction.subject_outcomes import SubjectOutcomes
from voxquilt.prediction.subject_results import SubjectResults
from voxquilt.prediction.writer_thread import WriterThread
from voxquilt.reporting.progress_counts import ProcessCounts
from voxquilt.stitching.buffer_pool import BufferPool
from voxquilt.stitching.execution import execution_on
from voxquilt.stitching.output_rings import Memory
from voxquilt.stitching.subject_stitcher import Outputs, SubjectStitcher

log = logging.getLogger("voxquilt")


class OpenSubjects:
    """Feeds outputs to stitchers, one per subject, and hands over the subjects that are complete.

    Args:
        data: The subjects.
        files: Writes volumes.
        outcomes: Reports results and failures.
        device: Where the network is.
    """

    def __init__(
        self, data: GridDataModule, files: OutputFiles, outcomes: SubjectOutcomes, device: torch.device
    ) -> None:
        plan = data.plan
        self._data, self._files, self._outcomes = data, files, outcomes
        self._counts, self._device = ProcessCounts(plan.group.rank, device), device
        self._memory = Memory(None, BufferPool(), files.options.scratch)
        self._open: dict[SubjectWork, SubjectStitcher] = {}
        self._thread = WriterThread()
        shared = [task for task in data.tasks_by_model if task.team]
        self._results = SubjectResults(files, len(data.models))
        self._shared = SharedSubjects(plan.group, shared, self._thread, self._results, outcomes)
        # Filled by the threads that load subjects.
        self._failures: SimpleQueue[LoadFailure] = SimpleQueue()
        data.report_failures_to(self._failures.put)
        data.drop_when(self._results.is_dropped)
        self._since = perf_counter()

    def begin(self) -> None:
        """Prepare for the first batch."""
        execution_on(self._device)  # Triton is imported and tried while the first subject is read
        self._counts.restart()

    def begin_batch(self) -> None:
        """Note that a forward pass begins; its time counts for the subjects of its patches."""
        self._since = perf_counter()

    def take(self, outputs: Outputs | Exception, batch: PatchBatch) -> None:
        """Feed a batch's outputs, or its error, to its subjects; hand over those that are complete."""
        self._note_failures()
        self._thread.check()
        patches = Counter[str]()  # a batch may have several volumes of a series
        for rows in batch.rows:
            patches[rows.work.task.case.subject] += rows.stop - rows.start
        self._counts.count(patches, voxels=batch.data[:, 0].numel())
        forward = (perf_counter() - self._since) / len(batch.data)
        for rows in batch.rows:
            if not rows.work.failed:
                rows.work.seconds += (rows.stop - rows.start) * forward
                try:
                    if isinstance(outputs, Exception):
                        raise outputs
                    self._add_on_device_or_host(outputs, rows)
                except Exception as error:
                    self._fail(rows.work, error)
        news = self._counts.news()
        if news is not None:
            self._outcomes.channel.report(news)
        self._since = perf_counter()  # for a batch that failed and is predicted again subject by subject

    def free_device(self) -> bool:
        """Move sums to the host, or else images, since the device's memory is full; False if both are there already."""
        return self.to_host() or self._data.images_to_host()

    def to_host(self) -> bool:
        """Move all sums to the host, since the device's memory is too small; False if they are there already."""
        if self._memory.device is not None:
            return False
        device = torch.device("cpu")
        for stitcher in self._open.values():
            stitcher.to(device)
        self._memory = replace(self._memory, device=device, buffers=BufferPool())
        torch.cuda.empty_cache()
        log.warning("the device's memory is full: sums are kept on the host from here on.")
        return True

    def close(self) -> dict[str, Any]:
        """Finish complete subjects and drop the others; returns a summary for the record.

        Raises:
            Exception: the error of the writer thread, if it failed.
        """
        stop = self._outcomes.channel.stop
        for work in list(self._open):
            if work.task.team:
                self._fail(work, ElsewhereError(stop.reason if stop else "the run ended before all patches had come."))
        self._open.clear()
        self._note_failures()
        self._shared.close()
        self._thread.close()
        self._note_failures()
        return self._counts.summary()

    def _add_on_device_or_host(self, outputs: Outputs, rows: SubjectRows) -> None:
        try:
            self._add(outputs, rows)
        except torch.OutOfMemoryError:
            # If the device has no memory for the sums of a new subject, none of its patches are lost yet.
            stitcher = self._open.pop(rows.work, None)
            if stitcher is not None:
                stitcher.close()
            if rows.first > 0 or not self.to_host():
                raise
            self._add(outputs, rows)

    def _add(self, outputs: Outputs, rows: SubjectRows) -> None:
        work = rows.work
        stitcher, began = self._stitcher(work), perf_counter()
        stitcher.add({name: output[rows.start : rows.stop] for name, output in outputs.items()}, rows.numbers)
        work.seconds += perf_counter() - began
        if work.task.team:
            self._shared.send_head(work.task, stitcher)
        if stitcher.complete:
            del self._open[work]
            if work.task.team:
                self._shared.predicted(work, stitcher)
            else:
                self._thread.submit(lambda: self._finish(work, stitcher))

    def _stitcher(self, work: SubjectWork) -> SubjectStitcher:
        if work not in self._open:
            self._open[work] = SubjectStitcher(
                self._files.options.stitch_of(work.task.model),
                work,
                work.space,
                memory=self._memory,
                skipped=work.skipped,
                part=work.part,
                holds_all=not work.task.team or self._shared.collects(work.task),
                layout=self._data.models[work.task.model].layout,
            )
        return self._open[work]

    def _note_failures(self) -> None:
        while not self._failures.empty():
            failure = self._failures.get()
            self._report_failure(failure.task, failure.error, failure.seconds)

    def _fail(self, work: SubjectWork, error: Exception) -> None:
        work.failed = True
        stitcher = self._open.pop(work, None)
        if stitcher is not None:
            stitcher.close()
        self._report_failure(work.task, error, work.seconds)

    def _report_failure(self, task: SubjectTask, error: Exception, seconds: float) -> None:
        if not (task.team and self._shared.failed(task, error)) and self._results.fail(task):
            self._outcomes.failed(task, error, seconds)

    def _finish(self, work: SubjectWork, stitcher: SubjectStitcher) -> None:
        try:
            row = self._results.take(work, stitcher)
        except Exception as error:
            self._fail(work, error)
            return
        if row is not None:
            self._outcomes.done(row)
