"""What does a run show while it goes on? Bars on a terminal, lines elsewhere, or a JSON object a line; on rank 0."""

import contextlib
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from time import monotonic
from typing import Any, Protocol, runtime_checkable

from rich import progress as bars
from rich.console import Console
from rich.markup import escape

from voxquilt.reporting.manifest import Row
from voxquilt.reporting.progress_counts import RunProgress
from voxquilt.vocabulary import LOGS, check_name

log = logging.getLogger("voxquilt")

# Seconds between two lines where there are no bars, and between two JSON objects.
_LINE, _OBJECT = 30.0, 1.0


@runtime_checkable
class ProgressDisplay(Protocol):
    """Shows how far a run is; called by one thread at a time."""

    def start(self, tally: RunProgress) -> None:
        """The run begins."""
        ...

    def moved(self, tally: RunProgress) -> None:
        """Patches have come."""
        ...

    def row(self, row: Row, tally: RunProgress) -> None:
        """A subject is done or has failed."""
        ...

    def end(self, tally: RunProgress, status: int) -> None:
        """The run has ended, with this exit status."""
        ...


def make_show(name: str) -> ProgressDisplay:
    """'auto' (bars on a terminal, else lines), 'rich', 'plain' or 'json'.

    Raises:
        ConfigError: another word.
    """
    check_name(name, LOGS, "run.log")
    if name == "auto":
        name = "rich" if Console().is_terminal else "plain"
    return {"rich": RichProgress, "plain": PlainProgress, "json": JsonProgress}[name]()


class PlainProgress:
    """A line now and then; each finished subject has its line by logging."""

    def __init__(self) -> None:
        self._last = monotonic()

    def start(self, tally: RunProgress) -> None:
        self._last = monotonic()

    def moved(self, tally: RunProgress) -> None:
        if monotonic() - self._last >= _LINE:
            self._last = monotonic()
            log.info(
                "%d of %d subjects, %d of %d patches, %.1f patches/s, %s left: %s", tally.done + tally.failed,
                tally.subjects, tally.patches, tally.total, tally.rate(), _clock(tally.left()), tally.current,
            )  # fmt: skip

    def row(self, row: Row, tally: RunProgress) -> None:
        self.moved(tally)

    def end(self, tally: RunProgress, status: int) -> None:
        pass


class JsonProgress:
    """One JSON object a line on stdout."""

    def __init__(self) -> None:
        self._last = 0.0

    def start(self, tally: RunProgress) -> None:
        say("start", {"subjects": tally.subjects, "patches_total": tally.total, "processes": tally.processes})

    def moved(self, tally: RunProgress) -> None:
        if monotonic() - self._last >= _OBJECT:
            self._last = monotonic()
            say("progress", tally.as_json())

    def row(self, row: Row, tally: RunProgress) -> None:
        say("subject", asdict(row))

    def end(self, tally: RunProgress, status: int) -> None:
        say("end", tally.as_json() | {"exit_status": status})


class RichProgress:
    """A bar for subjects and one for patches, below the lines that are logged."""

    def __init__(self) -> None:
        self._bars = bars.Progress(
            bars.TextColumn("{task.description:>8}"),
            bars.BarColumn(),
            bars.TaskProgressColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[note]}"),
            console=Console(highlight=False, force_terminal=True),
            refresh_per_second=4,
        )
        self._tasks: list[bars.TaskID] = []
        self._streams: list[tuple[logging.StreamHandler[Any], Any]] = []

    def start(self, tally: RunProgress) -> None:
        before = (sys.stdout, sys.stderr)
        self._bars.start()  # from here on what is printed goes above the bars, lines whole
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in before:
                self._streams.append((handler, handler.stream))
                handler.setStream(sys.stdout)
        self._tasks = [
            self._bars.add_task("subjects", total=tally.subjects, note=""),
            self._bars.add_task("patches", total=tally.total, note=""),
        ]

    def moved(self, tally: RunProgress) -> None:
        if not self._tasks:
            return
        subjects, patches = self._tasks
        failed = f"[red]{tally.failed} failed[/red] " if tally.failed else ""
        self._bars.update(subjects, completed=tally.done + tally.failed, note=failed + escape(tally.current))
        pace = f"{tally.rate():.1f}/s, {_clock(tally.left())} left"
        self._bars.update(patches, completed=tally.patches, note=pace)

    def row(self, row: Row, tally: RunProgress) -> None:
        self.moved(tally)

    def end(self, tally: RunProgress, status: int) -> None:
        self.moved(tally)
        self._bars.stop()
        for handler, stream in self._streams:
            handler.setStream(stream)


def say(event: str, content: Mapping[str, Any]) -> None:
    """A line for programs, on the stdout that the process was started with."""
    out = sys.__stdout__
    if out is not None:
        with contextlib.suppress(OSError):  # whoever read it is gone, which is no reason for a run to end
            # In ASCII, which every stream can encode, and which says the same.
            out.write(json.dumps({"event": event, **content}, default=str) + "\n")
            out.flush()


def _clock(seconds: float | None) -> str:
    return "?" if seconds is None else str(timedelta(seconds=round(seconds)))
