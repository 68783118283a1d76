"""Runs one process's side of a predict run, from its connection to the other processes to its record."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from voxquilt.distributed.control_channel import BROKEN, ControlChannel, LocalChannel, Message, Stop
from voxquilt.distributed.signals import Signals
from voxquilt.distributed.tcp_channel import Hub, Spoke
from voxquilt.errors import OutputError, RunError
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.open_subjects import OpenSubjects
from voxquilt.prediction.run_events import RunEvents
from voxquilt.prediction.run_record import RunRecord
from voxquilt.reporting.manifest import Row
from voxquilt.reporting.progress import ProgressDisplay
from voxquilt.reporting.progress_counts import RunProgress

log = logging.getLogger("voxquilt")

Report = Row | Message
"""A report during a run: a subject's row, or the progress of a process."""


@dataclass(frozen=True)
class RunDisplay:
    """Shows a run, on rank 0.

    Args:
        display: Bars or lines on the terminal.
        progress: Counts of what is done.
        events: Logs the run.
    """

    display: ProgressDisplay
    progress: RunProgress
    events: RunEvents

    def start(self) -> None:
        """Show that the run begins."""
        self.display.start(self.progress)

    def row(self, row: Row) -> None:
        """Show a subject that is done or has failed."""
        self.progress.row(row)
        self.display.row(row, self.progress)
        self.events.row(row)

    def news(self, message: Message) -> None:
        """Show the progress of a process."""
        self.progress.news(message)
        self.display.moved(self.progress)

    def end(self, status: int) -> None:
        """End the display."""
        self.display.end(self.progress, status)


@dataclass(frozen=True)
class RunSession:
    """One process's side of a predict run.

    Args:
        rank: Rank of the process.
        channel: The channel to the other processes.
        record: Writes the manifest and run.json, on rank 0.
        subjects: The process's subjects.
        signals: Stop the run when the process gets a signal.
        display: Shows the run, on rank 0.
    """

    rank: int
    channel: ControlChannel
    record: RunRecord | None
    subjects: OpenSubjects
    signals: Signals
    display: RunDisplay | None

    def begin(self) -> None:
        """Prepare for the first batch."""
        self.subjects.begin()
        self.signals.hold()

    def end(self) -> int:
        """Finish, wait for the other processes, and close the record; returns the exit status."""
        try:
            summary = self.subjects.close()
        except BaseException as error:  # from the writer thread
            return self._break_off(error, {"rank": self.rank})
        return self._settle(summary)

    def fail(self, exception: BaseException) -> int:
        """Finish after an error, which ends the run in all processes; returns the exit status."""
        summary: Message = {"rank": self.rank}
        self._ask_stop(exception)
        try:
            summary = self.subjects.close()
        except RunError as error:
            log.error("%s", error)
        except Exception:
            log.exception("closing failed as well")
        return self._break_off(exception, summary)

    def _break_off(self, exception: BaseException, summary: Message) -> int:
        self._ask_stop(exception)
        return self._settle(summary)

    def _ask_stop(self, exception: BaseException) -> None:
        self.channel.ask_stop(Stop(f"rank {self.rank}: {type(exception).__name__}: {exception}", BROKEN))

    def _settle(self, summary: Message) -> int:
        status = BROKEN
        try:
            summaries = self.channel.gather(summary)
            status = self.channel.settle(self._close_record(summaries))
        except RunError as error:
            log.error("%s", error)
        finally:
            if self.display is not None:
                self.display.end(status)
            self.signals.release()
        return status

    def _close_record(self, summaries: list[Message]) -> int:
        if self.record is None:
            return 0
        try:
            status = self.record.close(summaries, self.channel.stop)
            if self.display is not None:
                self.display.events.end(self.record.outcome, summaries)
            return status
        except OutputError as error:  # a disk that is full at the very end
            self.channel.ask_stop(Stop(str(error), BROKEN))
            return BROKEN


def connect(
    folder: Path,
    data: GridDataModule,
    configuration: Mapping[str, Any],
    display: RunDisplay | None,
    *,
    statistics: bool = False,
) -> tuple[ControlChannel, RunRecord | None]:
    """Make the channel between the processes, and on rank 0 the record; called by all processes.

    Raises:
        OutputError: the record cannot be written.
        RunError: a process cannot connect.
    """
    group = data.plan.group
    records: list[RunRecord] = []
    hubs: list[Hub] = []

    def receive(report: Report) -> None:
        if not isinstance(report, Row):
            if display is not None:
                display.news(report)
            return
        records[0].add(report)
        if display is not None:
            display.row(report)

    def open_record() -> tuple[str, int, bytes] | None:
        records.append(RunRecord(folder, data.plan, data.shard, configuration, statistics=statistics))
        if group.size == 1:
            return None
        hubs.append(Hub(group.size, receive, _decode))
        return hubs[0].address

    address = group.first(open_record)
    if address is None:
        return LocalChannel(receive), records[0]
    if not hubs:
        return Spoke(group.rank, address, _encode), None
    hubs[0].accept()
    return hubs[0], records[0]


def _encode(report: Report) -> Message:
    """A report as plain values for JSON."""
    return {"subject": asdict(report)} if isinstance(report, Row) else {"news": report}


def _decode(message: Message) -> Report:
    if "news" in message:
        return message["news"]
    row = message["subject"]
    return Row(**{**row, "outputs": tuple(row["outputs"]), "kinds": tuple(row["kinds"])})
