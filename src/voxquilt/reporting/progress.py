"""Shows the progress of a run on rank 0: bars on a terminal, lines elsewhere, or one JSON object per line."""

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

# Seconds between two lines without bars, and between two JSON objects.
_LINE_INTERVAL, _OBJECT_INTERVAL = 30.0, 1.0


@runtime_checkable
class ProgressDisplay(Protocol):
    """Shows the progress of a run; its methods are called by one thread at a time."""

    def start(self, progress: RunProgress) -> None:
        """Called when the run begins."""
        ...

    def moved(self, progress: RunProgress) -> None:
        """Called when patches have been predicted."""
        ...

    def row(self, row: Row, progress: RunProgress) -> None:
        """Called when a subject is done or has failed."""
        ...

    def end(self, progress: RunProgress, status: int) -> None:
        """Called when the run has ended with an exit status."""
        ...


def make_display(name: str) -> ProgressDisplay:
    """The display of a name: 'rich', 'plain' or 'json', or 'auto' for bars on a terminal and lines elsewhere.

    Raises:
        ConfigError: another name.
    """
    check_name(name, LOGS, "run.log")
    if name == "auto":
        name = "rich" if Console().is_terminal else "plain"
    return {"rich": RichProgress, "plain": PlainProgress, "json": JsonProgress}[name]()


class PlainProgress:
    """Logs a line every half minute; the line of a finished subject is logged elsewhere."""

    def __init__(self) -> None:
        self._last = monotonic()

    def start(self, progress: RunProgress) -> None:
        self._last = monotonic()

    def moved(self, progress: RunProgress) -> None:
        if monotonic() - self._last >= _LINE_INTERVAL:
            self._last = monotonic()
            log.info(
                "%d of %d subjects, %d of %d patches, %.1f patches/s, %s left: %s",
                progress.done + progress.failed, progress.subjects, progress.patches, progress.total, progress.rate(),
                _clock(progress.left()), progress.current,
            )  # fmt: skip

    def row(self, row: Row, progress: RunProgress) -> None:
        self.moved(progress)

    def end(self, progress: RunProgress, status: int) -> None:
        pass


class JsonProgress:
    """One JSON object per line on stdout."""

    def __init__(self) -> None:
        self._last = 0.0

    def start(self, progress: RunProgress) -> None:
        print_event(
            "start", {"subjects": progress.subjects, "patches_total": progress.total, "processes": progress.processes}
        )

    def moved(self, progress: RunProgress) -> None:
        if monotonic() - self._last >= _OBJECT_INTERVAL:
            self._last = monotonic()
            print_event("progress", progress.as_json())

    def row(self, row: Row, progress: RunProgress) -> None:
        print_event("subject", asdict(row))

    def end(self, progress: RunProgress, status: int) -> None:
        print_event("end", progress.as_json() | {"exit_status": status})


class RichProgress:
    """A bar for subjects and a bar for patches, below the lines that are logged."""

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

    def start(self, progress: RunProgress) -> None:
        before = (sys.stdout, sys.stderr)
        self._bars.start()  # from here on, complete printed lines appear above the bars
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in before:
                self._streams.append((handler, handler.stream))
                handler.setStream(sys.stdout)
        self._tasks = [
            self._bars.add_task("subjects", total=progress.subjects, note=""),
            self._bars.add_task("patches", total=progress.total, note=""),
        ]

    def moved(self, progress: RunProgress) -> None:
        if not self._tasks:
            return
        subjects, patches = self._tasks
        failed = f"[red]{progress.failed} failed[/red] " if progress.failed else ""
        self._bars.update(subjects, completed=progress.done + progress.failed, note=failed + escape(progress.current))
        pace = f"{progress.rate():.1f}/s, {_clock(progress.left())} left"
        self._bars.update(patches, completed=progress.patches, note=pace)

    def row(self, row: Row, progress: RunProgress) -> None:
        self.moved(progress)

    def end(self, progress: RunProgress, status: int) -> None:
        self.moved(progress)
        self._bars.stop()
        for handler, stream in self._streams:
            handler.setStream(stream)


def print_event(event: str, content: Mapping[str, Any]) -> None:
    """Print a JSON object for programs to the stdout that the process was started with."""
    out = sys.__stdout__
    if out is not None:
        with contextlib.suppress(OSError):  # the reader is gone; the run goes on
            # JSON in ASCII, which every stream can encode.
            out.write(json.dumps({"event": event, **content}, default=str) + "\n")
            out.flush()


def _clock(seconds: float | None) -> str:
    return "?" if seconds is None else str(timedelta(seconds=round(seconds)))
