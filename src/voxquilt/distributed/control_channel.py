"""How do the processes of a run talk while it goes on? Each has a connection to rank 0, which keeps the manifest.

Collective operations cannot do this: no rank knows when another has something to say, and one that has died says
nothing. A connection that breaks is known at once. What is sent is JSON; connecting takes a key that rank 0 draws for
the run and hands out through the process group.
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
    """What a process of a run needs to know of the others."""

    @property
    def stop(self) -> Stop | None:
        """Set as soon as any process has asked for it."""
        ...

    def ask_stop(self, stop: Stop) -> None:
        """End the run, in all processes; the first who asks is heard. Returns at once, also in a signal handler."""
        ...

    def report(self, report: Any) -> None:
        """Hand over what became of a subject, or how far this process is, to the process that keeps the manifest."""
        ...

    def gather(self, summary: Message) -> list[Message]:
        """Say that this process has finished; on rank 0, wait for all the others and give their summaries.

        Those of processes that died are missing.
        """
        ...

    def settle(self, status: int) -> int:
        """The exit status of the run: rank 0 says it, the others are told."""
        ...


class LocalChannel:
    """A run of one process.

    Args:
        on_report: Takes what is reported.
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
