"""How did the run end? A table for people and a record for programs."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from voxquilt.manifest import Row

_PACKAGES = ("voxquilt", "torch", "lightning", "hydra-core", "nibabel", "monai", "numpy")


def print_table(rows: Sequence[Row], folder: Path) -> None:
    """A line per subject: what became of it, the labels' volume, the time; then what failed and where files are."""
    table = Table(title="voxquilt")
    for heading in ("subject", "status"):
        table.add_column(heading)
    for heading in (escape("volume [ml]"), "patches", "seconds"):
        table.add_column(heading, justify="right")
    for row in rows:
        volume = "" if row.volume_ml is None else f"{row.volume_ml:.1f}"
        style = "red" if row.status == "failed" else None
        patches = f"{row.patches} of {row.patches + row.skipped}" if row.skipped else str(row.patches)
        table.add_row(escape(row.subject), row.status, volume, patches, f"{row.seconds:.1f}", style=style)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for row in rows:
        if row.status == "failed":
            console.print(f"[red]{escape(row.subject)}[/red]: {escape(row.error)}")
    done = sum(row.status == "done" for row in rows)
    console.print(f"{done} of {len(rows)} subjects done; see {escape(str(folder))}")


def run_record(plain: Mapping[str, Any], rows: Sequence[Row], subjects: int, seconds: float) -> dict[str, Any]:
    """The content of run.json: what ran, with which versions, and the totals."""
    return {
        "configuration": dict(plain),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "subjects": subjects,
        "done": sum(row.status == "done" for row in rows),
        "failed": sum(row.status == "failed" for row in rows),
        "patches": sum(row.patches for row in rows),
        "patches_skipped": sum(row.skipped for row in rows),
        "seconds": round(seconds, 3),
    }
