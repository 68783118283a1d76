"""Examines a machine: all lines of `voxquilt doctor`."""

from collections.abc import Callable, Iterator

from voxquilt.doctor.devices import check_devices
from voxquilt.doctor.line import Line
from voxquilt.doctor.machine import check_machine
from voxquilt.doctor.processes import check_processes
from voxquilt.doctor.versions import check_versions


def examine() -> list[Line]:
    """All lines. A check that fails itself is a problem of its own, and the others go on."""
    return [line for check in (check_versions, check_devices, check_machine, check_processes) for line in _run(check)]


def _run(check: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    try:
        yield from check()
    except Exception as error:  # a machine that nobody has thought of
        name = check.__name__.removeprefix("check_")
        yield Line.of(name, "could not be examined", problem=f"{type(error).__name__}: {error}")
