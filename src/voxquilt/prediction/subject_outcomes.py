"""Reports the outcome of each subject, and stops the run at the first failure if the user wants that."""

from dataclasses import dataclass

from voxquilt.data.subject_task import SubjectTask
from voxquilt.distributed.control_channel import ControlChannel, Stop
from voxquilt.reporting.manifest import Row
from voxquilt.text import reason_of


@dataclass(frozen=True)
class SubjectOutcomes:
    """Reports the outcomes of a process's subjects, from any thread.

    Args:
        channel: The channel to the process that keeps the manifest.
        stops_at_failure: Whether the run ends at the first subject that fails.
    """

    channel: ControlChannel
    stops_at_failure: bool

    def done(self, row: Row) -> None:
        """Report a subject whose files are written."""
        self.channel.report(row)

    def failed(self, task: SubjectTask, error: Exception, seconds: float) -> None:
        """Report a subject that has failed, after so many seconds of work on it."""
        subject, reason = task.case.subject, reason_of(error)
        self.channel.report(Row(subject, "failed", seconds=seconds, error=reason, inputs=task.case.paths))
        if self.stops_at_failure:
            self.channel.ask_stop(Stop(f"{subject}: {reason} (run.on_error=raise stops here.)", 1))
