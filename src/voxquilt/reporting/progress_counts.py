"""How far is a run, all processes together, and how long will it take from here? Counted, not shown."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from voxquilt.reporting.manifest import Row


@dataclass
class Tally:
    """Counts patches and subjects of a run.

    A subject's last patch counts when its files are written, so that all is done only when all is there. The patches of
    a subject that failed count as done too: they do not come any more.

    Args:
        planned: Patches of each subject, from its headers.
        processes: How many there are.
    """

    planned: Mapping[str, int]
    processes: int = 1
    done: int = 0
    failed: int = 0
    current: str = ""
    _finished: set[str] = field(default_factory=set)
    _open: dict[tuple[int, str], int] = field(default_factory=dict)
    _predicted: dict[int, int] = field(default_factory=dict)
    _settled: int = 0
    _came: int = 0
    _left_out: int = 0
    _began: float = field(default_factory=monotonic)

    def news(self, message: Mapping[str, Any]) -> None:
        """Take what a process says: its rank, the patches it has predicted, and those of its latest subjects."""
        rank = int(message["rank"])
        self._predicted[rank] = int(message["predicted"])
        for subject, count in message["of"].items():
            self.current = subject
            if subject not in self._finished:
                self._open[rank, subject] = int(count)

    def row(self, row: Row) -> None:
        """A subject is done or has failed."""
        self._finished.add(row.subject)
        for key in [key for key in self._open if key[1] == row.subject]:
            del self._open[key]
        self._settled += self.planned.get(row.subject, 0)
        self.failed += row.status == "failed"
        self.done += row.status == "done"
        self._came += row.patches
        self._left_out += row.skipped

    @property
    def subjects(self) -> int:
        """To be predicted, in all."""
        return len(self.planned)

    @property
    def total(self) -> int:
        """Patches, in all."""
        return sum(self.planned.values())

    @property
    def patches(self) -> int:
        """Patches that are done with."""
        open_: dict[str, int] = {}
        for (_, subject), count in self._open.items():
            open_[subject] = open_.get(subject, 0) + count
        held = sum(min(count, max(0, self.planned.get(subject, 0) - 1)) for subject, count in open_.items())
        return self._settled + held

    @property
    def predicted(self) -> int:
        """Patches that went through the network, of all processes."""
        return sum(self._predicted.values())

    def rate(self, now: float | None = None) -> float:
        """Predicted patches a second since the run began; what was left out does not count."""
        seconds = (monotonic() if now is None else now) - self._began
        return self.predicted / seconds if seconds > 0 else 0.0

    def left(self, now: float | None = None) -> float | None:
        """Seconds that the rest will take at this rate; None before anything has been predicted."""
        rate = self.rate(now)
        if not rate:
            return None
        # Of the rest as many will be left out (data.skip) as were of subjects that are done.
        share = self._came / (self._came + self._left_out) if self._came else 1.0
        return (self.total - self.patches) * share / rate

    def as_json(self) -> dict[str, Any]:
        """For run.log=json."""
        left = self.left()
        return {
            "subjects": self.subjects, "done": self.done, "failed": self.failed, "patches": self.patches,
            "patches_total": self.total, "patches_per_second": round(self.rate(), 3),
            "seconds_left": None if left is None else round(left, 1), "subject": self.current,
        }  # fmt: skip
