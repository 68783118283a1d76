"""Where does a run stand? Its open subjects, the thread that finishes them, and what became of the others."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from threading import BoundedSemaphore
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from voxquilt.data.batch import PatchBatch, SubjectRows
from voxquilt.data.subject_task import SubjectTask, SubjectWork
from voxquilt.distributed.control_channel import ControlChannel, Stop
from voxquilt.distributed.slab_exchange import ElsewhereError, Parts, SlabExchange, first_error
from voxquilt.errors import RunError
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.output_files import Files
from voxquilt.reporting.manifest import Row
from voxquilt.reporting.progress_counts import ProcessCounts
from voxquilt.stitching.buffer_pool import BufferPool
from voxquilt.stitching.output_rings import Memory
from voxquilt.stitching.output_volumes import Scratch
from voxquilt.stitching.stitch import Stitch
from voxquilt.stitching.subject_stitcher import Outputs, SubjectStitcher
from voxquilt.text import reason_of

log = logging.getLogger("voxquilt")


@dataclass(eq=False)
class _Shared:
    """A subject that several processes share, once this one has done its part or has failed."""

    task: SubjectTask
    work: SubjectWork | None = None
    quilt: SubjectStitcher | None = None
    error: Exception | None = None


class OpenSubjects:
    """One process's side of a predict run.

    Args:
        data: Its subjects.
        stitch: How patches become volumes.
        files: Where volumes go.
        scratch: Where products go that are too large for memory.
        line: To the other processes; takes rows and requests to stop.
        raise_first: End the run at the first subject that fails.
        device: Where the network is.
    """

    def __init__(
        self,
        data: GridDataModule,
        stitch: Stitch,
        files: Files,
        scratch: Scratch,
        line: ControlChannel,
        *,
        raise_first: bool,
        device: torch.device,
    ) -> None:
        self.line = line
        self._data, self._stitch, self._files, self._scratch = data, stitch, files, scratch
        self._raise_first = raise_first
        self._meter = ProcessCounts(data.plan.group.rank, device)
        self._buffers = BufferPool()
        self._device: torch.device | None = None
        self._open: dict[SubjectWork, SubjectStitcher] = {}
        # Shared subjects in the order in which every process finishes them, and those that are ready before their turn.
        self._turns = [task for task in data.plan.tasks if task.team]
        self._ready: dict[int, _Shared] = {}
        self._heads: set[int] = set()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="voxquilt-writer")
        # One subject being written and one waiting; the loop waits for the thread beyond that, so memory is bounded.
        self._room = BoundedSemaphore(2)
        self._pending: list[Future[None]] = []
        self._since = perf_counter()

    def begin(self) -> None:
        """The first batch comes next."""
        self._meter.restart()

    def begin_batch(self) -> None:
        """A forward pass begins: what it takes is the subjects' whose patches are in it."""
        self._since = perf_counter()

    def take(self, outputs: Any, batch: PatchBatch) -> None:
        """Feed a batch's outputs to its subjects; hand over those that are complete."""
        self._drain()
        self._meter.count(batch.data, {run.work.task.case.subject: run.stop - run.start for run in batch.runs})
        forward = (perf_counter() - self._since) / len(batch.data)
        for run in batch.runs:
            if not run.work.failed:
                run.work.seconds += (run.stop - run.start) * forward
                try:
                    self._add_somewhere(batch.named(outputs), run)
                except Exception as error:
                    self._fail(run.work, error)
        news = self._meter.news()
        if news is not None:
            self.line.report({"news": news})
        self._since = perf_counter()  # where a batch that failed is predicted again subject by subject

    def to_host(self) -> bool:
        """Move all sums to the host, where the device's memory was too small; False if they were there."""
        if self._device is not None:
            return False
        self._device = torch.device("cpu")
        for quilt in self._open.values():
            quilt.to(self._device)
        self._buffers = BufferPool()
        torch.cuda.empty_cache()
        log.warning("the device's memory is full: sums are kept on the host from here on.")
        return True

    def close(self) -> dict[str, Any]:
        """Finish what is complete, and drop what is not; a summary for the record.

        Raises:
            Exception: what ended the writer thread, if anything did.
        """
        stop = self.line.stop
        for work in list(self._open):
            if work.task.team:
                self._fail(work, ElsewhereError(stop.reason if stop else "the run ended before all patches had come."))
        self._open.clear()
        self._note_failures()
        # The others of a team wait for a word on each subject, also on those that were not begun.
        for task in self._turns:
            self._ready.setdefault(task.number, _Shared(task, error=ElsewhereError("the run ended early.")))
        self._submit()
        self._pool.shutdown(wait=True)
        self._drain()
        return self._meter.summary()

    def _add_somewhere(self, outputs: Outputs, run: SubjectRows) -> None:
        try:
            self._add(outputs, run)
        except torch.OutOfMemoryError:
            # Where the sums of a subject that begins find no room on the device, nothing of it is lost yet.
            quilt = self._open.pop(run.work, None)
            if quilt is not None:
                quilt.close()
            if run.first > 0 or not self.to_host():
                raise
            self._add(outputs, run)

    def _add(self, outputs: Outputs, run: SubjectRows) -> None:
        work = run.work
        if work not in self._open:
            self._open[work] = SubjectStitcher(
                self._stitch,
                work,
                work.space,
                memory=Memory(self._device, self._buffers, self._scratch),
                skipped=work.skipped,
                part=work.part,
                whole=not work.task.team or self._team(work.task).collects,
                layout=self._data.layout,
            )
        quilt, began = self._open[work], perf_counter()
        quilt.add({name: output[run.start : run.stop] for name, output in outputs.items()}, run.numbers)
        work.seconds += perf_counter() - began
        if work.task.team:
            self._send_head(work.task, quilt)
        if quilt.complete:
            del self._open[work]
            if work.task.team:
                self._ready[work.task.number] = _Shared(work.task, work, quilt)
                self._submit()
            else:
                self._room.acquire()
                self._pending.append(self._pool.submit(self._finish, work, quilt))

    def _submit(self) -> None:
        """Hand shared subjects to the writer thread when it is their turn."""
        while self._turns and self._turns[0].number in self._ready:
            shared = self._ready.pop(self._turns.pop(0).number)
            self._room.acquire()
            self._pending.append(self._pool.submit(self._finish_shared, shared))

    def _drain(self) -> None:
        """Note what failed to load, and raise what ended the writer thread."""
        self._note_failures()
        for future in [f for f in self._pending if f.done()]:
            self._pending.remove(future)
            future.result()

    def _note_failures(self) -> None:
        for failure in self._data.failures():
            self._record(failure.task, failure.error, failure.seconds)

    def _fail(self, work: SubjectWork, error: Exception) -> None:
        work.failed = True
        quilt = self._open.pop(work, None)
        if quilt is not None:
            quilt.close()
        self._record(work.task, error, work.seconds)

    def _record(self, task: SubjectTask, error: Exception, seconds: float) -> None:
        """A subject that failed here: a row, or, where others have a part in it, first their word."""
        if task.team and task in self._turns:
            self._ready[task.number] = _Shared(task, error=error)
            self._submit()
            return
        reason = reason_of(error)
        self.line.report(asdict(Row(task.case.subject, "failed", seconds=seconds, error=reason)))
        if self._raise_first:
            self.line.ask_stop(Stop(f"{task.case.subject}: {reason} (run.on_error=raise stops here.)", 1))

    def _finish(self, work: SubjectWork, quilt: SubjectStitcher) -> None:
        try:
            with torch.inference_mode():
                row = self._written(work, quilt)
        except Exception as error:
            self._fail(work, error)
            return
        finally:
            self._room.release()
        self.line.report(asdict(row))

    def _written(self, work: SubjectWork, quilt: SubjectStitcher) -> Row:
        began = perf_counter()
        row = self._files.write(work, quilt.volumes(), quilt.kinds)
        return replace(row, seconds=work.seconds + perf_counter() - began)

    def _finish_shared(self, shared: _Shared) -> None:
        """Put this process's part beside those of the others; the one that collects writes the volume."""
        team, work, quilt, error = self._team(shared.task), shared.work, shared.quilt, shared.error
        rows: list[Row] = []
        try:
            with torch.inference_mode():
                # Messages are taken also where they are of no use any more, so that every one finds its receiver.
                if not team.is_last:
                    error = self._joined(team, quilt, error)
                if not team.collects:
                    self._answer(team, quilt, error)
                    return
                error = first_error(error, partial(team.receive_planes, None if error else quilt))
                if error is None and work is not None and quilt is not None:
                    error = first_error(None, lambda: rows.append(self._written(work, quilt)))
        finally:
            self._room.release()
            if quilt is not None:
                quilt.close()
        for row in rows:
            self.line.report(asdict(row))
        # What another process dropped because the run stops is not a failure: it is done next time.
        if error is not None and not (self.line.stop and isinstance(error, ElsewhereError)):
            self._record(shared.task, error, work.seconds if work else 0.0)

    def _joined(self, team: SlabExchange, quilt: SubjectStitcher | None, error: Exception | None) -> Exception | None:
        def join() -> None:
            sums = team.receive_head()
            if quilt is not None and error is None:
                quilt.join(sums)

        try:
            return first_error(error, join)
        except RunError as died:
            # Those who live wait for this process's word nonetheless.
            if not team.collects:
                self._answer(team, None, died)
            raise

    def _answer(self, team: SlabExchange, quilt: SubjectStitcher | None, error: Exception | None) -> None:
        head: list[Tensor] = []
        parts: Parts = []
        if error is None and quilt is not None:
            try:
                head, parts = quilt.head() or [], list(quilt.parts())
            except Exception as own:
                error = own
        reason = "" if error is None else reason_of(error)
        try:
            if team.task.number not in self._heads:
                team.send_head(head, reason)
        finally:
            team.send_planes(parts, reason)

    def _send_head(self, task: SubjectTask, quilt: SubjectStitcher) -> None:
        team = self._team(task)
        if not team.collects and task.number not in self._heads:
            head = quilt.head()
            if head is not None:
                self._heads.add(task.number)
                team.send_head(head)

    def _team(self, task: SubjectTask) -> SlabExchange:
        return SlabExchange(self._data.plan.group, task)
