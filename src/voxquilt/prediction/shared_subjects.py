"""Finishes the subjects that several processes share, in the same order in all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from voxquilt.data.subject_task import SubjectTask, SubjectWork
from voxquilt.distributed.process_group import Group
from voxquilt.distributed.slab_exchange import ElsewhereError, Parts, SlabExchange, first_error
from voxquilt.errors import RunError
from voxquilt.prediction.subject_outcomes import SubjectOutcomes
from voxquilt.prediction.subject_results import SubjectResults
from voxquilt.prediction.writer_thread import WriterThread
from voxquilt.reporting.manifest import Row
from voxquilt.stitching.subject_stitcher import SubjectStitcher
from voxquilt.text import reason_of


@dataclass(eq=False)
class _Share:
    """This process's part of a subject, once it is predicted or has failed."""

    task: SubjectTask
    work: SubjectWork | None = None
    stitcher: SubjectStitcher | None = None
    error: Exception | None = None


class SharedSubjects:
    """Finishes one process's parts of the subjects that several processes share.

    Args:
        group: The processes of the run.
        tasks: The shared subjects, in the order in which every process finishes them.
        thread: The thread in which they are finished.
        results: Writes a subject whose parts are complete.
        outcomes: Where results and failures are reported.
    """

    def __init__(
        self,
        group: Group,
        tasks: Sequence[SubjectTask],
        thread: WriterThread,
        results: SubjectResults,
        outcomes: SubjectOutcomes,
    ) -> None:
        self._group, self._thread, self._results, self._outcomes = group, thread, results, outcomes
        self._turns = list(tasks)
        # Parts that are ready before their turn, and subjects whose head is sent, by number.
        self._ready: dict[int, _Share] = {}
        self._heads: set[int] = set()

    def collects(self, task: SubjectTask) -> bool:
        """Whether this process puts the subject's volumes together and writes them."""
        return self._exchange(task).collects

    def predicted(self, work: SubjectWork, stitcher: SubjectStitcher) -> None:
        """Take a part of which all patches have come."""
        self._hand_over(_Share(work.task, work, stitcher))

    def failed(self, task: SubjectTask, error: Exception) -> bool:
        """Take note that this process cannot do its part.

        The process that collects reports the failure, after the messages of all parts.

        Returns:
            Whether it will be reported; False if the subject's turn has passed, so that the caller has to report it.
        """
        if task not in self._turns:
            return False
        self._hand_over(_Share(task, error=error))
        return True

    def send_head(self, task: SubjectTask, stitcher: SubjectStitcher) -> None:
        """Send the sums that the part before this one needs, once they are complete, often long before the end."""
        exchange = self._exchange(task)
        if not exchange.collects and task.number not in self._heads:
            head = stitcher.head()
            if head is not None:
                self._heads.add(task.number)
                exchange.send_head(head)

    def close(self) -> None:
        """Give up the subjects that are not ready, since other processes wait for a message on each of them."""
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
        """Send this process's part, or, in the process that collects, write the volume of all parts."""
        exchange, work, stitcher = self._exchange(share.task), share.work, share.stitcher
        rows: list[Row | None] = []
        try:
            # Messages are received even if they are no longer needed, so that each has a receiver.
            error = share.error if exchange.is_last else self._join(exchange, share)
            if not exchange.collects:
                self._send_part(exchange, stitcher, error)
                return
            error = first_error(error, partial(exchange.receive_planes, None if error else stitcher))
            if error is None and work is not None and stitcher is not None:
                error = first_error(None, lambda: rows.append(self._results.take(work, stitcher)))
        finally:
            if stitcher is not None:
                stitcher.close()
        for row in filter(None, rows):
            self._outcomes.done(row)
        # A subject that another process gave up because the run stops has not failed: the next run predicts it.
        given_up = self._outcomes.channel.stop and isinstance(error, ElsewhereError)
        if error is not None and not given_up and self._results.fail(share.task):
            self._outcomes.failed(share.task, error, work.seconds if work else 0.0)

    def _join(self, exchange: SlabExchange, share: _Share) -> Exception | None:
        """Add the head of the part that follows; returns the first error of this part."""

        def join() -> None:
            sums = exchange.receive_head()
            if share.stitcher is not None and share.error is None:
                share.stitcher.join(sums)

        try:
            return first_error(share.error, join)
        except RunError as error:
            # A process died; the others wait for this process's message nonetheless.
            if not exchange.collects:
                self._send_part(exchange, None, error)
            raise

    def _send_part(self, exchange: SlabExchange, stitcher: SubjectStitcher | None, error: Exception | None) -> None:
        """Send this process's part, or the reason why there is none."""
        head: list[Tensor] = []
        parts: Parts = []
        if error is None and stitcher is not None:
            try:
                head, parts = stitcher.head() or [], list(stitcher.parts())
            except Exception as error_of_part:
                error = error_of_part
        reason = "" if error is None else reason_of(error)
        try:
            if exchange.task.number not in self._heads:
                exchange.send_head(head, reason)
        finally:
            exchange.send_planes(parts, reason)

    def _exchange(self, task: SubjectTask) -> SlabExchange:
        return SlabExchange(self._group, task)
