"""How did the run end? A table for people."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from voxquilt.manifest import Row

# Rows of a table that a person reads; of more subjects only those that failed are shown.
_ROWS = 100


def print_table(rows: Sequence[Row], folder: Path, subjects: int) -> None:
    """A line per subject: what became of it, the labels' volume, the time; then what failed and where files are.

    Args:
        rows: Of the subjects that are done or have failed.
        folder: Where files are.
        subjects: How many there are in the run.
    """
    table = Table(title="voxquilt")
    for heading in ("subject", "status"):
        table.add_column(heading)
    for heading in (escape("volume [ml]"), "patches", "seconds"):
        table.add_column(heading, justify="right")
    shown = rows if len(rows) <= _ROWS else [row for row in rows if row.status == "failed"][:_ROWS]
    for row in shown:
        volume = "" if row.volume_ml is None else f"{row.volume_ml:.1f}"
        style = "red" if row.status == "failed" else None
        patches = f"{row.patches} of {row.patches + row.skipped}" if row.skipped else str(row.patches)
        table.add_row(escape(row.subject), row.status, volume, patches, f"{row.seconds:.1f}", style=style)
    console = Console(highlight=False, soft_wrap=True)
    if shown:
        console.print(table)
    for row in shown:
        if row.status == "failed":
            console.print(f"[red]{escape(row.subject)}[/red]: {escape(row.error)}")
    before, failed = (sum(row.status == status for row in rows) for status in ("skipped", "failed"))
    earlier = f", {before} of them before" if before else ""
    console.print(f"{len(rows) - failed} of {subjects} subjects done{earlier}; see {escape(str(folder))}")
