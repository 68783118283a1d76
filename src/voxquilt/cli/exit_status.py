"""Collects the exit statuses of the runs of a command, one run or those of a sweep, and ends the process."""

import atexit
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

DONE, FAILED, NOT_STARTED = 0, 1, 2

# Module-level, since the status of a run that a launcher such as submitit started in another process comes back as part
# of a pickled result, which Hydra hands to nobody: unpickling it is the only place where this process sees it.
_statuses: list[int] = []


class ExitStatus(int):
    """The exit status of a run, which is recorded where it is made and in the process that unpickles it.

    A sweeper that optimises takes what a job returns for a number: that is the score, not the status.

    Args:
        value: The status.
        score: What a sweeper is to optimise; None for a run that has no score.
    """

    def __new__(cls, value: int, score: float | None = None) -> "ExitStatus":
        _statuses.append(value)
        status = super().__new__(cls, value)
        status.score = score
        return status

    score: float | None

    def __float__(self) -> float:
        if self.score is None:
            raise ValueError(f"the run has no score; its exit status is {int(self)}")
        return self.score

    def __reduce__(self) -> tuple[Any, ...]:
        return ExitStatus, (int(self), self.score)


def forget_statuses() -> None:
    """Begin a command."""
    _statuses.clear()


def has_run() -> bool:
    """Whether a run has ended."""
    return bool(_statuses)


def highest_status(*others: int) -> int:
    """The highest status of all runs and of some others; DONE where nothing ran, as after --help."""
    return max([*_statuses, *others], default=DONE)


def prepare_quick_end() -> Callable[[int], NoReturn]:
    """A function that ends the process with a status, without taking apart the thousands of modules that it has.

    Exit handlers and threads are finished as ever; but this has to be called before others register such handlers,
    since they run in reverse order, and none runs after this function's.
    """
    wanted: list[int] = []

    def end() -> None:
        if not wanted:  # an error of the interpreter's, which it reports
            return
        try:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
        except OSError:  # nobody reads on: the interpreter says so as ever
            return
        os._exit(wanted[-1])

    atexit.register(end)

    def leave(status: int) -> NoReturn:
        wanted.append(status)
        sys.exit(status)

    return leave
