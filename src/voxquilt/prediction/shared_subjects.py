"""Finishes the subjects that several processes share, in the order that all of them keep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from voxquilt.data.subject_task import SubjectTask, SubjectWork
from voxquilt.distributed.process_group import Group
from voxquilt.distributed.slab_exchange import ElsewhereError, Parts, SlabExchange, first_error
from voxquilt.errors import RunError
from voxquilt.prediction.subject_outcomes import SubjectOutcomes
from voxquilt.prediction.writer_thread import WriterThread
from voxquilt.reporting.manifest import Row
from voxquilt.stitching.subject_stitcher import SubjectStitcher
from voxquilt.text import reason_of

Write = Callable[[SubjectWork, SubjectStitcher], Row]
"""Writes a subject's files and gives its row of the manifest."""


@dataclass(eq=False)
class _Share:
    """This process's part of a subject, once it is predicted or has failed."""

    task: SubjectTask
    work: SubjectWork | None = None
    stitcher: SubjectStitcher | None = None
    error: Exception | None = None


class SharedSubjects:
    """One process's parts of the subjects that several share.

    Args:
        group: The processes of the run.
        tasks: The shared subjects, in the order in which every process finishes them.
        thread: Where they are finished.
        write: Writes a subject whose parts are all there.
        outcomes: Where results and failures are reported.
    """

    def __init__(
        self, group: Group, tasks: Sequence[SubjectTask], thread: WriterThread, write: Write, outcomes: SubjectOutcomes
    ) -> None:
        self._group, self._thread, self._write, self._outcomes = group, thread, write, outcomes
        self._turns = list(tasks)
        # Those that are ready before their turn, and those whose head is sent, by number.
        self._ready: dict[int, _Share] = {}
        self._heads: set[int] = set()

    def collects(self, task: SubjectTask) -> bool:
        """Whether this process puts the subject's volumes together and writes them."""
        return self._exchange(task).collects

    def predicted(self, work: SubjectWork, stitcher: SubjectStitcher) -> None:
        """All patches of this process's part have come."""
        self._hand_over(_Share(work.task, work, stitcher))

    def failed(self, task: SubjectTask, error: Exception) -> bool:
        """This process cannot do its part. False if the subject's turn has passed: then it is this process's to report.

        The process that collects reports the failure, once it has heard of all parts.
        """
        if task not in self._turns:
            return False
        self._hand_over(_Share(task, error=error))
        return True

    def send_head(self, task: SubjectTask, stitcher: SubjectStitcher) -> None:
        """Send the part before this one what it needs, once that is complete; it can be long before the end."""
        exchange = self._exchange(task)
        if not exchange.collects and task.number not in self._heads:
            head = stitcher.head()
            if head is not None:
                self._heads.add(task.number)
                exchange.send_head(head)

    def close(self) -> None:
        """Give up what is not ready: the others wait for a word on each subject, also on those that were not begun."""
        for task in self._turns:
            self._ready.setdefault(task.number, _Share(task, error=ElsewhereError("the run ended early.")))
        self._submit()

    def _hand_over(self, share: _Share) -> None:
        self._ready[share.task.number] = share
        self._submit()

    def _submit(self) -> None:
        while self._turns and self._turns[0].number in self._ready:
            share = self._ready.pop(self._turns.pop(0).number)
            self._thread.submit(partial(self._finish, share))

    def _finish(self, share: _Share) -> None:
        """Put this process's part beside those of the others; the one that collects writes the volume."""
        exchange, work, stitcher = self._exchange(share.task), share.work, share.stitcher
        rows: list[Row] = []
        try:
            # Messages are taken also where they are of no use any more, so that every one finds its receiver.
            error = share.error if exchange.is_last else self._join(exchange, share)
            if not exchange.collects:
                self._answer(exchange, stitcher, error)
                return
            error = first_error(error, partial(exchange.receive_planes, None if error else stitcher))
            if error is None and work is not None and stitcher is not None:
                error = first_error(None, lambda: rows.append(self._write(work, stitcher)))
        finally:
            if stitcher is not None:
                stitcher.close()
        for row in rows:
            self._outcomes.done(row)
        # What another process dropped because the run stops is not a failure: it is done next time.
        if error is not None and not (self._outcomes.channel.stop and isinstance(error, ElsewhereError)):
            self._outcomes.failed(share.task, error, work.seconds if work else 0.0)

    def _join(self, exchange: SlabExchange, share: _Share) -> Exception | None:
        """Take in the head of the part that follows; the first error of this part."""

        def join() -> None:
            sums = exchange.receive_head()
            if share.stitcher is not None and share.error is None:
                share.stitcher.join(sums)

        try:
            return first_error(share.error, join)
        except RunError as died:
            # Those who live wait for this process's word nonetheless.
            if not exchange.collects:
                self._answer(exchange, None, died)
            raise

    def _answer(self, exchange: SlabExchange, stitcher: SubjectStitcher | None, error: Exception | None) -> None:
        """Send this process's part, or why there is none."""
        head: list[Tensor] = []
        parts: Parts = []
        if error is None and stitcher is not None:
            try:
                head, parts = stitcher.head() or [], list(stitcher.parts())
            except Exception as own:
                error = own
        reason = "" if error is None else reason_of(error)
        try:
            if exchange.task.number not in self._heads:
                exchange.send_head(head, reason)
        finally:
            exchange.send_planes(parts, reason)

    def _exchange(self, task: SubjectTask) -> SlabExchange:
        return SlabExchange(self._group, task)
