"""A predict run from its first to its last moment, as one process sees it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from voxquilt.distributed.control_channel import BROKEN, ControlChannel, LocalChannel, Message, Stop
from voxquilt.distributed.signals import Signals
from voxquilt.distributed.tcp_channel import Hub, Spoke
from voxquilt.errors import OutputError, RunError
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.open_subjects import OpenSubjects
from voxquilt.prediction.run_record import RunRecord
from voxquilt.prediction.tensorboard import RunEvents
from voxquilt.reporting.manifest import Row
from voxquilt.reporting.progress import ProgressDisplay
from voxquilt.reporting.progress_counts import RunProgress

log = logging.getLogger("voxquilt")

Report = Row | Message
"""What processes report while a run goes on: a subject's row, or how far a process is."""


@dataclass(frozen=True)
class RunDisplay:
    """What rank 0 shows of a run.

    Args:
        display: Bars or lines on the terminal.
        progress: Counts what is done.
        events: For TensorBoard; None without it.
    """

    display: ProgressDisplay
    progress: RunProgress
    events: RunEvents | None

    def start(self) -> None:
        """The run begins."""
        self.display.start(self.progress)

    def row(self, row: Row) -> None:
        """A subject is done or has failed."""
        self.progress.row(row)
        self.display.row(row, self.progress)
        if self.events is not None:
            self.events.row(row)

    def news(self, message: Message) -> None:
        """A process has got on."""
        self.progress.news(message)
        self.display.moved(self.progress)

    def close_events(self, outcome: Mapping[str, Any], summaries: Sequence[Message]) -> None:
        """The run has ended."""
        if self.events is not None:
            self.events.end(outcome, summaries)

    def end(self, status: int) -> None:
        """Nothing more is shown."""
        self.display.end(self.progress, status)


@dataclass(frozen=True)
class RunSession:
    """One process's side of a predict run.

    Args:
        rank: Rank of the process.
        channel: To the other processes.
        record: Manifest and run.json, on rank 0.
        subjects: The process's subjects.
        signals: Ask the run to stop.
        display: What people see of the run, on rank 0.
    """

    rank: int
    channel: ControlChannel
    record: RunRecord | None
    subjects: OpenSubjects
    signals: Signals
    display: RunDisplay | None

    def begin(self) -> None:
        """The first batch comes next."""
        self.subjects.begin()
        self.signals.hold()

    def end(self) -> int:
        """Finish, wait for the others, and leave the record; the exit status."""
        try:
            summary = self.subjects.close()
        except BaseException as error:  # whatever ended the writer thread
            return self._break_off(error, {"rank": self.rank})
        return self._settle(summary)

    def fail(self, exception: BaseException) -> int:
        """The same, after an error that ends the run in all processes."""
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
                self.display.close_events(self.record.outcome, summaries)
            return status
        except OutputError as error:  # a disk that is full at the very end
            self.channel.ask_stop(Stop(str(error), BROKEN))
            return BROKEN


def connect(
    folder: Path, data: GridDataModule, configuration: Mapping[str, Any], display: RunDisplay | None
) -> tuple[ControlChannel, RunRecord | None]:
    """The channel between the processes, and on rank 0 the record that it feeds; called by all processes.

    Raises:
        OutputError: the record cannot be written.
        RunError: some process cannot connect.
    """
    group = data.plan.group
    records: list[RunRecord] = []
    hubs: list[Hub] = []

    def take(report: Report) -> None:
        if not isinstance(report, Row):
            if display is not None:
                display.news(report)
            return
        records[0].add(report)
        if display is not None:
            display.row(report)

    def open_record() -> tuple[str, int, bytes] | None:
        records.append(RunRecord(folder, data.plan, data.shard, configuration))
        if group.size == 1:
            return None
        hubs.append(Hub(group.size, take, _decoded))
        return hubs[0].address

    address = group.first(open_record)
    if address is None:
        return LocalChannel(take), records[0]
    if not hubs:
        return Spoke(group.rank, address, _encoded), None
    hubs[0].accept()
    return hubs[0], records[0]


def _encoded(report: Report) -> Message:
    """A report as JSON has it."""
    return {"subject": asdict(report)} if isinstance(report, Row) else {"news": report}


def _decoded(message: Message) -> Report:
    if "news" in message:
        return message["news"]
    row = message["subject"]
    return Row(**{**row, "outputs": tuple(row["outputs"])})
