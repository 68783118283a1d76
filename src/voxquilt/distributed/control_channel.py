"""Defines the channel by which the processes of a run exchange messages with rank 0, which keeps the manifest.

Collective operations cannot do this: no rank knows when another has a message, and a rank that has died sends none. A
broken connection is noticed at once. Messages are JSON; connecting needs a key that rank 0 draws for the run and shares
through the process group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

BROKEN = 1
"""The exit status of a run that broke off."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Stop:
    """Why a run ends before everything is done, and with which exit status."""

    reason: str
    status: int


@runtime_checkable
class ControlChannel(Protocol):
    """What a process of a run exchanges with the others."""

    @property
    def stop(self) -> Stop | None:
        """Why the run ends, as soon as any process has requested it; else None."""
        ...

    def ask_stop(self, stop: Stop) -> None:
        """End the run in all processes; the first request counts. Returns at once, also in a signal handler."""
        ...

    def report(self, report: Any) -> None:
        """Send what became of a subject, or how far this process is, to rank 0."""
        ...

    def gather(self, summary: Message) -> list[Message]:
        """Announce that this process has finished; on rank 0, wait for all others and return their summaries.

        The summaries of processes that have died are missing.
        """
        ...

    def settle(self, status: int) -> int:
        """Return the exit status of the run, which rank 0 gives to all others."""
        ...


class LocalChannel:
    """The channel of a run with one process.

    Args:
        on_report: Takes reports.
    """

    def __init__(self, on_report: Callable[[Any], None]) -> None:
        self._on_report = on_report
        self.stop: Stop | None = None

    def ask_stop(self, stop: Stop) -> None:
        self.stop = self.stop or stop

    def report(self, report: Any) -> None:
        self._on_report(report)

    def gather(self, summary: Message) -> list[Message]:
        return [summary]

    def settle(self, status: int) -> int:
        return status
