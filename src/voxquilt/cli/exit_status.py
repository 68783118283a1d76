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
    """The exit status of a run, which is recorded where it is made and in the process that unpickles it."""

    def __new__(cls, value: int) -> "ExitStatus":
        _statuses.append(value)
        return super().__new__(cls, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return ExitStatus, (int(self),)


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
